"""What counts as an array of images."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Images(Protocol):
    """uint8 images ``(N, C, H, W)``: an array, a memory map, or made when asked for."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any:
        """The images at indices ``(M,)`` as an array, or those of a slice without reading them."""
