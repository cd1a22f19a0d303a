"""Where a number that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sqakd_deploy.errors import DataError, ModelError


def check_finite(model: nn.Module) -> None:
    """Refuse a model of spoilt weights, of which neither ranges nor answers could be made.

    Raises:
        ModelError: with the first such parameter's name.
    """
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            raise ModelError(f"the model's weights hold values that are not finite: {name}")


def check_images(images: Tensor) -> None:
    """Refuse images of which no range, statistic or gradient could be made.

    Args:
        images: ``(N, C, H, W)``; for a GPU's the program waits.

    Raises:
        DataError: if a number in them is not finite, saying where the first is.
    """
    images = images.detach()
    # One pass, and no memory: a sum is not finite if a term is not, and else only if it overflows.
    if images.is_meta or bool(images.sum().isfinite()):
        return
    at = (~images.isfinite()).nonzero()[:1].tolist()
    if at:
        raise DataError(
            f"images: wanted finite numbers, got {float(images[tuple(at[0])])} at {at[0]} of "
            f"{tuple(images.shape)}; prepare that image anew, or leave it out"
        )


def non_finite_tensor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The first tensor that would not be finite in a model.

    Args:
        found: to be loaded, under the model's own names.
        wanted: what the model has of its own: a mask that it builds with -inf may hold one.

    Returns:
        Its name; None if there is none.
    """
    for name, own in wanted.items():
        if bool(own.isfinite().all()) and not bool(found[name].to(own.dtype).isfinite().all()):
            return name
    return None


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Run a batch again and name the first layer whose output is not finite.

    Args:
        model: as trained, not compiled; its mode and statistics are left as they are.
        images: the batch that gave the loss ``(N, C, H, W)``.

    Returns:
        A phrase for an error message.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                found.append(f"layer '{name}' ({type(module).__name__}) is the first not finite")

        return hook

    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaves = [(n, m) for n, m in model.named_modules() if n and not any(True for _ in m.children())]
    handles = [m.register_forward_hook(watch(n)) for n, m in leaves]
    try:
        with torch.no_grad():
            output = model(images)
            if not found and not bool(output.isfinite().all()):
                found.append("the output is not finite, though every layer's is")
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            with torch.no_grad():
                buffer.copy_(state[name])
    return found[0] if found else "every layer's output is finite: the loss itself overflowed"


def non_finite_gradients(model: nn.Module) -> str:
    """Name the parameter nearest to the output whose gradient is not finite.

    Going backwards it is the first; what comes before it in the model, it makes so, too.

    Args:
        model: after the backward pass.

    Returns:
        A phrase for an error message.
    """
    found = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    if not found:
        return "the gradients are too large to be added up"
    others = f" and of {len(found) - 1} parameters before it" if found[1:] else ""
    return f"the gradient of '{found[-1]}'{others} is not"
