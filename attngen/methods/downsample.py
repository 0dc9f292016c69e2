"""Key-value downsampling: every query stays, keys and values come from a coarser grid.

Paper: ToDo, Smith et al. 2024, arXiv 2402.13573 (nearest neighbour; neighbouring tokens are alike at high resolution).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attngen.checks import Grid, sides
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route, exact
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option, with_context
from attngen.tokens import coarse_grid, downsample_tokens, join_heads, nearest_positions


@dataclass(frozen=True)
class DownsampledKV(AttentionMethod):
    """Keys and values come from a coarser grid, every query stays: factor² times fewer operations in the products.

    Attributes:
        factor: side of the cell that gives one key; 1 is exact attention. 2 in arXiv 2402.13573.
        frames: of a video, how many frames give one; 1 keeps the keys of every frame.
    """

    factor: int = option(2, "side of the cell of tokens that gives one key", low=1, high=16, shown=True)
    frames: int = option(1, "frames that give one, in videos", low=1, high=16)

    kind: ClassVar[str] = "downsampled-kv"
    title: ClassVar[str] = "Downsampled keys and values"
    short: ClassVar[str] = "kv"
    source: ClassVar[str] = "arXiv 2402.13573"
    presets: ClassVar[Mapping[str, Preset]] = {"todo": Preset(max_levels=1)}
    candidates: ClassVar[tuple[Mapping[str, int], ...]] = ({"factor": 2},)

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        if self._coarse(grid) == tuple(grid):
            return f"a factor of {self.factor} keeps every key on a grid of {sides(grid)}"
        return None

    def _coarse(self, grid: Grid) -> Grid:
        return coarse_grid(grid, self.factor, self.frames)

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        return exact(why) if why is not None else Route(self._run, layer.attention.name)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call) -> Tensor:
        keys = downsample_tokens(hidden_states, call.grid, self.factor, self.frames)
        positions = nearest_positions(call.grid, self._coarse(call.grid), hidden_states.device)
        query, key, value = layer.project(Selection(hidden_states, keys, key_positions=positions))
        mixed = layer.attention(query, *with_context(key, value, layer.context))
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        keys = math.prod(self._coarse(shape.grid))
        return shape.projection_flops(shape.tokens, keys) + shape.core_flops(shape.tokens, keys)
