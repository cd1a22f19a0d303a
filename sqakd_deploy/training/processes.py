"""Several processes, one run: devices and groups through Accelerate, and BatchNorm in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from sqakd_deploy.errors import SpecError


def start(device: torch.device) -> Accelerator:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started; alone, be the one.

    A launcher's settings of precision and accumulation are not taken: a run's own are in its config
    and make the same student wherever it is started.
    """
    whole = GradientAccumulationPlugin(num_steps=1)  # its environment beats a plain argument
    try:
        return Accelerator(
            cpu=device.type == "cpu", mixed_precision="no", gradient_accumulation_plugin=whole
        )
    except ValueError as error:
        raise SpecError(
            "this program holds an Accelerator of other settings, and there can be one alone; "
            f"train before it is made, or make it with mixed_precision='no' ({error})"
        ) from error


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is its gradient, since every process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0].contiguous())


def _summed(x: Tensor) -> Tensor:
    """The functional form of ``all_reduce``: torch.compile keeps it inside its one graph."""
    everyone = dist.group.WORLD
    assert everyone is not None  # there is a group, or BatchNorm would not be synchronised
    total: Tensor = collectives.all_reduce(x, "sum", everyone)
    return total


class _Synced(nn.modules.batchnorm._BatchNorm):
    """Normalises by the mean and variance over all processes' batches.

    torch's own SyncBatchNorm needs a GPU; this one also runs under gloo on CPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        x = input.float()
        world = dist.get_world_size()
        count = x.numel() // x.shape[1] * world
        mean = _Sum.apply(x.sum(axes)) / count
        shape = (1, -1, *[1] * (input.dim() - 2))
        centred = x - mean.reshape(shape)
        variance = _Sum.apply((centred**2).sum(axes)) / count
        self._remember(mean.detach(), variance.detach(), count)
        y = centred * torch.rsqrt(variance + self.eps).reshape(shape)
        if self.affine:
            y = y * self.weight.reshape(shape) + self.bias.reshape(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        tracked = float(self.num_batches_tracked) if self.num_batches_tracked is not None else 1.0
        weight = 1.0 / tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / max(1, count - 1), weight)


class _Synced1d(_Synced, nn.BatchNorm1d):
    pass


class _Synced2d(_Synced, nn.BatchNorm2d):
    pass


_SYNCED: dict[type, type] = {nn.BatchNorm1d: _Synced1d, nn.BatchNorm2d: _Synced2d}
_PLAIN: dict[type, type] = {synced: plain for plain, synced in _SYNCED.items()}


@contextmanager
def _exchanged(model: nn.Module, kinds: dict[type, type]) -> Iterator[None]:
    """Modules of a class compute as another while the context lasts, on the same state."""
    found = [(module, type(module)) for module in model.modules() if type(module) in kinds]
    for module, kind in found:
        module.__class__ = kinds[kind]
    try:
        yield
    finally:
        for module, kind in found:
            module.__class__ = kind


@contextmanager
def synchronised_batch_norm(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """While the context lasts, BatchNorm sees the batches of all processes as one."""
    with _exchanged(model, _SYNCED if accelerator.num_processes > 1 else {}):
        yield


@contextmanager
def separate_batch_norm(model: nn.Module) -> Iterator[None]:
    """While the context lasts, each process normalises for itself: all see the same batches."""
    with _exchanged(model, _PLAIN):
        yield


def averaged(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Mean of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return values
    mean: Tensor = accelerator.reduce(values, reduction="mean")
    return mean
