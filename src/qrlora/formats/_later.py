"""Tensors whose shapes are known before their values are there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Later:
    """A tensor that is read or computed when it is asked for, each time anew, and not kept.

    Attributes:
        dtype, shape: of what `get` gives.
        get: gives it, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def had(tensor: Tensor | Later) -> Tensor:
    """The tensor itself."""
    return tensor.get() if isinstance(tensor, Later) else tensor
