"""Similar tokens: the bipartite matching of token merging, for features and for agents.

Papers: Token Merging for Fast Stable Diffusion, Bolya and Hoffman 2023, arXiv 2303.17604 (identical numbers to tomesd
0.1.3); with agents made by a second, stronger merge: arXiv 2312.08874, section 4.4.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attngen.checks import Grid, check_fraction, check_tokens, sides

# Similarities held at once, for one sample: 2^26 float32 values are 256 MiB.
_MAX_SCORES = 2**26


@dataclass(frozen=True, eq=False)
class TokenMatching:
    """Which tokens merge into which: the result of `match_tokens`.

    The merged sequence holds the sources that stay, by falling similarity, then every destination, averaged with the
    sources assigned to it.

    Attributes:
        source: (N - G,) positions of the tokens that may merge, G destinations.
        destination: (G,) positions of the tokens merged into, one of each cell.
        order: (B, N - G) sources from the most to the least similar to their nearest destination.
        nearest: (B, N - G) each source's most similar destination.
        num_merged: sources merged for the features.
        num_agent_merged: sources merged for the agents, or None where agents would not save work.
    """

    source: Tensor
    destination: Tensor
    order: Tensor
    nearest: Tensor
    num_merged: int
    num_agent_merged: int | None

    @property
    def agents(self) -> Callable[[Tensor], Tensor] | None:
        """Function (B, N, C) -> (B, M, C) that merges tokens to agents, or None where 2 · M >= merged tokens."""
        count = self.num_agent_merged
        return None if count is None else lambda x: self._merge(x, count)

    def merge(self, x: Tensor) -> Tensor:
        """Average matching tokens: (B, N, C) -> (B, N - num_merged, C), summed in float32; `x` itself if none merge.

        Raises:
            ValueError: if `x` does not have the matched batch and number of tokens.
        """
        return self._merge(x, self.num_merged)

    def unmerge(self, x: Tensor) -> Tensor:
        """Copy merged tokens back to where they came from: (B, N - num_merged, C) -> (B, N, C).

        Raises:
            ValueError: if `x` does not have the matched batch or the merged number of tokens.
        """
        num_tokens, count = len(self.source) + len(self.destination), self.num_merged
        self._check(x, num_tokens - count)
        if count == 0:
            return x
        positions = torch.cat(
            [
                self.source[self.order[:, count:]],
                self.destination.expand(len(x), -1),
                self.source[self.order[:, :count]],
            ],
            dim=1,
        )
        merged_rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        rows = torch.cat([merged_rows, len(self.source) - count + self._targets(count)], dim=1)
        row_of_position = torch.empty_like(rows).scatter(1, positions, rows)
        return x.gather(1, _rows(row_of_position, x))

    def positions(self, count: int | None = None) -> Tensor:
        """(B, N - count): the token that each merged row represents; a destination represents those merged into it."""
        count = self.num_merged if count is None else count
        if count == 0:
            num_tokens = len(self.source) + len(self.destination)
            return torch.arange(num_tokens, device=self.source.device).expand(len(self.order), -1)
        kept = self.source[self.order[:, count:]]
        return torch.cat([kept, self.destination.expand(len(kept), -1)], dim=1)

    def _targets(self, count: int) -> Tensor:
        """(B, count): the destination of each of the `count` most similar sources."""
        return self.nearest.gather(1, self.order[:, :count])

    def _merge(self, x: Tensor, count: int) -> Tensor:
        self._check(x, len(self.source) + len(self.destination))
        if count == 0:
            return x
        sources, destinations = x[:, self.source], x[:, self.destination]
        kept = sources.gather(1, _rows(self.order[:, count:], x))
        merging = sources.gather(1, _rows(self.order[:, :count], x))
        # Thousands of tokens may meet in one: half precision would overflow or lose them before the division.
        wide = torch.promote_types(x.dtype, torch.float32)
        targets = _rows(self._targets(count), x)
        averaged = destinations.to(wide).scatter_reduce(1, targets, merging.to(wide), reduce="mean")
        return torch.cat([kept, averaged.to(x.dtype)], dim=1)

    def _check(self, x: Tensor, num_tokens: int) -> None:
        if x.ndim != 3 or x.shape[:2] != (len(self.order), num_tokens):
            raise ValueError(
                f"expected tokens of shape ({len(self.order)}, {num_tokens}, channels), got {tuple(x.shape)}"
            )


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """(B, K) positions as an index for gathering whole rows of `x` (B, N, C)."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def match_tokens(
    x: Tensor,
    grid: Grid,
    stride: Grid,
    ratio: float,
    agent_ratio: float | None = None,
    generator: torch.Generator | None = None,
) -> TokenMatching:
    """Match each token to the most similar of a regular subset, one of each cell (section 3.2, arXiv 2303.17604).

    Args:
        x: (B, N, C), the tokens that are compared (by cosine), row-major.
        grid: (height, width) or (frames, height, width), N in all. Tokens beyond the last whole cell are never
            destinations.
        stride: as many sides, of a cell.
        ratio: share of all tokens to merge away; at most those that are not destinations.
        agent_ratio: share merged away to make agents, or None for no agents.
        generator: chooses each cell's destination at random; None takes the top-left token.

    Raises:
        ValueError: if the tokens do not fill the grid, a cell is larger than it, or a ratio is not in [0, 1).
    """
    check_tokens(x, grid)
    cells, draws = cells_of(grid, stride), None
    if generator is not None:
        draws = torch.randint(math.prod(stride), (*cells, 1), generator=generator, device=generator.device)
        draws = draws.to(x.device).flatten()
    return match_drawn_tokens(x, grid, stride, ratio, agent_ratio, draws)


def match_drawn_tokens(
    x: Tensor, grid: Grid, stride: Grid, ratio: float, agent_ratio: float | None, draws: Tensor | None
) -> TokenMatching:
    """`match_tokens` with the draws given: (cells,) whole numbers below the tokens of a cell, or None."""
    check_fraction("ratio", ratio)
    source, destination = _split(grid, stride, draws, x.device)
    num_merged = merged_count(grid, stride, ratio)
    num_agent_merged = None
    if agent_ratio is not None:
        check_fraction("agent_ratio", agent_ratio)
        num_agent_merged = merged_count(grid, stride, agent_ratio)
        if 2 * (x.shape[1] - num_agent_merged) >= x.shape[1] - num_merged:
            num_agent_merged = None
    similarity, nearest = _nearest(x, source, destination)
    order = similarity.argsort(dim=-1, descending=True)
    return TokenMatching(source, destination, order, nearest, num_merged, num_agent_merged)


def merged_count(grid: Grid, stride: Grid, ratio: float) -> int:
    """Tokens that a ratio merges away: at most all that are not destinations."""
    tokens = math.prod(grid)
    return min(tokens - math.prod(cells_of(grid, stride)), int(tokens * ratio))


def cells_of(grid: Grid, stride: Grid) -> Grid:
    """Numbers of whole cells of `stride` tokens along the axes of a grid; raises ValueError where there is none."""
    if len(stride) != len(grid) or min(stride) < 1 or any(map(operator.gt, stride, grid)):
        raise ValueError(f"cells of {sides(stride)} do not fit a grid of {sides(grid)}")
    return tuple(length // side for length, side in zip(grid, stride, strict=True))


def _split(grid: Grid, stride: Grid, draws: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the sources and of the destinations."""
    cells = cells_of(grid, stride)
    number = math.prod(cells)
    if draws is None:
        draws = torch.zeros(number, dtype=torch.long, device=device)
    draws = draws.to(device).view(cells)
    chosen = torch.zeros((), dtype=torch.long, device=device)
    for axis, (length, side, count) in enumerate(zip(grid, stride, cells, strict=True)):
        offset = draws // math.prod(stride[axis + 1 :]) % side
        first = torch.arange(count, device=device) * side
        chosen = chosen * length + first.view(-1, *[1] * (len(grid) - 1 - axis)) + offset
    flags = torch.zeros(math.prod(grid), dtype=torch.long, device=device).index_fill(0, chosen.flatten(), -1)
    # Sorting the flags lists the destinations, then the sources, without a data-dependent size. The published code
    # leaves the order among equals to the sort; the same call gives the same rows. Attention ignores the order.
    positions = flags.argsort()
    return positions[number:], positions[:number]


def _nearest(x: Tensor, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity and index of each source's most similar destination: both (B, N - G)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # A zero token has no direction; left at zero it is equally far from all.
    unit = (wide / norm.where(norm > 0, 1)).to(x.dtype)
    sources, destinations = unit[:, source], unit[:, destination].transpose(-1, -2)
    chunk = max(1, _MAX_SCORES // destinations.shape[-1])
    best = [(part @ destinations).max(dim=-1) for part in sources.split(chunk, dim=1)]
    if not best:
        empty = x.new_zeros(len(x), 0)
        return empty, empty.long()
    return torch.cat([b.values for b in best], dim=1), torch.cat([b.indices for b in best], dim=1)
