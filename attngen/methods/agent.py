"""Agent attention: a few pooled queries stand between the queries and the keys, so cost grows linearly with tokens.

Paper: Agent Attention, Han et al., ECCV 2024, arXiv 2312.08874. The training-free form for Stable Diffusion scales the
second softmax by a power of the usual scale and adds a share of the values, which replaces the learned convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attngen.checks import Grid, check_bias, check_choice, check_count, check_heads, check_number
from attngen.kernels import dispatch
from attngen.kernels.crossovers import Choice
from attngen.kernels.dispatch import AGENT_KERNELS, AUTO
from attngen.kernels.reference import between
from attngen.methods.base import AgentScales, Attention, AttentionMethod, LayerShape, Selection, with_context
from attngen.methods.matching import cells_of, match_drawn_tokens
from attngen.tokens import agent_grid, nearest_positions

AGENTS = ("pooled", "strided", "merged")
CORRECTIONS = (None, "nystrom")


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    shortcut: float = 0.0,
    gain: float = 1.0,
    correction: str | None = None,
    kernel: str = AUTO,
) -> Tensor:
    """gain · softmax(Q Aᵀ · s₂ + B₂) · softmax(A Kᵀ · s₁ + B₁) · V + shortcut · V: 4·M·N·D multiply-adds, not 2·N²·D.

    Equations 3 to 6 of arXiv 2312.08874; with learned biases it is the mediator attention of arXiv 2408.05710.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        agents: (B, H, M, D), usually pooled queries.
        scale: s₁, of the aggregation; D**-0.5 if None.
        broadcast_scale: s₂, of the broadcast; `scale` if None.
        aggregation_bias: B₁, broadcastable to (B, H, M, L).
        broadcast_bias: B₂, broadcastable to (B, H, N, M).
        shortcut: share of `value` added to the output; needs N = L if not zero.
        gain: factor of what comes through the agents; costs nothing.
        correction: "nystrom" puts (1 + r) (softmax(A Aᵀ · s₂) + r)⁻¹ between the softmaxes, r = 0.03: the
            pseudo-inverse of Nyströmformer (arXiv 2102.03902, equation 13), regularised. A query that equals an agent
            then gets (nearly) what that agent read. It takes no biases, and M³ / 3 multiply-adds a head.
        kernel: "auto" takes the path measured to be fastest (see `attngen.kernels.dispatch`); "reference" sums in
            float32 at least, "sdpa" is two fused attention calls, "matmul" rounds its scores to the dtype of the
            inputs, "triton" is one fused pair of kernels for CUDA devices.

    Returns:
        (B, H, N, E) in the dtype of `value`; both softmaxes sum in float32 at least.

    Raises:
        ValueError: for a wrong rank, head size, batch, dtype, bias shape, a shortcut where N differs from L, an unknown
            correction, one with a bias, or a `kernel` that is unknown or cannot run on these tensors.
    """
    check_heads(query, key, value, agents)
    check_choice("correction", correction, CORRECTIONS)
    if correction is not None and (aggregation_bias is not None or broadcast_bias is not None):
        raise ValueError(f"the correction {correction!r} takes no position biases")
    dispatch.check_kernel(kernel, (AUTO, *AGENT_KERNELS))
    num_queries, num_keys, num_agents = query.shape[2], key.shape[2], agents.shape[2]
    check_bias("aggregation_bias", aggregation_bias, (*query.shape[:2], num_agents, num_keys))
    check_bias("broadcast_bias", broadcast_bias, (*query.shape[:2], num_queries, num_agents))
    if shortcut != 0 and num_queries != num_keys:
        raise ValueError(f"a shortcut needs as many queries as values, got {num_queries} queries and {num_keys} values")
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    broadcast_scale = scale if broadcast_scale is None else broadcast_scale
    biases = (aggregation_bias, broadcast_bias)
    choice = dispatch.choose_agent_kernel(query, key, value, agents, biases, kernel, correction)
    if kernel != AUTO and choice.reason is not None:
        raise ValueError(f"the kernel {kernel!r} cannot run here: {choice.reason}")
    return dispatch.agent_attention(
        query,
        key,
        value,
        agents,
        scale,
        broadcast_scale,
        *biases,
        shortcut,
        gain=gain,
        correction=correction,
        kernel=choice.kernel,
    )


@dataclass(frozen=True)
class AgentAttention(AttentionMethod):
    """Training-free agent attention with agents made of the queries on the token grid.

    A layer stays exact where two agent passes would not be cheaper than one exact pass (2 · agents >= tokens).

    Attributes:
        num_agents: most agents a layer uses; arranged on the layer's grid by `agent_grid`.
        broadcast_exponent: the broadcast softmax is scaled by (D**-0.5)**broadcast_exponent; below 1 it is sharper,
            which makes up for the averaging. 0.3 for Stable Diffusion in arXiv 2312.08874.
        shortcut: share of the values added to the output, 0.075 there.
        gain: factor of what comes through the agents, 1 there.
        agents: how they are made: "pooled", the mean query of each cell; "strided", the query of the token nearest to
            the cell's centre; "merged", the query of the mean of similar tokens, one from each cell and those most like
            it from anywhere (the second merge of the paper, of the layer's input).
        correction: None, or "nystrom", see `attngen.functional.agent_attention`.
    """

    num_agents: int = 256
    broadcast_exponent: float = 0.3
    shortcut: float = 0.075
    gain: float = 1.0
    agents: str = "pooled"
    correction: str | None = None

    kind: ClassVar[str] = "agent"

    def __post_init__(self) -> None:
        check_count("num_agents", self.num_agents)
        check_number("broadcast_exponent", self.broadcast_exponent)
        check_number("shortcut", self.shortcut)
        check_number("gain", self.gain)
        check_choice("agents", self.agents, AGENTS)
        check_choice("correction", self.correction, CORRECTIONS)

    def why_exact(self, grid: Grid) -> str | None:
        agents, tokens = math.prod(self._cells(grid)), math.prod(grid)
        return f"{agents} agents are too many for {tokens} tokens" if 2 * agents >= tokens else None

    def pool_size(self, grid: Grid) -> Grid | None:
        return self._cells(grid) if self.agents == "pooled" else None

    def num_agents_at(self, grid: Grid) -> int:
        return math.prod(self._cells(grid))

    def _cells(self, grid: Grid) -> Grid:
        """Rows and columns of the agents, or of what they grow from."""
        cells = agent_grid(self.num_agents, grid)
        return cells if self.agents != "merged" else cells_of(grid, _stride(cells, grid))

    def select(self, x: Tensor, metric: Tensor, grid: Grid, draws: Tensor | None) -> Selection:
        if self.agents == "strided":
            positions = nearest_positions(grid, self._cells(grid), x.device)
            return Selection(x, x, x[:, positions], agent_positions=positions)
        if self.agents == "merged":
            stride = _stride(agent_grid(self.num_agents, grid), grid)
            with torch.no_grad():
                matching = match_drawn_tokens(x, grid, stride, 0.0, None, None)
            matching = replace(matching, num_merged=len(matching.source))
            return Selection(x, x, matching.merge(x), agent_positions=matching.positions())
        return Selection(x, x)

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
        assert agents is not None, "the host pools agents for every method with a pool size"
        return through_agents(query, key, value, agents, context, self._scales(query.shape[-1]), attention)

    def agent_scales(self, head_dim: int) -> AgentScales | None:
        return self._scales(head_dim) if self.agents == "pooled" and self.correction is None else None

    def _scales(self, head_dim: int) -> AgentScales:
        scales = scales_for(head_dim, self.broadcast_exponent, self.shortcut)
        return scales._replace(gain=self.gain, correction=self.correction)

    def to_dict(self) -> dict[str, Any]:
        """Options that later versions brought are left out where they change nothing, so that older ones read it."""
        newer = {"gain": 1.0, "agents": "pooled", "correction": None}
        return {name: v for name, v in super().to_dict().items() if name not in newer or v != newer[name]}

    def choose_kernel(self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor | None, kernel: str) -> Choice:
        assert agents is not None
        choice = dispatch.choose_agent_kernel(query, key, value, agents, kernel=kernel, correction=self.correction)
        # What was measured had nothing between its softmaxes.
        return choice if self.correction is None else choice._replace(speedup=None)

    def flops(self, shape: LayerShape) -> int:
        agents = self.num_agents_at(shape.grid)
        core = shape.projection_flops(shape.tokens, shape.tokens) + agent_flops(shape, agents, shape.tokens)
        return core + self._agents_flops(shape, agents) + self._correction_flops(shape, agents)

    def _agents_flops(self, shape: LayerShape, agents: int) -> int:
        """Making agents that are not pooled: their matching, and their own projection."""
        if self.agents == "pooled":
            return 0
        matching = 2 * (shape.tokens - agents) * agents * shape.channels if self.agents == "merged" else 0
        return matching + 2 * agents * shape.channels * shape.width

    def _correction_flops(self, shape: LayerShape, agents: int) -> int:
        """Similarities of the agents, a factorisation, and a solution for each column of the values."""
        if self.correction is None:
            return 0
        return 4 * agents * agents * shape.width + shape.num_heads * 2 * agents**3 // 3


def _stride(cells: Grid, grid: Grid) -> Grid:
    """(rows, columns) of equal whole cells, no more of them than `cells`."""
    return -(-grid[0] // cells[0]), -(-grid[1] // cells[1])


def scales_for(head_dim: int, broadcast_exponent: float, shortcut: float) -> AgentScales:
    """The training-free form of arXiv 2312.08874: the broadcast is scaled by a power of the usual scale."""
    scale = float(head_dim**-0.5)
    return AgentScales(scale, scale**broadcast_exponent, shortcut)


def through_agents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    context: tuple[Tensor, Tensor] | None,
    scales: AgentScales,
    attention: Attention,
) -> Tensor:
    """`agent_attention` over image and text keys, by attngen's paths or by two calls of `attention`. Shapes as there.

    The shortcut adds image values.
    """
    keys, values = with_context(key, value, context)
    scale, broadcast_scale, shortcut, gain, correction = scales
    if attention.kernel is None:
        aggregated = attention(agents, keys, values, scale=scale)
        aggregated = between(aggregated, agents, broadcast_scale, gain, correction)
        output = attention(query, agents, aggregated, scale=broadcast_scale)
    else:
        fused = shortcut if context is None else 0.0
        output = dispatch.agent_attention(
            query,
            keys,
            values,
            agents,
            scale,
            broadcast_scale,
            shortcut=fused,
            gain=gain,
            correction=correction,
            kernel=attention.kernel,
        )
        shortcut -= fused
    return torch.add(output, value, alpha=shortcut) if shortcut else output


def agent_flops(shape: LayerShape, agents: int, tokens: int) -> int:
    """Aggregation over `tokens` image tokens and the text, broadcast to the image tokens, text queries left exact."""
    keys = tokens + shape.context
    core = 4 * shape.width * (agents * (keys + tokens) + shape.context * keys)
    pooling_and_shortcut = 3 * tokens * shape.width
    return core + pooling_and_shortcut
