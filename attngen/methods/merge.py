"""Token merging: similar tokens are averaged before attention and copied back after it.

Papers: Token Merging for Fast Stable Diffusion, Bolya and Hoffman 2023, arXiv 2303.17604 (identical numbers to tomesd
0.1.3); with agents made by a second, stronger merge: arXiv 2312.08874, section 4.4. The matching is in
`attngen.methods.matching`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from attngen.checks import Grid, sides
from attngen.kernels import dispatch
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route, exact
from attngen.methods.agent import agent_flops, scales_for, through_agents
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option, with_context
from attngen.methods.matching import cells_of, match_drawn_tokens, merged_count
from attngen.tokens import join_heads


@dataclass(frozen=True)
class TokenMerging(AttentionMethod):
    """Similar tokens are merged before attention and copied back after it, optionally with agents from a second merge.

    Similarity is measured on the input of the transformer block, as in the papers, where the host passes it on.

    Attributes:
        ratio: share of tokens merged away, below 1 - 1 / stride²; above that it is cut to it.
        stride: side of the cell that keeps one destination.
        agent_ratio: share merged away to make agents (the AgentSD recipe), or None: exact attention among the merged
            tokens. Agents are used only where twice their number is below the merged tokens'.
        random: choose each cell's destination at random for every timestep, by the patch's seed (the same for all
            layers of a step and both halves of guidance); otherwise it is the top-left token.
        broadcast_exponent: see `AgentAttention`; used with agents.
        shortcut: see `AgentAttention`; used with agents.
    """

    ratio: float = option(0.5, "share of tokens merged away", below=1, high=0.9, step=0.05, shown=True)
    stride: int = option(2, "side of the cell that keeps one token", low=1, high=8)
    agent_ratio: float | None = option(None, "share merged away to make agents", below=1, high=0.99, step=0.01)
    random: bool = option(False, "choose each cell's kept token at random for every timestep")
    broadcast_exponent: float = option(0.3, "power of the usual scale in the agents' broadcast", high=2, step=0.05)
    shortcut: float = option(0.075, "share of the values added where there are agents", step=0.005)

    kind: ClassVar[str] = "token-merging"
    title: ClassVar[str] = "Token merging"
    short: ClassVar[str] = "merge"
    source: ClassVar[str] = "arXiv 2303.17604"
    # tomesd 0.1.3's defaults without its random choice: each cell's destination is its top-left token.
    presets: ClassVar[Mapping[str, Preset]] = {"tome": Preset(max_levels=1)}
    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = ({"ratio": 0.5, "stride": 2}, {"ratio": 0.75, "stride": 4})
    needs_metric: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = True

    @property
    def needs_draws(self) -> bool:
        return self.random

    def _cell(self, grid: Grid) -> Grid:
        """Sides of a cell; one frame of a video."""
        return *(1,) * (len(grid) - 2), self.stride, self.stride

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        if self.stride > min(grid[-2:]):
            return f"cells of {self.stride} x {self.stride} do not fit a grid of {sides(grid)}"
        if merged_count(grid, self._cell(grid), self.ratio) == 0 and self.agents_at(grid) is None:
            return f"a ratio of {self.ratio} merges no token of {math.prod(grid)}"
        return None

    def agents_at(self, grid: Grid) -> int | None:
        """Number of agents on `grid`, or None where there are none."""
        if self.agent_ratio is None or self.stride > min(grid[-2:]):
            return None
        tokens = math.prod(grid)
        agents = tokens - merged_count(grid, self._cell(grid), self.agent_ratio)
        return agents if 2 * agents < tokens - merged_count(grid, self._cell(grid), self.ratio) else None

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        if why is not None:
            return exact(why)
        agents = self.agents_at(call.grid)
        if agents is None or layer.kernel is None:
            return Route(partial(self._run, kernel=None), layer.attention.name, None, agents)
        merged = like.shape[1] - merged_count(call.grid, self._cell(call.grid), self.ratio)
        queries = like.sized(like.shape[0], layer.heads, merged, layer.head_dim)
        keys = like.sized(like.shape[0], layer.heads, merged + layer.context_tokens, layer.head_dim)
        pooled = like.sized(like.shape[0], layer.heads, agents, layer.head_dim)
        choice = dispatch.choose_agent_kernel(queries, keys, keys, pooled, kernel=layer.kernel)
        # No speedup: measurements compare with softmax attention over as many tokens, and here some were merged.
        return Route(partial(self._run, kernel=choice.kernel), choice.kernel, choice.reason, agents)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call, *, kernel: str | None) -> Tensor:
        selection = self.select(hidden_states, call)
        query, key, value = layer.project(selection)
        if selection.agents is None:
            mixed = layer.attention(query, *with_context(key, value, layer.context))
        else:
            scales = scales_for(layer.head_dim, self.broadcast_exponent, self.shortcut)
            agents = layer.project_queries(selection.agents, selection.agent_positions)
            mixed = through_agents(layer, query, key, value, agents, scales, kernel)
        assert selection.restore is not None
        return selection.restore(layer.output(join_heads(mixed).to(query.dtype)))

    def select(self, x: Tensor, call: Call) -> Selection:
        """The merged tokens of a layer's input (B, N, C), matched on `call.metric` where there is one."""
        draws = call.draws
        if draws is not None:
            cells = math.prod(cells_of(call.grid, self._cell(call.grid)))
            draws = draws[:cells] % (self.stride * self.stride)
        metric = x if call.metric is None else call.metric
        with torch.no_grad():
            matching = match_drawn_tokens(metric, call.grid, self._cell(call.grid), self.ratio, self.agent_ratio, draws)
        merged, positions = matching.merge(x), matching.positions()
        agents, agent_positions = None, None
        if matching.agents is not None:
            agents, agent_positions = matching.agents(x), matching.positions(matching.num_agent_merged)
        return Selection(merged, merged, agents, matching.unmerge, positions, positions, agent_positions)

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        cell = self._cell(shape.grid)
        destinations = math.prod(cells_of(shape.grid, cell))
        matching = 2 * (shape.tokens - destinations) * destinations * shape.channels
        tokens, agents = (
            shape.tokens - merged_count(shape.grid, self._cell(shape.grid), self.ratio),
            self.agents_at(shape.grid),
        )
        projections = shape.projection_flops(tokens, tokens)
        if agents is None:
            return projections + matching + shape.core_flops(tokens, tokens)
        return projections + matching + 2 * agents * shape.channels * shape.width + agent_flops(shape, agents, tokens)
