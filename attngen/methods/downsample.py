"""Key-value downsampling: every query stays, keys and values come from a coarser grid.

Paper: ToDo, Smith et al. 2024, arXiv 2402.13573 (nearest neighbour; neighbouring tokens are alike at high resolution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attngen.checks import Grid, check_count
from attngen.methods.base import AttentionMethod, LayerShape, Selection
from attngen.tokens import coarse_grid, downsample_tokens, nearest_positions


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
        if coarse_grid(grid, self.factor) == tuple(grid):
            return f"a factor of {self.factor} keeps every key on a grid of {grid[0]} x {grid[1]}"
        return None

    def select(self, x: Tensor, metric: Tensor, grid: Grid, draws: Tensor | None) -> Selection:
        positions = nearest_positions(grid, coarse_grid(grid, self.factor), x.device)
        return Selection(x, downsample_tokens(x, grid, self.factor), key_positions=positions)

    def flops(self, shape: LayerShape) -> int:
        keys = math.prod(coarse_grid(shape.grid, self.factor))
        return shape.projection_flops(shape.tokens, keys) + shape.core_flops(shape.tokens, keys)
