"""Agent attention: queries read the keys through a few pooled queries, so cost grows linearly with tokens.

Paper: Agent Attention, Han et al., ECCV 2024, arXiv 2312.08874. The training-free form for Stable Diffusion scales the
second softmax by a power of the usual scale and adds a share of the values, which replaces the learned convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from attngen.checks import Grid, check_bias, check_choice, check_heads
from attngen.kernels import dispatch
from attngen.kernels.dispatch import AGENT_KERNELS, AUTO, CHOOSING, Kernel
from attngen.kernels.like import Like
from attngen.kernels.reference import AgentScales, between
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import AbsorbedSize, Agents, Route, agent_route, exact
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option, with_context
from attngen.methods.matching import cells_of, match_drawn_tokens
from attngen.tokens import agent_grid, join_heads

Correction = Literal["nystrom"]


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
    correction: Correction | None = None,
    kernel: Kernel = AUTO,
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
        gain: factor of the output of the agents; costs nothing.
        correction: "nystrom" puts (1 + r) (softmax(A Aᵀ · s₂) + r)⁻¹ between the softmaxes, r = 0.03: the
            pseudo-inverse of Nyströmformer (arXiv 2102.03902, equation 13), regularised. A query that equals an agent
            then receives (nearly) that agent's value. It takes no biases, and costs M³ / 3 multiply-adds a head.
        kernel: "auto" uses the one measured to be fastest (see `attngen.kernels.dispatch`); "reference" sums in
            float32 at least, "sdpa" is two fused attention calls, "matmul" rounds its scores to the dtype of the
            inputs, "triton" is one fused pair of kernels for CUDA devices.

    Returns:
        (B, H, N, E) in the dtype of `value`; both softmaxes sum in float32 at least.

    Raises:
        ValueError: for a wrong rank, head size, batch, dtype, bias shape, a shortcut where N differs from L, an unknown
            correction, one with a bias, or a `kernel` that is unknown or cannot run on these tensors.
    """
    check_heads(query, key, value, agents)
    check_choice("correction", correction, (None, *get_args(Correction)))
    if correction is not None and (aggregation_bias is not None or broadcast_bias is not None):
        raise ValueError(f"the correction {correction!r} takes no position biases")
    dispatch.check_kernel(kernel, (*CHOOSING, *AGENT_KERNELS))
    num_queries, num_keys, num_agents = query.shape[2], key.shape[2], agents.shape[2]
    check_bias("aggregation_bias", aggregation_bias, (*query.shape[:2], num_agents, num_keys))
    check_bias("broadcast_bias", broadcast_bias, (*query.shape[:2], num_queries, num_agents))
    if shortcut != 0 and num_queries != num_keys:
        raise ValueError(f"a shortcut needs as many queries as values, got {num_queries} queries and {num_keys} values")
    scale, biases = float(query.shape[-1] ** -0.5) if scale is None else scale, (aggregation_bias, broadcast_bias)
    choice = dispatch.choose_agent_kernel(query, key, value, agents, biases, kernel, correction)
    if kernel not in CHOOSING and choice.reason is not None:
        raise ValueError(f"the kernel {kernel!r} cannot run here: {choice.reason}")
    scales = AgentScales(scale, scale if broadcast_scale is None else broadcast_scale, shortcut, gain, correction)
    return dispatch.agent_attention(query, key, value, agents, scales, biases, kernel=choice.kernel)


@dataclass(frozen=True)
class AgentAttention(AttentionMethod):
    """A few agents, made of the queries, read all keys, and the queries read the agents.

    A layer stays exact where two agent passes would not be cheaper than one exact pass (2 · agents >= tokens).

    Attributes:
        num_agents: most agents a layer uses; arranged on the layer's grid by `agent_grid`.
        broadcast_exponent: the broadcast softmax is scaled by (D**-0.5)**broadcast_exponent; below 1 it is sharper,
            which makes up for the averaging. 0.3 for Stable Diffusion in arXiv 2312.08874.
        shortcut: share of the values added to the output, 0.075 there.
        gain: factor of the output of the agents, 1 there.
        agents: how they are made: "pooled", the mean query of each cell; "merged", the query of the mean of similar
            tokens, one from each cell and those most similar to it from anywhere (the second merge of the paper, of
            the layer's input).
        correction: None, or "nystrom", see `attngen.functional.agent_attention`.
        frames: of a video, most frames that an agent's cell covers; None for cells about as many frames long as they
            are tokens wide.
    """

    num_agents: int = option(256, "most agents a layer uses", low=1, high=4096, shown=True)
    broadcast_exponent: float = option(
        0.3, "power of the usual scale in the broadcast; lower is sharper", high=2, step=0.05
    )
    shortcut: float = option(0.075, "share of the values added to the output", step=0.005)
    gain: float = option(1.0, "factor of what comes through the agents", high=2, step=0.05)
    agents: Literal["pooled", "merged"] = option("pooled", "mean query of each cell, or of similar tokens")
    correction: Correction | None = option(None, "matrix applied between the two softmaxes")
    frames: int | None = option(None, "most frames in an agent's cell, in videos", low=1, high=64)

    kind: ClassVar[str] = "agent"
    title: ClassVar[str] = "Agents"
    source: ClassVar[str] = "arXiv 2312.08874"
    presets: ClassVar[Mapping[str, Preset]] = {"agent": Preset(min_tokens=1024)}
    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = (
        *({"num_agents": count} for count in (1, 4, 16, 64, 256)),
        *({"num_agents": count, "correction": "nystrom"} for count in (16, 64, 256)),
        *({"num_agents": count, "agents": "merged", "correction": "nystrom"} for count in (16, 64, 256)),
    )

    def why_exact(self, grid: Grid) -> str | None:
        """Why this is exact attention on `grid`, or None where it is not."""
        agents, tokens = self.agents_at(grid), math.prod(grid)
        return f"{agents} agents are too many for {tokens} tokens" if 2 * agents >= tokens else None

    def agents_at(self, grid: Grid) -> int:
        """Number of agents on `grid`."""
        return math.prod(self._cells(grid))

    def scales(self, head_dim: int) -> AgentScales:
        """The scalars of `attngen.functional.agent_attention` for a head size."""
        scales = scales_for(head_dim, self.broadcast_exponent, self.shortcut)
        return scales._replace(gain=self.gain, correction=self.correction)

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        why = self.why_exact(call.grid)
        if why is not None:
            return exact(why)
        agents = Agents(self._cells(call.grid), self.scales(layer.head_dim))
        return agent_route(layer, like, agents, self._projected, absorbs=self.agents == "pooled")

    def _projected(self, layer: Layer, hidden_states: Tensor, call: Call, *, kernel: str | None) -> Tensor:
        selection = Selection(hidden_states, hidden_states)
        if self.agents == "merged":
            selection = self._merged(hidden_states, call.grid)
        query, key, value = layer.project(selection)
        if selection.agents is None:
            agents = layer.pool_queries(query, call.grid, self._cells(call.grid))
        else:
            agents = layer.project_queries(selection.agents, selection.agent_positions)
        mixed = through_agents(layer, query, key, value, agents, self.scales(layer.head_dim), kernel)
        return layer.output(join_heads(mixed).to(query.dtype))

    def _cells(self, grid: Grid) -> Grid:
        """Rows and columns of the agents, or of the cells that merged agents start from; of a video frames before."""
        cells = agent_grid(self.num_agents, grid, self.frames)
        return cells if self.agents != "merged" else cells_of(grid, _stride(cells, grid))

    def _merged(self, x: Tensor, grid: Grid) -> Selection:
        """All tokens, and means of similar ones, (B, M, C), as agents."""
        with torch.no_grad():
            stride = _stride(agent_grid(self.num_agents, grid, self.frames), grid)
            matching = match_drawn_tokens(x, grid, stride, 0.0, None, None)
        matching = replace(matching, num_merged=len(matching.source))
        return Selection(x, x, matching.merge(x), agent_positions=matching.positions())

    @property
    def label(self) -> str:
        made = "" if self.agents == "pooled" else f" {self.agents}"
        return f"{super().label}{made}{'' if self.correction is None else ' N'}"

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        agents = self.agents_at(shape.grid)
        if kernel == "absorbed":
            kept = 1 if self.shortcut else 0
            return AbsorbedSize(agents, shape.head_dim, shape.num_heads, shape.channels, shape.tokens, kept).flops
        core = shape.projection_flops(shape.tokens, shape.tokens) + agent_flops(shape, agents, shape.tokens)
        return core + self._matching_flops(shape, agents) + self._correction_flops(shape, agents)

    def _matching_flops(self, shape: LayerShape, agents: int) -> int:
        """Making agents that are not pooled: their matching, and their own projection."""
        if self.agents == "pooled":
            return 0
        return 2 * (shape.tokens - agents) * agents * shape.channels + 2 * agents * shape.channels * shape.width

    def _correction_flops(self, shape: LayerShape, agents: int) -> int:
        """Similarities of the agents, a factorisation, and a solution for each column of the values."""
        if self.correction is None:
            return 0
        return 4 * agents * agents * shape.width + shape.num_heads * 2 * agents**3 // 3


def _stride(cells: Grid, grid: Grid) -> Grid:
    """Sides of equal whole cells, no more of them than `cells`."""
    return tuple(-(-length // count) for length, count in zip(grid, cells, strict=True))


def scales_for(head_dim: int, broadcast_exponent: float, shortcut: float) -> AgentScales:
    """The training-free form of arXiv 2312.08874: the broadcast is scaled by a power of the usual scale."""
    scale = float(head_dim**-0.5)
    return AgentScales(scale, scale**broadcast_exponent, shortcut)


def through_agents(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, agents: Tensor, scales: AgentScales, kernel: str | None
) -> Tensor:
    """`agent_attention` over the keys of image and text, (B, H, N, D); the shortcut adds image values.

    Args:
        layer: whose context is attended to as well.
        query: (B, H, N, D).
        key: (B, H, L, D), of the image.
        value: (B, H, L, D).
        agents: (B, H, M, D).
        scales: see `AgentScales`.
        kernel: of a route; None for two calls of the attention backend that the user chose.
    """
    keys, values = with_context(key, value, layer.context)
    if kernel is None:
        aggregated = between(layer.attention(agents, keys, values, scale=scales.scale), agents, scales)
        output = layer.attention(query, agents, aggregated, scale=scales.broadcast_scale)
        return torch.add(output, value, alpha=scales.shortcut) if scales.shortcut else output
    if layer.context is None:
        return dispatch.agent_attention(query, keys, values, agents, scales, kernel=kernel)
    output = dispatch.agent_attention(query, keys, values, agents, scales._replace(shortcut=0.0), kernel=kernel)
    return torch.add(output, value, alpha=scales.shortcut) if scales.shortcut else output


def agent_flops(shape: LayerShape, agents: int, tokens: int) -> int:
    """Aggregation over `tokens` image tokens and the text, broadcast to the image tokens, text queries left exact."""
    keys = tokens + shape.context
    core = 4 * shape.width * (agents * (keys + tokens) + shape.context * keys)
    pooling_and_shortcut = 3 * tokens * shape.width
    return core + pooling_and_shortcut
