"""Models of a person's own code: ``FILE.py:FACTORY`` and ``PACKAGE.MODULE:FACTORY``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.models.calling import call_factory
from sqakd_deploy.registry import unknown_name


def build_from_code(reference: str, sizes: Mapping[str, int], args: dict[str, Any]) -> nn.Module:
    """Import a factory and call it.

    The folder of the file (or, for a module, the working folder) can be imported from meanwhile,
    as if Python had been started there. What the code prints goes to stderr: stdout is for results,
    which programs read.

    Args:
        reference: ``FILE.py:FACTORY`` or ``PACKAGE.MODULE:FACTORY``; a factory is a function or
            a class.
        sizes: ``num_classes`` and ``in_channels``, handed over where the factory has parameters
            of these names.
        args: arguments, which win over ``sizes``.

    Raises:
        ModelError: if the code cannot be imported, has no such factory, or the factory raises
            or returns something else than a module.
    """
    source, factory_name = check_reference(reference)
    is_file = source.endswith(".py")
    folder = Path(source).expanduser().resolve().parent if is_file else Path.cwd()
    with _importable(folder), redirect_stdout(sys.stderr):
        module = _import_file(source) if is_file else _import_module(source)
        factory = _factory(module, source, factory_name)
        return call_factory(reference, factory, {**_wanted(factory, sizes), **args})


def check_reference(reference: str) -> tuple[str, str]:
    """The source and the factory of a reference, before anything is imported.

    Raises:
        ModelError: if it is none, or its file does not exist.
    """
    source, _, factory_name = reference.rpartition(":")
    if not source or not factory_name:
        raise ModelError(f"model {reference!r}: wanted FILE.py:FACTORY or PACKAGE.MODULE:FACTORY")
    path = Path(source).expanduser().resolve()
    if source.endswith(".py") and not path.is_file():
        raise ModelError(f"model file {path} does not exist")
    return source, factory_name


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    # A name of its own: a person's "resnet.py" must not hide an installed module.
    name = f"_sqakd_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"model file {path} is not Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed_import(source, error) from error
    return module


def _import_module(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise _failed_import(source, error) from error


def _failed_import(source: str, error: BaseException) -> ModelError:
    return ModelError(f"importing {source} failed: {type(error).__name__}: {error}")


def _factory(module: ModuleType, source: str, name: str) -> Callable[..., Any]:
    factory = vars(module).get(name)
    if callable(factory):
        return factory
    if factory is not None:
        raise ModelError(
            f"{name} in {source} is a {type(factory).__name__}; wanted a function or a class"
        )
    own = sorted(
        key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    )
    raise ModelError(f"{source}: {unknown_name('factory', name, own)}")


def _wanted(factory: Callable[..., Any], sizes: Mapping[str, int]) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}
    return {name: value for name, value in sizes.items() if name in parameters}


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported code may have taken it out
            sys.path.remove(str(folder))
