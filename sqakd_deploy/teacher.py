"""A float teacher for those who have none; the only training here that needs labels by nature."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqakd_deploy.config import TeacherConfig
from sqakd_deploy.distillation import Loader, Step
from sqakd_deploy.errors import TrainingError


def train_teacher(
    model: nn.Module,
    batches: Loader,
    config: TeacherConfig,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Train with cross-entropy, SGD and a one-cycle schedule (Smith & Topin, 2018).

    Args:
        model: changed in place; ends in evaluation mode.
        batches: pairs of images ``(N, C, H, W)`` and labels ``(N,)``, gone through once an epoch.
        config: epochs, rates.
        on_step: called after each step; its agreement is the training accuracy.

    Raises:
        TrainingError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(2, config.epochs * steps), pct_start=0.2
    )
    for epoch in range(config.epochs):
        set_epoch = getattr(batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        model.train()
        start, seen = time.perf_counter(), 0
        loss_sum = correct = 0.0
        for step, (images, labels) in enumerate(batches):
            rate = float(schedule.get_last_lr()[0])
            loss, hits = _step(model, optimizer, images.to(device), labels.to(device))
            schedule.step()
            seen, loss_sum, correct = seen + len(images), loss_sum + loss, correct + hits
            if on_step:
                speed = seen / (time.perf_counter() - start)
                means = loss_sum / (step + 1), 100 * correct / seen
                on_step(Step(epoch, step, config.epochs, steps, *means, rate, speed, "top-1"))
    model.eval()


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """One update; returns the loss and the count of right answers."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    value = float(loss.detach())
    if not value < float("inf"):
        raise TrainingError(f"the teacher's loss is {value}; lower --teacher-lr")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value, float((logits.detach().argmax(dim=1) == labels).sum())
