"""What a model answers, seen before it is trusted with any work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError


def count_logits(model: nn.Module, name: str, shape: tuple[int, int, int]) -> int:
    """K, the number of logits that a model really returns.

    Args:
        model: not changed.
        name: of the model, for messages.
        shape: of an image ``(C, H, W)``.

    Raises:
        ModelError: if it is not in float32, does not take such images, or does not return
            ``(N, K)`` with K ≥ 2.
    """
    device = next((p.device for p in model.parameters()), None)
    if device is None:
        raise ModelError(f"model {name!r} has no parameters, so there is nothing to train")
    other = next((p.dtype for p in model.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise ModelError(
            f"model {name!r}: wanted parameters in float32, got {other}; let its factory return "
            "model.float()"
        )
    images = torch.zeros(2, *shape, device=device)
    training = model.training
    try:
        with torch.no_grad():
            answer = model.eval()(images)
    except Exception as error:  # a person's own code raises anything
        channels, height, width = shape
        reason = (str(error) or "no reason given").splitlines()[0]
        raise ModelError(
            f"model {name!r} does not take {height}×{width} images of {channels} channels "
            f"({type(error).__name__}: {reason}); give it those that it was made for "
            "(--input-size, --channels, --data)"
        ) from error
    finally:
        model.train(training)
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != 2:
        raise ModelError(
            f"model {name!r}: wanted logits of shape (N, K), one row an image, and for 2 images "
            f"got {_described(answer)}; let its factory return the classifier alone"
        )
    classes = answer.shape[1]
    if classes < 2:
        raise ModelError(
            f"model {name!r} returns {classes} logit an image; wanted two or more, one a class"
        )
    return classes


def _described(answer: object) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    return f"a {type(answer).__name__}"
