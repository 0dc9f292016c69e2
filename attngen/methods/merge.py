"""Token merging: similar tokens are averaged before attention and copied back after it.

Papers: Token Merging for Fast Stable Diffusion, Bolya and Hoffman 2023, arXiv 2303.17604 (identical numbers to tomesd
0.1.3); with agents made by a second, stronger merge: arXiv 2312.08874, section 4.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attngen.checks import Grid, check_count, check_fraction, check_number
from attngen.kernels import dispatch
from attngen.kernels.crossovers import Choice
from attngen.methods.agent import agent_flops, scales_for, through_agents
from attngen.methods.base import Attention, AttentionMethod, LayerShape, Selection, with_context
from attngen.methods.matching import TokenMatching, cells_of, match_drawn_tokens, match_tokens, merged_count

__all__ = ["TokenMatching", "TokenMerging", "match_tokens"]


@dataclass(frozen=True)
class TokenMerging(AttentionMethod):
    """Token merging around self-attention, optionally with agents from a second merge (the AgentSD recipe).

    Similarity is measured on the input of the transformer block, as in the papers, where the host can see it.

    Attributes:
        ratio: share of tokens merged away, below 1 - 1 / stride²; above that it is cut to it.
        stride: side of the cell that keeps one destination.
        agent_ratio: share merged away to make agents, or None: exact attention among the merged tokens. Agents are
            used only where twice their number is below the merged tokens'.
        random: draw each cell's destination for every time step from the patch's seed (the same for all layers of a
            step and both halves of guidance); otherwise it is the top-left token.
        broadcast_exponent: see `AgentAttention`; used with agents.
        shortcut: see `AgentAttention`; used with agents.
    """

    ratio: float = 0.5
    stride: int = 2
    agent_ratio: float | None = None
    random: bool = False
    broadcast_exponent: float = 0.3
    shortcut: float = 0.075

    kind: ClassVar[str] = "token-merging"
    needs_metric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        check_count("stride", self.stride)
        if self.agent_ratio is not None:
            check_fraction("agent_ratio", self.agent_ratio)
        if not isinstance(self.random, bool):
            raise ValueError(f"random must be True or False, got {self.random!r}")
        check_number("broadcast_exponent", self.broadcast_exponent)
        check_number("shortcut", self.shortcut)

    @property
    def cell(self) -> Grid:
        return self.stride, self.stride

    def why_exact(self, grid: Grid) -> str | None:
        if self.stride > min(grid):
            return f"cells of {self.stride} x {self.stride} do not fit a grid of {grid[0]} x {grid[1]}"
        if merged_count(grid, self.cell, self.ratio) == 0 and self.num_agents_at(grid) is None:
            return f"a ratio of {self.ratio} merges no token of {math.prod(grid)}"
        return None

    def select(self, x: Tensor, metric: Tensor, grid: Grid, draws: Tensor | None) -> Selection:
        if draws is not None:
            cells = math.prod(cells_of(grid, self.cell))
            draws = draws[:cells] % (self.stride * self.stride)
        with torch.no_grad():
            matching = match_drawn_tokens(metric, grid, self.cell, self.ratio, self.agent_ratio, draws)
        merged, positions = matching.merge(x), matching.positions()
        agents, agent_positions = None, None
        if matching.agents is not None:
            agents, agent_positions = matching.agents(x), matching.positions(matching.num_agent_merged)
        return Selection(merged, merged, agents, matching.unmerge, positions, positions, agent_positions)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: Grid | None,
        agents: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
        attention: Attention,
    ) -> Tensor:
        if agents is None:
            return attention(query, *with_context(key, value, context))
        scales = scales_for(query.shape[-1], self.broadcast_exponent, self.shortcut)
        return through_agents(query, key, value, agents, context, scales, attention)

    def choose_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str
    ) -> Choice | None:
        if agents is None:
            return None
        # Its speed was measured against softmax attention over as many tokens, and here some were merged.
        return dispatch.choose_agent_kernel(query, key, value, agents, kernel=kernel)._replace(speedup=None)

    def num_agents_at(self, grid: Grid) -> int | None:
        if self.agent_ratio is None or self.stride > min(grid):
            return None
        tokens = math.prod(grid)
        agents = tokens - merged_count(grid, self.cell, self.agent_ratio)
        return agents if 2 * agents < tokens - merged_count(grid, self.cell, self.ratio) else None

    def tokens_at(self, grid: Grid) -> int:
        return math.prod(grid) - merged_count(grid, self.cell, self.ratio)

    def flops(self, shape: LayerShape) -> int:
        destinations = math.prod(cells_of(shape.grid, self.cell))
        matching = 2 * (shape.tokens - destinations) * destinations * shape.channels
        tokens, agents = shape.tokens - merged_count(shape.grid, self.cell, self.ratio), self.num_agents_at(shape.grid)
        projections = shape.projection_flops(tokens, tokens)
        if agents is None:
            return projections + matching + shape.core_flops(tokens, tokens)
        return projections + matching + 2 * agents * shape.channels * shape.width + agent_flops(shape, agents, tokens)
