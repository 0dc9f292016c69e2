"""Attention of a SiT block: softmax, mediator and linear, as processors of diffusers."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.kernels.dispatch import AUTO, Kernel
from attngen.layers.call import Call
from attngen.layers.layer import FusedAttention, Layer
from attngen.layers.mediator import MediatorMixer
from attngen.layers.route import Agents, mediator_route
from attngen.methods.linear import FeatureMapName, linear_attention
from attngen.tokens import convolve_tokens, depthwise_convolution, join_heads, split_heads

AttentionKind = Literal["softmax", "mediator", "linear"]
ATTENTION_KINDS = get_args(AttentionKind)


def _layer(attn: SiTAttention, kernel: str = AUTO) -> Layer:
    return Layer(attn, FusedAttention(kernel), kernel)


class SiTAttnProcessor:
    """Softmax attention through the backend the user chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: SiTAttention, hidden_states: Tensor) -> Tensor:
        layer = _layer(attn)
        heads = layer.project_flat(hidden_states, hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in heads)
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return layer.output(mixed.flatten(2, 3).to(query.dtype))


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
        layer = _layer(attn, kernel)
        agents = Agents(mixer.mediator_grid(num_mediators, grid), mixer=mixer)
        route = mediator_route(layer, layer.like(hidden_states), agents)
        assert route.run is not None
        return route.run(layer, hidden_states, Call("0", grid))


class SiTLinearAttnProcessor:
    """Linear attention with a depth-wise convolution of the values, which it needs to see neighbours."""

    def __call__(self, attn: SiTAttention, hidden_states: Tensor, grid: Grid, kernel: Kernel = AUTO) -> Tensor:
        layer = _layer(attn, kernel)
        query, key, value = layer.project_flat(hidden_states, hidden_states)
        heads = (split_heads(x, attn.heads) for x in (query, key, value))
        mixed = join_heads(linear_attention(*heads, feature_map=attn.feature_map, kernel=kernel))
        assert isinstance(attn.mixer, nn.Conv2d)
        return layer.output(mixed + convolve_tokens(attn.mixer, value, grid))


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of one SiT block, (B, N, C) -> (B, N, C).

    Args:
        num_heads: attention heads.
        head_dim: size of a head; heads times head size is the width C.
        kind: one of `ATTENTION_KINDS`.
        num_mediators: mediators trained with, for "mediator": a count or (rows, columns).
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
        num_mediators: int | Grid,
        grid: Grid,
        feature_map: FeatureMapName,
        convolution: str = "values",
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.heads, self.head_dim, self.inner_dim = num_heads, head_dim, width
        self.feature_map: FeatureMapName = feature_map
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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Like diffusers: a processor is given what it names. `grid` is not for every processor.
        processor: Any = self.processor
        named = inspect.signature(processor.__call__).parameters
        return processor(self, hidden_states, **{k: v for k, v in kwargs.items() if k in named})
