"""Processor for layers of image tokens alone: UNets, DiT, PixArt, SiT."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from attngen.hosts.backend import BackendAttention, attention_of
from attngen.hosts.spec import MASKED, decide, noted, spec_of
from attngen.kernels.dispatch import AUTO
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.methods.base import with_context
from attngen.tokens import join_heads


class AttnGenProcessor:
    """Runs the route of its layer, or the layer's own processor where that is exact attention.

    Without state and arguments: diffusers may create a new one at any time. Options are in the layer's `LayerSpec`;
    what changes from call to call is the argument `attngen`, a `Call`.
    """

    default = AttnProcessor2_0
    """The processor to use instead where there is no patch."""

    _attention_backend = None
    _parallel_config = None

    def layer(self, attn: Any, text_tokens: int = 0) -> Layer:
        """The layer as this processor reads it; `text_tokens` has no effect."""
        spec = spec_of(attn)
        original, kernel = (self.default(), AUTO) if spec is None else (spec.original, spec.kernel)
        return Layer(attn, attention_of(self, original, kernel), kernel)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attngen: Call | None = None,
    ) -> Tensor:
        layer, why = self.layer(attn), None
        if attention_mask is not None:
            why = MASKED
        elif encoder_hidden_states is not None or hidden_states.ndim != 3:
            why = "it does not attend to a sequence of image tokens alone"
        run = noted(decide(layer, attngen, layer.like(hidden_states), why), attn, attngen).run
        if run is None and why is None and isinstance(layer.attention, BackendAttention):
            run = softmax
        if run is None:
            spec = spec_of(attn)
            original = self.default() if spec is None else spec.original
            given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, "temb": temb}
            return original(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        output = run(layer, _normalised(attn, hidden_states, temb), attngen)  # type: ignore[arg-type]
        if getattr(attn, "residual_connection", False):
            output = output + hidden_states
        return output / getattr(attn, "rescale_output_factor", 1.0)


def softmax(layer: Layer, hidden_states: Tensor, call: Call | None) -> Tensor:
    """Exact attention through the backend in force, which the layer's own processor may not support."""
    layer.core = None  # a learned method's own projections are not the model's
    query, key, value = layer.project(Selection(hidden_states, hidden_states))
    mixed = layer.attention(query, *with_context(key, value, layer.context))
    return layer.output(join_heads(mixed).to(query.dtype))


def _normalised(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    if getattr(attn, "spatial_norm", None) is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if getattr(attn, "group_norm", None) is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states
