"""How good a model is, with labels and without."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from sqakd_deploy.errors import DataError
from sqakd_deploy.tracing.trace import first_tensor
from sqakd_deploy.verification.measures import Logits, accuracy, agreement

__all__ = ["Logits", "accuracy", "agreement", "batch_agreement", "divergence", "predict"]


@torch.no_grad()
def predict(model: nn.Module, images: Iterable[object]) -> Logits:
    """Logits ``(N, K)`` of batches of preprocessed images, in evaluation mode.

    Raises:
        DataError: if there are no images.
    """
    training = model.training
    model.eval()
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    outputs = [model(first_tensor(batch).to(device)).float().cpu().numpy() for batch in images]
    model.train(training)
    if not outputs:
        raise DataError("wanted at least one image to evaluate on, got none")
    return np.concatenate(outputs)


def divergence(logits: Logits, reference: Logits) -> float:
    """Mean KL(softmax(reference) ‖ softmax(logits)) in nats; needs no label."""
    ours = torch.log_softmax(torch.from_numpy(logits), dim=1)
    theirs = torch.log_softmax(torch.from_numpy(reference), dim=1)
    return float((theirs.exp() * (theirs - ours)).sum(dim=1).mean())


def batch_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of a batch with the same top-1 answer, 0 to 1, on the device."""
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).float().mean()
