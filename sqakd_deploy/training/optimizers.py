"""Which parameters of a student learn how fast, and by which optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sqakd_deploy.quantization import (
    activation_quantizers,
    count_quantizers,
    weight_quantizers,
)
from sqakd_deploy.spec import DistillConfig

_ENOUGH_BITS = 4  # to freeze BatchNorm from the start and to learn slowly (docs/decisions.md)
_LR, _FEW_BITS_LR = 3e-4, 1e-3


def loses_little(student: nn.Module) -> bool:
    """Whether nothing is rounded to fewer than 4 bits."""
    bits = {width for counts in count_quantizers(student).values() for width in counts}
    return min(bits, default=_ENOUGH_BITS) >= _ENOUGH_BITS


def learning_rate(student: nn.Module, config: DistillConfig) -> float:
    """The highest rate of the model's parameters, as asked or as suits its bits."""
    if config.lr is not None:
        return config.lr
    return _LR if loses_little(student) else _FEW_BITS_LR


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict[str, Any]]:
    """The model's parameters with weight decay, the quantizers' at their own rate and decay.

    PACT's α decays as the model does, as published.
    """
    quantizers = [*weight_quantizers(student).values(), *activation_quantizers(student).values()]
    own: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for quantizer in quantizers:
        pulled = getattr(quantizer, "decayed", ())
        for name, parameter in quantizer.named_parameters():
            (decayed if name in pulled else own).append(parameter)
    known = {id(parameter) for parameter in own + decayed}
    model = [p for p in student.parameters() if id(p) not in known]
    rate, slower = learning_rate(student, config), config.quantizer_lr
    groups = [
        {"params": model, "lr": rate, "weight_decay": config.weight_decay},
        {"params": own, "lr": slower, "weight_decay": config.quantizer_weight_decay},
        {"params": decayed, "lr": slower, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(student: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names, over :func:`parameter_groups`."""
    groups = parameter_groups(student, config)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov)
