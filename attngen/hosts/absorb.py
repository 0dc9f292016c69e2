"""Layers of image tokens whose projections go into the agents; see `attngen.kernels.absorbed`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attngen.checks import Grid
from attngen.kernels.absorbed import LayerSize, absorbed_agent_attention, layer_projections, why_not_absorbed
from attngen.methods.base import AttentionMethod
from attngen.tokens import pool_tokens


def why_direct(attn: Any, hidden_states: Tensor, method: AttentionMethod, grid: Grid, kernel: str | None) -> str | None:
    """Why a layer computes its projections, in a few words; None where they are absorbed.

    Args:
        attn: the layer.
        hidden_states: (B, N, C), its input; only shape, dtype, device and `requires_grad` are read.
        method: what it runs.
        grid: (height, width) of the tokens.
        kernel: the path wanted, or None where the user chose an attention backend.
    """
    if method.agent_scales(attn.inner_dim // attn.heads) is None or _is_changed(type(method)):
        return f"{method.kind} attention needs projections"
    if kernel is None:
        return "an attention backend was chosen"
    if getattr(attn, "norm_q", None) is not None or getattr(attn, "norm_k", None) is not None:
        return "queries and keys are normalised"
    size = layer_size(attn, hidden_states.shape[2], method, grid)
    weight = getattr(attn.to_q, "weight", hidden_states)
    reason = why_not_absorbed(size, hidden_states, weight, kernel)
    if reason is None and layer_projections(attn) is None:
        return "a projection is more than one matrix"
    return reason


def _is_changed(kind: type[AttentionMethod]) -> bool:
    """Whether a subclass changed what a layer does without saying again that it is agent attention."""

    def depth(name: str) -> int:
        return next(i for i, cls in enumerate(kind.__mro__) if name in vars(cls))

    return min(depth("attend"), depth("select"), depth("pool_size")) < depth("agent_scales")


def layer_size(attn: Any, channels: int, method: AttentionMethod, grid: Grid) -> LayerSize:
    """Sizes of a layer with pooled agents, as absorption counts them."""
    head_dim = attn.inner_dim // attn.heads
    scales, agents = method.agent_scales(head_dim), method.num_agents_at(grid)
    assert scales is not None and agents is not None
    kept = 1 if scales.shortcut else 0
    return LayerSize(agents, head_dim, attn.heads, channels, grid[0] * grid[1], kept_projections=kept)


def absorbed_attention(attn: Any, hidden_states: Tensor, method: AttentionMethod, grid: Grid) -> Tensor:
    """The layer's output (B, N, C) before its dropout, where `why_direct` has nothing against it."""
    projections, size = layer_projections(attn), method.pool_size(grid)
    scales = method.agent_scales(attn.inner_dim // attn.heads)
    assert projections is not None and size is not None and scales is not None
    query, key, value, out = projections
    return absorbed_agent_attention(
        hidden_states,
        pool_tokens(hidden_states, grid, size),
        query=query,
        key=key,
        value=value,
        out=out,
        num_heads=attn.heads,
        scale=scales.scale,
        broadcast_scale=scales.broadcast_scale,
        shortcut=scales.shortcut,
        gain=scales.gain,
    )
