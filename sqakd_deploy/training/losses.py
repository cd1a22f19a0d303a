"""What a student is trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LABELS = "top-1"  # what hits of labels are called


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T²·KL(softmax(teacher/T) ‖ softmax(student/T))`` (SQAKD eq. 7; Hinton et al., 2015).

    Args:
        student: logits ``(N, K)``.
        teacher: logits ``(N, K)``; no gradient is wanted.
        temperature: T.

    Returns:
        A scalar: summed over classes, averaged over the batch. T² keeps the gradient's size when T
        changes.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with labels, and the share of them that is hit (0 to 1).

    Args:
        logits: ``(N, K)``, computed on in float32.
        labels: ``(N,)``, on the same device.
    """
    logits = logits.float()
    hits = (logits.detach().argmax(dim=1) == labels).float().mean()
    return F.cross_entropy(logits, labels), hits
