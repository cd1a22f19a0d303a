"""Random small networks of the operators that exporters write in several forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, LARGEST = 8, 24

UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.45, 0.6),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "inner average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "scale": lambda x: x * 0.7,
    "squeeze": lambda x: x * F.adaptive_avg_pool2d(x, 1),
    "with relu": lambda x: x + F.relu(x),
}
BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "concat": lambda x, y: torch.cat([x, y], 1),
}


class RandomNetwork(nn.Module):
    """A convolution, then operators on any of the tensors so far, mostly on the last.

    Args:
        seed: of the plan and the weights.
        length: operators.
    """

    def __init__(self, seed: int, length: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.random = np.random.default_rng(seed)
        self.convs = nn.ModuleList([nn.Conv2d(3, CHANNELS, 3, padding=1)])
        self.plan: list[tuple[str, int, int]] = []  # operator, the tensor, the other or the layer
        self.channels = [CHANNELS]
        for _ in range(length):
            self._plan(str(self.random.choice(["conv", *UNARY, *BINARY])))

    def _plan(self, kind: str) -> None:
        count = len(self.channels)
        one = count - 1 if self.random.random() < 0.7 else int(self.random.integers(count))
        width = self.channels[one]
        other = one
        if kind == "conv":
            other = len(self.convs)
            self.convs.append(nn.Conv2d(width, CHANNELS, 3, padding=1))
            width = CHANNELS
        elif kind == "concat":
            other = int(self.random.integers(count))
            width += self.channels[other]
            if width > LARGEST:
                return
        elif kind in BINARY:
            alike = [i for i, size in enumerate(self.channels) if size == width]
            other = int(self.random.choice(alike))
        self.plan.append((kind, one, other))
        self.channels.append(width)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.convs[0](x)]
        for kind, one, other in self.plan:
            if kind == "conv":
                seen.append(self.convs[other](seen[one]))
            elif kind in BINARY:
                seen.append(BINARY[kind](seen[one], seen[other]))
            else:
                seen.append(UNARY[kind](seen[one]))
        return seen[-1]
