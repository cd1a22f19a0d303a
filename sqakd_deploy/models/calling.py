"""Calling a factory that others wrote."""

from __future__ import annotations

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
        raise ModelError(
            f"cannot build model {name!r} with {given}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {name!r}: wanted its factory to return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model
