"""What a student is trained on."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError

LABELS = "top-1"  # what hits of labels are called
_LOOKED_AT = 8  # images whose answers are looked at
_ROUNDING = 1e-3  # of sums of probabilities


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


@torch.no_grad()
def check_logits(student: nn.Module, teacher: nn.Module, images: Tensor) -> int:
    """Refuse networks whose answers no loss here can compare.

    Args:
        student: calibrated.
        teacher: in evaluation mode.
        images: ``(N, C, H, W)``, of which one is looked at.

    Returns:
        K.

    Raises:
        ModelError: if the student's answers are not ``(N, K)`` with K of at least 2, or the
            teacher's are something else.
    """
    training = student.training
    ours, theirs = student.eval()(images[:1]), teacher(images[:1])
    student.train(training)
    if ours.dim() != 2 or ours.shape[1] < 2:
        raise ModelError(
            "student: wanted logits (N, K), two or more for each image, got for one "
            f"{tuple(ours.shape)}"
        )
    got = tuple(theirs.shape) if isinstance(theirs, Tensor) else f"a {type(theirs).__name__}"
    if got != tuple(ours.shape):
        raise ModelError(
            f"teacher: wanted logits of shape {tuple(ours.shape)}, as the student gives for "
            f"one image, got {got}; give the model that the student was made from"
        )
    return int(ours.shape[1])


@torch.no_grad()
def warn_of_probabilities(teacher: nn.Module, images: Tensor) -> None:
    """Warn of a teacher that answers with probabilities, which teach a student next to nothing.

    A softmax of numbers from 0 to 1 is nearly flat, and flatter still at a temperature.

    Args:
        teacher: in evaluation mode.
        images: ``(N, C, H, W)``, of which a few are looked at; a single one tells nothing.
    """
    answers = teacher(images[:_LOOKED_AT]).float()
    sums = answers.sum(dim=1)
    if len(answers) > 1 and bool((answers >= 0).all() & ((sums - 1).abs() < _ROUNDING).all()):
        warnings.warn(
            "teacher: wanted logits, but every row of its outputs is non-negative and sums to 1: "
            "does the model end in a softmax? A student learns next to nothing from "
            "probabilities; give the model without its last layer",
            stacklevel=2,
        )
