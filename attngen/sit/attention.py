"""Attention of a SiT block: softmax, mediator and linear, as processors of diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.kernels.absorbed import (
    LayerSize,
    Projection,
    absorbed_agent_attention,
    effective_projection,
    layer_projections,
    why_not_absorbed,
)
from attngen.kernels.dispatch import AUTO
from attngen.layers.mediator import MediatorMixer
from attngen.methods.linear import linear_attention
from attngen.tokens import convolve_tokens, depthwise_convolution, join_heads, pool_tokens, split_heads

ATTENTION_KINDS = ("softmax", "mediator", "linear")


def _project(attn: SiTAttention, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


class SiTAttnProcessor:
    """Softmax attention through the backend the user chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: SiTAttention, hidden_states: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in _project(attn, hidden_states))
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.project_out(mixed.flatten(2, 3).to(query.dtype))


class SiTMediatorAttnProcessor:
    """Mediator attention; its weights are in the layer's `mixer`.

    With few mediators for the head size the projections of queries and keys are absorbed: the same numbers up to
    rounding, for fewer operations.
    """

    def __call__(
        self,
        attn: SiTAttention,
        hidden_states: Tensor,
        grid: Grid,
        num_mediators: int | Grid | None = None,
        kernel: str = AUTO,
    ) -> Tensor:
        mixer = attn.mixer
        assert isinstance(mixer, MediatorMixer)
        mediators = mixer.mediator_grid(num_mediators, grid)
        projections = _absorbable(attn, hidden_states, mediators, kernel)
        if projections is None:
            heads = _project(attn, hidden_states)
            convolved = None
            if mixer.convolution == "input":
                convolved = _project_values_without_bias(attn, convolve_tokens(mixer.dwc, hidden_states, grid))
            return attn.project_out(mixer(*heads, grid, mediators, convolved=convolved, kernel=kernel))

        def convolve(tokens: Tensor) -> Tensor:
            return convolve_tokens(mixer.dwc, tokens, grid)

        query, key, value, out = projections
        output = absorbed_agent_attention(
            hidden_states,
            pool_tokens(hidden_states, grid, mediators),
            query=query,
            key=key,
            value=value,
            out=out,
            num_heads=attn.heads,
            aggregation_bias=mixer.aggregation_bias(mediators, grid),
            broadcast_bias=mixer.broadcast_bias(mediators, grid).transpose(-1, -2),
            value_branch=convolve if mixer.convolution == "values" else None,
            input_branch=convolve if mixer.convolution == "input" else None,
        )
        return attn.to_out[1](output)


def _absorbable(attn: SiTAttention, hidden_states: Tensor, mediators: Grid, kernel: str) -> list[Projection] | None:
    """The layer's query, key, value and output projections as matrices, or None where the direct path runs.

    That is where absorption does not pay or was not asked for, and where a projection is more than a matrix
    (offloading, quantisation, dropout in an adapter).
    """
    assert isinstance(attn.mixer, MediatorMixer)
    size = LayerSize(
        mediators[0] * mediators[1],
        attn.head_dim,
        attn.heads,
        attn.inner_dim,
        hidden_states.shape[1],
        kept_projections=2 if attn.mixer.convolution == "values" else 1,
    )
    weight = getattr(attn.to_q, "weight", hidden_states)
    return None if why_not_absorbed(size, hidden_states, weight, kernel) is not None else layer_projections(attn)


def _project_values_without_bias(attn: SiTAttention, tokens: Tensor) -> Tensor:
    """The projection of the values, (B, N, C) -> (B, N, C), as a linear map: zero stays zero."""
    if attn.fused_projections:
        weight = attn.to_qkv.weight.chunk(3, dim=0)[2]
        return nn.functional.linear(tokens, weight)
    projection = effective_projection(attn.to_v)
    if projection is not None:
        return nn.functional.linear(tokens, projection.weight.to(tokens.dtype))
    return attn.to_v(tokens) - attn.to_v(torch.zeros_like(tokens[:1, :1]))


class SiTLinearAttnProcessor:
    """Linear attention with a depth-wise convolution of the values, which it needs to see neighbours."""

    def __call__(self, attn: SiTAttention, hidden_states: Tensor, grid: Grid, kernel: str = AUTO) -> Tensor:
        query, key, value = _project(attn, hidden_states)
        heads = (split_heads(x, attn.heads) for x in (query, key, value))
        mixed = join_heads(linear_attention(*heads, feature_map=attn.feature_map, kernel=kernel))
        assert isinstance(attn.mixer, nn.Conv2d)
        return attn.project_out(mixed + convolve_tokens(attn.mixer, value, grid))


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of one SiT block, (B, N, C) -> (B, N, C).

    Args:
        num_heads: attention heads.
        head_dim: size of a head; heads times head size is the width C.
        kind: one of `ATTENTION_KINDS`.
        num_mediators: mediators trained with, for "mediator".
        grid: (height, width) of the tokens trained on, for "mediator".
        feature_map: for "linear", see `attngen.functional.linear_attention`.
        convolution: for "mediator", see `attngen.layers.mediator.MediatorMixer`.
    """

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor, SiTMediatorAttnProcessor, SiTLinearAttnProcessor]

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kind: str,
        num_mediators: int,
        grid: Grid,
        feature_map: str,
        convolution: str = "values",
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.heads, self.head_dim, self.inner_dim = num_heads, head_dim, width
        self.feature_map = feature_map
        # Read by diffusers' fusing, caches and LoRA.
        self.use_bias, self.is_cross_attention, self.added_kv_proj_dim = True, False, None
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.mixer: nn.Module | None = None
        if kind == "mediator":
            self.mixer = MediatorMixer(num_heads, head_dim, num_mediators, grid, convolution=convolution)
        elif kind == "linear":
            self.mixer = depthwise_convolution(width)
        processors = {
            "softmax": SiTAttnProcessor,
            "mediator": SiTMediatorAttnProcessor,
            "linear": SiTLinearAttnProcessor,
        }
        self.set_processor(processors[kind]())

    def project_out(self, hidden_states: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](hidden_states))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Like diffusers: a processor is given what it names. `grid` is not for every processor.
        processor: Any = self.processor
        named = inspect.signature(processor.__call__).parameters
        return processor(self, hidden_states, **{k: v for k, v in kwargs.items() if k in named})
