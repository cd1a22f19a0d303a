"""What :func:`~sqakd_deploy.quantization.quantize` makes."""

from __future__ import annotations

from typing import NoReturn

from torch import fx

from sqakd_deploy.errors import ModelError


class Student(fx.GraphModule):
    """A traced network of Brevitas layers, with its spec in ``meta``; a deep copy is one, too."""

    def __reduce__(self) -> NoReturn:
        # Brevitas' layers hold classes made when they are built, which pickle cannot find.
        raise ModelError(
            "a student cannot be pickled; save its tensors: torch.save(student.state_dict(), path) "
            "and load them into quantize(model, spec, example=...) of the same model and spec"
        )
