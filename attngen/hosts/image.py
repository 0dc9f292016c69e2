"""Processor for layers that see image tokens only: UNets, DiT, PixArt, SiT."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from attngen.functional import pool_tokens
from attngen.hosts.absorb import absorbed_attention, why_direct
from attngen.hosts.layers import active_method, attention_of, spec_of
from attngen.hosts.learned import learned_attention
from attngen.learned.methods import LearnedMethod
from attngen.methods.base import Attention, AttentionMethod, Selection
from attngen.methods.softmax import SoftmaxAttention
from attngen.step import StepInfo
from attngen.tokens import join_heads, split_heads


class AttnGenProcessor:
    """Runs the method that the plan has for its layer, or the layer's own processor where that is exact attention.

    Without state and arguments: diffusers may make it anew at any time. Options are in the layer's `LayerSpec`, what
    changes from call to call comes as `attngen`, a `StepInfo`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attngen: StepInfo | None = None,
    ) -> Tensor:
        spec = spec_of(attn)
        original = spec.original if spec is not None else AttnProcessor2_0()
        attention = attention_of(self, original, spec)
        plain = encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3
        method = active_method(attn, attngen, hidden_states.shape[1]) if plain else None
        if method is None and (not plain or attention.backend is None):
            given = {
                "encoder_hidden_states": encoder_hidden_states,
                "attention_mask": attention_mask,
                "temb": temb,
            }
            return original(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        residual = hidden_states
        hidden_states = _normalise(attn, hidden_states, temb)
        hidden_states = _attend(attn, hidden_states, method or SoftmaxAttention(), attngen, attention)
        if getattr(attn, "residual_connection", False):
            hidden_states = hidden_states + residual
        return hidden_states / getattr(attn, "rescale_output_factor", 1.0)


def _normalise(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    if getattr(attn, "spatial_norm", None) is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if getattr(attn, "group_norm", None) is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def _attend(
    attn: Any, hidden_states: Tensor, method: AttentionMethod, info: StepInfo | None, attention: Attention
) -> Tensor:
    if info is not None and isinstance(method, LearnedMethod):
        # Position biases fit no attention backend, so attngen's paths run whatever the user chose for exact layers.
        spec = spec_of(attn)
        assert spec is not None
        return attn.to_out[1](learned_attention(attn, hidden_states, method, info.grid, spec.kernel))
    if info is not None and why_direct(attn, hidden_states, method, info.grid, attention.kernel) is None:
        return attn.to_out[1](absorbed_attention(attn, hidden_states, method, info.grid))
    selection, agents = Selection(hidden_states, hidden_states), None
    if info is not None and not isinstance(method, SoftmaxAttention):
        metric = hidden_states if info.metric is None else info.metric
        selection = method.select(hidden_states, metric, info.grid, info.draws)
    query, key, value = project(attn, selection)
    if selection.agents is not None:
        agents = to_heads(attn, project_query(attn, selection.agents), "norm_q")
    elif info is not None and (size := method.pool_size(info.grid)) is not None:
        # The mean of normalised queries: agents then have the queries' own distribution.
        pooled = pool_tokens(join_heads(to_heads(attn, query, "norm_q")), info.grid, size)
        agents = split_heads(pooled, attn.heads)
    mixed = method.attend(
        to_heads(attn, query, "norm_q"),
        to_heads(attn, key, "norm_k"),
        split_heads(value, attn.heads),
        grid=None if info is None else info.grid,
        agents=agents,
        context=None,
        attention=attention,
    )
    output = attn.to_out[1](attn.to_out[0](join_heads(mixed).to(query.dtype)))
    return output if selection.restore is None else selection.restore(output)


def project(attn: Any, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, N, H · D) each, by modules (never weights: LoRA and quantisation sit in them)."""
    if not getattr(attn, "fused_projections", False):
        return attn.to_q(selection.queries), attn.to_k(selection.keys), attn.to_v(selection.keys)
    query, key, value = attn.to_qkv(selection.keys).chunk(3, dim=-1)
    return (query if selection.queries is selection.keys else project_query(attn, selection.queries)), key, value


def project_query(attn: Any, tokens: Tensor) -> Tensor:
    """Queries (B, N, H · D) of `tokens` alone."""
    return attn.to_qkv(tokens).chunk(3, dim=-1)[0] if getattr(attn, "fused_projections", False) else attn.to_q(tokens)


def to_heads(attn: Any, x: Tensor, norm: str) -> Tensor:
    """(B, N, H · D) -> (B, H, N, D), normalised where the layer has that norm, in the dtype of `x`."""
    heads = split_heads(x, attn.heads)
    module: nn.Module | None = getattr(attn, norm, None)
    # Under autocast a norm may answer in float32, and queries, keys and values must agree.
    return heads if module is None else module(heads).to(x.dtype)
