"""Focal attention: exact to nearby tokens, to means of cells farther away, so cost grows linearly with tokens.

Paper: Focal Self-attention, Yang et al. 2021, arXiv 2107.00641, section 3.1. Its cells are pooled by learned weights;
here they are plain means, weighted by the number of their tokens, which needs no training.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.checks import Grid, check_heads, check_image, sides
from attngen.kernels.gathered import NOTHING, gathered_attention, gathered_by
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route, exact
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option
from attngen.methods.tiling import Tiles
from attngen.tokens import Tensors, agent_grid, join_heads, made_once

_ROTATED_CELL = 8
"""Tokens along a side of a cell whose mean of rotated keys still stands for them; docs/methods.md has the errors."""


def focal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    *,
    window: int = 8,
    margin: int = 4,
    num_cells: int = 64,
    context: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    frames: int = 1,
    margin_frames: int = 1,
) -> Tensor:
    """Softmax attention of each window of queries to near keys exactly and to all others as means of cells.

    The grid is cut into windows of `window` x `window` queries. A window's region reaches `margin` tokens beyond it on
    each side; at the border of the grid it is moved inwards, so that all regions have one size. The grid is also cut
    into `num_cells` cells. Of a query's logits, those of its region are q · k · s, and a cell with n > 0 tokens outside
    the region adds one of q · mean(k) · s + log n with the value mean(v), both means over the whole cell.

    Args:
        query: (B, H, N, D), image tokens in row-major order.
        key: (B, H, N, D).
        value: (B, H, N, E).
        grid: (height, width) or (frames, height, width), N in all.
        window: side of a window, in tokens.
        margin: tokens beyond the window on each side, at least 0.
        num_cells: most cells, arranged by `agent_grid`.
        context: keys and values (B, H, T, ·) that every query attends to exactly, such as those of a text.
        scale: s; D**-0.5 if None.
        frames: of a video, in a window.
        margin_frames: frames beyond the window on each side, at least 0.

    Returns:
        (B, H, N, E) in the dtype of `value`.

    Raises:
        ValueError: for a wrong rank, head size, batch or dtype, tokens that do not fill the grid, a count below 1, or a
            scale of 0.
    """
    check_heads(query, key, value)
    if context is not None:
        check_heads(query, *context)
    if scale == 0:
        raise ValueError("scale must not be 0, because the weight of a cell is a part of its logits")
    check_image(query, key, grid)
    FocalAttention(window, margin, num_cells, frames, margin_frames)  # checks the options
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    regions = _Regions(grid, window, margin, num_cells, frames, margin_frames)
    return regions.attend(query, key, value, context, scale)


class _Regions:
    """How a grid is cut: windows of queries, the region of keys of each, and cells, in numbers by axis.

    Attributes:
        grid: tokens.
        window: sides of a window.
        windows: number of windows; the last of an axis may reach beyond the grid.
        region: sides of a region.
        cells: number of cells.
    """

    def __init__(
        self, grid: Grid, window: int, margin: int, num_cells: int, frames: int = 1, margin_frames: int = 1
    ) -> None:
        in_time = len(grid) - 2
        wanted, margins = (frames,) * in_time + (window,) * 2, (margin_frames,) * in_time + (margin,) * 2
        self.grid = grid
        self.window = tuple(map(min, wanted, grid))
        self.windows = tuple(-(-length // side) for length, side in zip(grid, self.window, strict=True))
        reach = (side + 2 * extra for side, extra in zip(self.window, margins, strict=True))
        self.region = tuple(map(min, reach, grid))
        self.cells = agent_grid(num_cells, grid)
        self._margins = margins

    @property
    def num_keys(self) -> int:
        """Keys of a query."""
        return math.prod(self.region) + math.prod(self.cells)

    @property
    def num_queries(self) -> int:
        """Queries of all windows, with those beyond the grid."""
        return math.prod(self.windows) * math.prod(self.window)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: tuple[Tensor, Tensor] | None,
        scale: float,
        attention: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """See `focal_attention`; by `attention`, which needs to support neither biases nor masks, where that is given.

        Without it by fused attention, on a CPU over chunks of gathered keys.
        """
        text_key, text_value = context or (None, None)
        texts = 0 if text_key is None else text_key.shape[2]
        rows, outside = _rows(
            self.grid, self.window, self.windows, self.region, self._margins, self.cells, texts, device=query.device
        )
        bias = outside.log().clamp_min(NOTHING)
        tables = self._table(key, text_key), self._table(value, text_value)
        if attention is None and query.device.type == "cpu":
            mixed = gathered_attention(self._cut(query), *tables, rows, bias, scale)
        else:
            run = attention or F.scaled_dot_product_attention
            mixed = gathered_by(run, self._cut(query), *tables, rows, bias, scale)
        return self._join(mixed, len(query))

    # Windows of queries

    @property
    def _tiles(self) -> Tiles:
        """The windows, as tiles of a grid that they fill."""
        filled = tuple(count * side for count, side in zip(self.windows, self.window, strict=True))
        return Tiles(filled, self.windows, self.window)

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B · H, windows, tokens of a window, D), zeros beyond the grid."""
        beyond = [filled - length for filled, length in zip(self._tiles.grid, self.grid, strict=True)]
        if any(beyond):
            sizes = [size for pair in zip([0] * len(beyond), reversed(beyond), strict=True) for size in pair]
            x = F.pad(x.unflatten(2, self.grid), (0, 0, *sizes)).flatten(2, -2)
        return self._tiles.cut(x)

    def _join(self, x: Tensor, batch: int) -> Tensor:
        """The result of `_cut`, back to (B, H, N, D)."""
        joined = self._tiles.join(x, batch)
        if self._tiles.grid == self.grid:
            return joined
        image = joined.unflatten(2, self._tiles.grid)
        for axis, length in enumerate(self.grid):
            image = image.narrow(2 + axis, 0, length)
        return image.flatten(2, -2)

    # Keys

    def _table(self, x: Tensor, text: Tensor | None) -> Tensor:
        """(B, H, N, D) -> (B · H, rows, D): the tokens, the means of all cells, and the text."""
        tokens = x.flatten(0, 1)
        parts = [tokens, self._means(tokens.unflatten(1, self.grid))]
        return torch.cat(parts if text is None else [*parts, text.flatten(0, 1)], dim=1)

    def _means(self, image: Tensor) -> Tensor:
        """(B · H, …grid, D) -> (B · H, cells, D), by products, which sum in one order on every device."""
        exact = torch.promote_types(image.dtype, torch.float32)
        for axis, (length, cells) in enumerate(zip(self.grid, self.cells, strict=True)):
            (members,) = _members(length, cells, device=image.device)
            weight = (members / members.sum(1, keepdim=True)).to(exact).to(image.dtype)
            rest = image.shape[2 + axis :]
            image = (weight @ image.flatten(2 + axis)).unflatten(-1, rest)
        return image.flatten(1, -2)


@made_once
def _members(length: int, cells: int) -> Tensors:
    """(cells, length) 1 where a token of an axis belongs to a cell; each belongs to one."""
    cell = torch.arange(length) * cells // length
    return ((cell == torch.arange(cells)[:, None]).double(),)


@made_once
def _rows(grid: Grid, window: Grid, windows: Grid, region: Grid, margins: Grid, cells: Grid, texts: int) -> Tensors:
    """Rows of the table of keys for each window, and how many tokens each stands for outside of the region.

    Returns:
        (1, windows, L) whole numbers: the tokens of the region, all cells, all texts; and (1, windows, L), 1 but for
        cells.
    """
    near, within, size = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1).double(), torch.ones(1).double()
    axes = zip(grid, window, windows, region, margins, cells, strict=True)
    for length, side, count, reach, margin, parts in axes:
        first = (torch.arange(count) * side - margin).clamp(0, length - reach)
        position = first[:, None] + torch.arange(reach)  # (windows, region) of this axis
        cell = torch.arange(length) * parts // length
        members = (cell == torch.arange(parts)[:, None]).double()
        inside = members[:, position].sum(-1).T  # (windows, cells) of this axis
        near = (near[:, None, :, None] * length + position[None, :, None, :]).flatten(2).flatten(0, 1)
        within = (within[:, None, :, None] * inside[None, :, None, :]).flatten(2).flatten(0, 1)
        size = (size[:, None] * members.sum(1)).flatten()
    others = torch.arange(math.prod(grid), math.prod(grid) + len(size) + texts)
    rows = torch.cat([near, others.expand(len(near), -1)], dim=1)
    ones = torch.ones_like(near, dtype=torch.float64), torch.ones(len(near), texts).double()
    return rows[None], torch.cat([ones[0], size - within, ones[1]], dim=1)[None]


@dataclass(frozen=True)
class FocalAttention(AttentionMethod):
    """Each window of queries attends to the tokens around it exactly, and to the rest as means of cells.

    A layer stays exact where a region and the cells together are no fewer keys than the tokens. See `focal_attention`.

    Attributes:
        window: side of a window of queries that share their keys, in tokens of the layer.
        margin: tokens beyond the window that they attend to exactly, on each side.
        num_cells: largest number of cells for the rest.
        frames: of a video, in a window.
        margin_frames: frames beyond the window that it attends to exactly, on each side.
    """

    window: int = option(8, "side of a window of queries that share their keys, in tokens", low=1, high=64)
    margin: int = option(4, "tokens around the window that are attended to exactly", high=64)
    num_cells: int = option(64, "largest number of cells for the rest", low=1, high=4096)
    frames: int = option(1, "frames in a window, in videos", low=1, high=64)
    margin_frames: int = option(1, "frames around the window that are attended to exactly, in videos", high=64)

    kind: ClassVar[str] = "focal"
    title: ClassVar[str] = "Near exactly, far in cells"
    source: ClassVar[str] = "arXiv 2107.00641"
    presets: ClassVar[Mapping[str, Preset]] = {"focal": Preset(min_tokens=1024)}
    candidates: ClassVar[tuple[Mapping[str, int], ...]] = (
        *({"window": 8, "margin": 4, "num_cells": count} for count in (64, 256)),
        *({"window": 4, "margin": 2, "num_cells": count} for count in (16, 64, 256)),
        {"window": 4, "margin": 4, "num_cells": 64},
        {"window": 4, "margin": 1, "num_cells": 16},
    )

    @property
    def label(self) -> str:
        return f"focal {self.window}+{self.margin} {self.num_cells}"

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        regions, tokens = self._regions(grid), math.prod(grid)
        if regions.num_queries * regions.num_keys < tokens * tokens:
            return None
        cells = math.prod(regions.cells)
        return f"a region of {sides(regions.region)} and {cells} cells are no fewer keys than {tokens} tokens"

    def _regions(self, grid: Grid) -> _Regions:
        return _Regions(grid, self.window, self.margin, self.num_cells, self.frames, self.margin_frames)

    def why_not_rotated(self, grid: Grid) -> str | None:
        """Why this does not fit keys that were rotated by position on `grid`, or None where it does."""
        cells = self._regions(grid).cells
        sizes = tuple(-(-length // count) for length, count in zip(grid, cells, strict=True))
        if max(sizes) <= _ROTATED_CELL:
            return None
        enough = math.prod(-(-length // _ROTATED_CELL) for length in grid)
        return (
            f"means of rotated keys need cells of at most {_ROTATED_CELL} tokens a side: num_cells of {enough} or more"
        )

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        if why is None and layer.rotary:
            why = self.why_not_rotated(call.grid)
        return exact(why) if why is not None else Route(self._run, layer.attention.name)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call) -> Tensor:
        query, key, value = layer.project(Selection(hidden_states, hidden_states))
        attention = layer.attention if layer.kernel is None else None
        scale = float(layer.head_dim**-0.5)
        mixed = self._regions(call.grid).attend(query, key, value, layer.context, scale, attention)
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        regions = self._regions(shape.grid)
        core = 4 * shape.width * regions.num_queries * (regions.num_keys + shape.context)
        text = 4 * shape.width * shape.context * (shape.tokens + shape.context)
        means, sizes = 0, list(shape.grid)
        for axis, cells in enumerate(regions.cells):
            means += 4 * shape.width * cells * math.prod(sizes)
            sizes[axis] = cells
        return shape.projection_flops(shape.tokens, shape.tokens) + core + text + means
