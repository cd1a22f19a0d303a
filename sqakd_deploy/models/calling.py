"""Calling a factory that others wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sqakd_deploy.errors import ModelError


def call_factory(name: str, factory: Callable[..., Any], args: Mapping[str, Any]) -> nn.Module:
    """Call ``factory`` with ``args``.

    Raises:
        ModelError: if it raises, whatever it raises, or does not return a module.
    """
    try:
        model = factory(**args)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
        missing = _missing(factory, args) if isinstance(error, TypeError) else []
        wanted = " ".join(f"--model-arg {key}=..." for key in missing)
        hint = f"; give what it lacks: {wanted}" if missing else ""
        raise ModelError(
            f"cannot build model {name!r} with {given}: {type(error).__name__}: {error}{hint}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {name!r}: wanted its factory to return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model


def _missing(factory: Callable[..., Any], args: Mapping[str, Any]) -> list[str]:
    """Arguments that a factory cannot do without and is not given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind in named
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in args
    ]
