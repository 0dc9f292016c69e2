"""A description of a tensor: all that the choice of a kernel depends on, so that a report computes nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Like(NamedTuple):
    """Shape, dtype, device and gradient of a tensor; has the attributes of one that the choice of a kernel reads.

    Attributes:
        shape: sizes.
        dtype: of the numbers.
        device: where they are.
        requires_grad: whether a gradient will flow through it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def of(cls, x: Tensor, trains: bool = False) -> Like:
        """The description of `x`; `trains` where weights that `x` meets have a gradient."""
        return cls(tuple(x.shape), x.dtype, x.device, torch.is_grad_enabled() and (x.requires_grad or trains))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def sized(self, *shape: int) -> Like:
        """The same with another shape."""
        return Like(shape, self.dtype, self.device, self.requires_grad)
