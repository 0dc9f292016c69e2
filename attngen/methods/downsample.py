"""Key-value downsampling: every query stays, keys and values come from a coarser grid.

Paper: ToDo, Smith et al. 2024, arXiv 2402.13573 (nearest neighbour; neighbouring tokens are alike at high resolution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.methods._checks import Grid, check_count, check_tokens
from attngen.methods.base import AttentionMethod, LayerShape, Selection


def downsample_tokens(x: Tensor, grid: Grid, factor: int) -> Tensor:
    """Keep one token of each factor x factor cell (nearest to its centre).

    Args:
        x: (B, N, C), row-major.
        grid: (height, width), N = height · width.
        factor: whole number, at least 1.

    Returns:
        (B, max(1, height // factor) · max(1, width // factor), C).

    Raises:
        ValueError: if the tokens do not fill the grid, or for a factor below 1.
    """
    check_tokens(x, grid)
    check_count("factor", factor)
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(image, size=_coarse(grid, factor), mode="nearest-exact").permute(0, 2, 3, 1).flatten(1, 2)


def nearest_positions(grid: Grid, size: Grid, device: torch.device | None = None) -> Tensor:
    """(rows · columns,) the token nearest to the centre of each cell when `grid` is cut into `size` cells."""
    row, column = (
        ((torch.arange(cells, device=device) + 0.5) * (length / cells)).long().clamp(max=length - 1)
        for cells, length in zip(size, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column[None, :]).flatten()


def _coarse(grid: Grid, factor: int) -> Grid:
    return max(1, grid[0] // factor), max(1, grid[1] // factor)


@dataclass(frozen=True)
class DownsampledKV(AttentionMethod):
    """Exact attention over keys and values of a coarser grid: factor² times fewer operations.

    Attributes:
        factor: side of the cell that gives one key; 1 is exact attention. 2 in arXiv 2402.13573.
    """

    factor: int = 2

    kind: ClassVar[str] = "downsampled-kv"

    def __post_init__(self) -> None:
        check_count("factor", self.factor)

    def why_exact(self, grid: Grid) -> str | None:
        if _coarse(grid, self.factor) == tuple(grid):
            return f"a factor of {self.factor} keeps every key on a grid of {grid[0]} x {grid[1]}"
        return None

    def select(self, x: Tensor, metric: Tensor, grid: Grid, draws: Tensor | None) -> Selection:
        positions = nearest_positions(grid, _coarse(grid, self.factor), x.device)
        return Selection(x, downsample_tokens(x, grid, self.factor), key_positions=positions)

    def flops(self, shape: LayerShape) -> int:
        keys = math.prod(_coarse(shape.grid, self.factor))
        return shape.projection_flops(shape.tokens, keys) + shape.core_flops(shape.tokens, keys)
