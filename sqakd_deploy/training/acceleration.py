"""How the arithmetic of training runs: compiled or not, in which precision and memory layout."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.kernels import remove_broken

# ResNet-20 at 128×32×32 on 2 cores: compiling takes 25 to 50 s and then saves 0.3 s on each step
# of 5.2e9 multiply-adds, so that it pays from some 1e12 on.
_CPU_WORTH = 1e12
_GPU_STEPS_WORTH = 2000

# Below so many multiply-adds a step, operators are too small to share: two threads are hardly
# faster than one (ResNet-20 on 8×8 digits: 18 against 22 s), and wait for each other at every
# operator. With another process on the machine that wait was seen to slow training 60 times.
_WORTH_SHARING = 1e9


@dataclass(frozen=True)
class Acceleration:
    """What was decided.

    Attributes:
        compile: models run as one compiled graph.
        bf16: convolutions and linears compute in bfloat16; quantizers stay in float32.
        channels_last: memory format of images and convolutions.
        reason: why, for the log.
    """

    compile: bool
    bf16: bool
    channels_last: bool
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Context for the forward pass."""
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def place(self, model: nn.Module) -> nn.Module:
        """Put a model's convolutions into the memory format."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    @torch.no_grad()
    def take_back(self, model: nn.Module) -> None:
        """Put a model that was placed into the layout of one that is read from a file.

        In another layout the same weights sum in another order, and a run that goes on from its
        files would not end as one that was never stopped.
        """
        if self.channels_last:
            for tensor in (*model.parameters(), *model.buffers()):
                # Not contiguous(), which leaves the strides of 1×1 kernels as they are.
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)

    def images(self, batch: Tensor) -> Tensor:
        """Put images ``(N, C, H, W)`` into the memory format."""
        if self.channels_last and batch.dim() == 4:
            return batch.contiguous(memory_format=torch.channels_last)
        return batch

    def compiled(self, model: nn.Module, *, whole: bool) -> nn.Module:
        """The model as one graph, if so decided; ``whole`` makes a graph break an error."""
        if not self.compile:
            return model
        remove_broken()
        options = compiler_options() if self.bf16 else None
        return cast(
            nn.Module, torch.compile(model, fullgraph=whole, dynamic=False, options=options)
        )


@contextmanager
def fitting_threads(model: nn.Module, batch: Tensor) -> Iterator[None]:
    """Context with one thread where operators are too small to share, for CPUs.

    Args:
        model: the float model.
        batch: images as trained on ``(N, C, H, W)``.
    """
    before = torch.get_num_threads()
    small = batch.device.type == "cpu" and (
        multiply_adds(model, batch[:1]) * len(batch) < _WORTH_SHARING
    )
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decide(
    config: DistillConfig, model: nn.Module, batch: Tensor, steps: int, device: torch.device
) -> Acceleration:
    """Choose from the work ahead; the same run decides the same on the same machine.

    Args:
        config: ``compile`` and ``precision`` as asked for.
        model: the float model, for its size.
        batch: images as trained on ``(N, C, H, W)``.
        steps: training steps ahead.
        device: where they run.
    """
    work = multiply_adds(model, batch[:1]) * len(batch)
    compiles, reason = _compiles(config, work * steps, steps, device)
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and compiles and _fast_bf16(device)
    )
    layout = compiles or bf16
    words = f"{reason}; {'bfloat16' if bf16 else 'float32'}"
    words += ", channels last" if layout else ""
    return Acceleration(compiles, bf16, layout, words)


def _compiles(
    config: DistillConfig, work: int, steps: int, device: torch.device
) -> tuple[bool, str]:
    if config.compile == "off":
        return False, "eager, as asked"
    if device.type == "cpu" and not _has_compiler():
        return False, "eager: there is no C++ compiler (install g++ to train faster)"
    if config.compile == "on":
        return True, "compiled, as asked"
    if device.type != "cpu":
        worth = steps >= _GPU_STEPS_WORTH
        why = f"{steps} steps ahead, {_GPU_STEPS_WORTH} make up for compiling"
    else:
        worth = work >= _CPU_WORTH
        why = f"{work:.1e} multiply-adds ahead, {_CPU_WORTH:.0e} make up for compiling"
    return worth, f"{'compiled' if worth else 'eager'}: {why}"


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one forward pass on ``image`` ``(1, C, H, W)``."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(training)
    return counter.get_total_flops() // 2


def _fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself.

    oneDNN supports bfloat16 on any CPU with AVX-512, by way of float32: ResNet-20 trained 3.2 times
    slower so than in float32 on a CPU without the instructions.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if _is_x86():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compiler_options() -> dict[str, Any] | None:
    """Options of ``torch.compile`` for kernels of bfloat16 on CPUs; None where none are needed.

    GCC 12.2 at ``-O3 -march=native`` writes some of these kernels wrong on CPUs that it tunes for
    as ``generic``: tiles of 32×32 are transposed into arbitrary numbers, gradients of 1e38 and NaN.
    Without its straight-line vectoriser the same source is right; inductor's kernels hold vector
    instructions by themselves.
    """
    import torch._inductor

    if not (_is_x86() and sys.platform == "linux"):
        return None
    if "cpp.march" not in torch._inductor.list_options():  # torch 2.12 has no way to pass a flag
        return None
    return {"cpp.march": "native -fno-tree-slp-vectorize"}


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _has_compiler() -> bool:
    """Whether inductor will find a C++ compiler for CPU kernels."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return any(shutil.which(name) for name in candidates if name)
