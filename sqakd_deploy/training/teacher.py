"""A float teacher for those who have none; the only training here that needs labels by nature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_deploy.config import TeacherConfig
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.tracing.trace import first_tensor
from sqakd_deploy.training.acceleration import decide
from sqakd_deploy.training.fitting import Epoch, Fit, Loader, Step, cosine, one_cycle
from sqakd_deploy.training.losses import LABELS, label_loss
from sqakd_deploy.training.processes import start, synchronised_batch_norm
from sqakd_deploy.training.saves import Saves


def train_teacher(
    model: nn.Module,
    batches: Loader,
    config: TeacherConfig,
    *,
    acceleration: DistillConfig | None = None,
    saves: Saves | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    message: Callable[[str], None] | None = None,
) -> None:
    """Train with cross-entropy and SGD.

    Args:
        model: changed in place; ends in evaluation mode, in plain memory layout.
        batches: pairs of images ``(N, C, H, W)`` and labels ``(N,)``, gone through once an epoch.
        config: epochs, rates, schedule.
        acceleration: its ``compile`` and ``precision`` are used.
        saves: where training states are saved, and resumed from if there is one.
        on_step: called after each step; its agreement is the training accuracy.
        on_epoch: called after each epoch.
        message: told what was decided.

    Raises:
        TrainingError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    accelerator = start(device)
    example = first_tensor(next(iter(batches))).to(device)
    steps = config.epochs * len(batches)
    how = decide(acceleration or DistillConfig(), model, example, steps, device)
    if message:
        message(f"training is {how.reason}")
    how.place(model)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    with synchronised_batch_norm(model, accelerator):
        ready = accelerator.prepare_model(how.compiled(model, whole=False))

        def objective(batch: Any) -> tuple[Tensor, Tensor]:
            images, labels = how.images(batch[0].to(device)), batch[1].to(device)
            with how.autocast(device):
                logits = ready(images)
            return label_loss(logits, labels)

        Fit(
            model=model,
            objective=objective,
            optimizer=optimizer,
            schedule=cosine if config.schedule == "cosine" else one_cycle,
            batches=batches,
            epochs=config.epochs,
            accelerator=accelerator,
            saves=saves,
            on_step=on_step,
            on_epoch=on_epoch,
            target=LABELS,
        ).run()
    how.take_back(model)
    model.eval()
