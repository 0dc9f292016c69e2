"""How a grid is cut into tiles of near-equal sides, and back.

`Tiles.cut` puts the tokens of each tile next to each other, so that a tile is a few contiguous rows.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.checks import Grid
from attngen.tokens import Tensors, flat_positions, made_once


@dataclass(frozen=True)
class Tiles:
    """How a grid is cut into tiles: an axis of length l into c parts, token y belongs to part floor(y · c / l).

    Attributes:
        grid: of the tokens.
        cells: tiles along each axis.
        side: of the largest tile.
    """

    grid: Grid
    cells: Grid
    side: Grid

    @classmethod
    def of(cls, grid: Grid, side: Grid) -> Tiles:
        """As few tiles as there can be with sides of at most `side`."""
        cells = tuple(-(-length // min(each, length)) for each, length in zip(side, grid, strict=True))
        return cls(grid, cells, tuple(-(-length // each) for each, length in zip(cells, grid, strict=True)))

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(self.cells)

    @property
    def slots(self) -> int:
        """Tokens of the largest tile."""
        return math.prod(self.side)

    @property
    def even(self) -> bool:
        """Whether all tiles have as many tokens."""
        return self.count * self.slots == math.prod(self.grid)

    def cut(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, H, N, C) -> (B · H, count, slots, C), in `out` where given; an empty slot repeats a token of its tile."""
        if not self.even:
            cut = x.index_select(2, self._index(x.device)[0]).flatten(0, 1).unflatten(1, (self.count, self.slots))
            return cut if out is None else out.copy_(cut)
        axes = len(self.grid)
        image = x.unflatten(2, [size for pair in zip(self.cells, self.side, strict=True) for size in pair])
        image = image.permute(0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 2 + 2 * axes)
        if out is None:
            return image.reshape(-1, self.count, self.slots, x.shape[-1])
        out.view(image.shape).copy_(image)
        return out

    def table(self, x: Tensor, text: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows for `gathered_attention`: the slots of all tiles, a mean for each, and a text.

        Args:
            x: (B, H, N, C).
            text: (B, H, T, C).
            width: channels of a row, at least C; zeros beyond C.

        Returns:
            (B · H, count · slots + count + T, width), what `cut` returns, and (B · H, count, C) means in float32 at
            least.
        """
        slots, size = self.count * self.slots, x.shape[3]
        if torch.is_grad_enabled() and x.requires_grad:
            cut = self.cut(x)
            means = self.means(cut)
            table = torch.cat([cut.flatten(1, 2), means.to(x.dtype), text.flatten(0, 1)], dim=1)
            return F.pad(table, (0, width - size)), cut, means
        # Written in place: at thousands of tokens a copy costs as much as the choice of the tiles.
        table = x.new_empty(x.shape[0] * x.shape[1], slots + self.count + text.shape[2], width)
        table[..., size:] = 0
        cut = self.cut(x, table[:, :slots, :size].unflatten(1, (self.count, self.slots)))
        means = self.means(cut)
        table[:, slots : slots + self.count, :size] = means
        table[:, slots + self.count :, :size] = text.flatten(0, 1)
        return table, cut, means

    def join(self, x: Tensor, batch: int) -> Tensor:
        """What `cut` returned, back to (B, H, N, C)."""
        if not self.even:
            return x.flatten(1, 2).index_select(1, self._index(x.device)[1]).unflatten(0, (batch, -1))
        axes = len(self.grid)
        image = x.reshape(batch, -1, *self.cells, *self.side, x.shape[-1])
        order = [axis for pair in zip(range(2, 2 + axes), range(2 + axes, 2 + 2 * axes), strict=True) for axis in pair]
        return image.permute(0, 1, *order, 2 + 2 * axes).flatten(2, -2)

    def filled(self, device: torch.device) -> Tensor:
        """(count, slots) whether a slot has a token of its own."""
        return self._index(device)[2]

    def tokens(self, device: torch.device) -> Tensor:
        """(count,) float64 number of tokens of each tile."""
        return self.filled(device).sum(1, dtype=torch.float64)

    def means(self, cut: Tensor, squares: bool = False) -> Tensor:
        """(G, count, C) means over the tokens of each tile of (G, count, slots, C), in float32 at least."""
        wide = torch.promote_types(cut.dtype, torch.float32)
        if squares:
            cut = cut.to(wide).square()
        if self.even:
            return cut.mean(2, dtype=wide)
        weight = (self.filled(cut.device) / self.tokens(cut.device)[:, None]).to(wide)
        return (weight[:, None] @ cut.to(wide)).squeeze(2)

    def _index(self, device: torch.device) -> Tensors:
        return _slots(self.grid, self.cells, self.side, device=device)


@made_once
def _slots(grid: Grid, cells: Grid, side: Grid) -> Tensors:
    """(count · slots,) the token of each slot, (N,) the slot of each token, (count, slots) which slots are filled."""
    axes, tiles, within, filled = [], [], [], torch.ones((), dtype=torch.bool)
    for length, count, most in zip(grid, cells, side, strict=True):
        edge = (torch.arange(count + 1) * length + count - 1) // count  # first token of each part
        place = edge[:-1, None] + torch.arange(most)
        axes.append(place.minimum(edge[1:, None] - 1))
        filled = filled[..., None, None] & (place < edge[1:, None])
        part = torch.arange(length) * count // length
        tiles.append(part)
        within.append(torch.arange(length) - edge[part])
    position = axes[0]
    for place, length in zip(axes[1:], grid[1:], strict=True):
        position = position[..., None, None] * length + place
    tiles_first = (*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2))
    position, filled = (x.permute(tiles_first).flatten() for x in (position, filled))
    slot = flat_positions(tiles, cells) * math.prod(side) + flat_positions(within, side)
    return position, slot.flatten(), filled.view(math.prod(cells), math.prod(side))
