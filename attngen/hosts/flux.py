"""FLUX's processor: joint attention with text tokens first and rotary positions. See `attngen.hosts.joint`."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from attngen.hosts.backend import attention_of
from attngen.hosts.joint import JointLayer, Rotate, text_heads
from attngen.hosts.spec import MASKED, decide, noted, spec_of
from attngen.kernels.dispatch import AUTO
from attngen.layers.call import Call
from attngen.layers.layer import Heads, Layer, Selection

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (tokens, head size) each, text first."""


class FluxAttnGenProcessor:
    """FLUX's layers; the input of single-stream ones has text and image in one sequence. See `AttnGenProcessor`."""

    default = FluxAttnProcessor

    _attention_backend = None
    _parallel_config = None

    def layer(self, attn: Any, text_tokens: int = 0) -> JointLayer:
        """The layer as this processor sees it."""
        spec = spec_of(attn)
        original, kernel = (self.default(), AUTO) if spec is None else (spec.original, spec.kernel)
        in_one_sequence = getattr(attn, "add_k_proj", None) is None
        layer = JointLayer(attn, attention_of(self, original, kernel), kernel, text_tokens, not in_one_sequence)
        layer.rotary = True
        return layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        attngen: Call | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        in_front = 0 if attngen is None else attngen.context
        stream = hidden_states[:, in_front:] if encoder_hidden_states is None else hidden_states
        # Reference images follow the image: context, as the text is.
        number = stream.shape[1] if attngen is None else min(stream.shape[1], math.prod(attngen.grid))
        image, references = stream[:, :number], stream[:, number:]
        num_text = in_front if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        layer = self.layer(attn, num_text + references.shape[1])
        why = None if attention_mask is None else MASKED
        run = noted(decide(layer, attngen, layer.like(image), why), attn, attngen).run
        if run is None:
            spec = spec_of(attn)
            processor = _with_settings(self.default() if spec is None else spec.original, self)
            return processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            text = _heads(layer, hidden_states[:, :in_front])
        else:
            text = text_heads(layer, encoder_hidden_states)
        rotate: Rotate | None = None
        if image_rotary_emb is not None:
            text = _rotated_heads(text, image_rotary_emb, slice(0, in_front))
            rotate = _rotation(_part(image_rotary_emb, slice(in_front, in_front + number)))
        context = text
        if references.shape[1]:
            others = _heads(layer, references)
            if image_rotary_emb is not None:
                others = _rotated_heads(others, image_rotary_emb, slice(in_front + number, None))
            context = tuple(torch.cat(pair, dim=2) for pair in zip(text, others, strict=True))  # type: ignore[assignment]
        output = run(layer.with_text(context, rotate), image, attngen)  # type: ignore[arg-type]
        mixed = layer.mixed_text()
        mixed_text, mixed_references = mixed[:, :num_text], mixed[:, num_text:]
        if references.shape[1]:
            output = torch.cat([output, layer.output(mixed_references)], dim=1)
        if encoder_hidden_states is None:
            return torch.cat([mixed_text, output], dim=1)
        return output, attn.to_add_out(mixed_text)


def _with_settings(original: Any, ours: Any) -> Any:
    """The original processor, or a copy with the backend that was set on attngen's; the original is not changed."""
    if ours._attention_backend is None and ours._parallel_config is None:
        return original
    copied = type(original)()
    copied._attention_backend, copied._parallel_config = ours._attention_backend, ours._parallel_config
    return copied


def _heads(layer: Layer, states: Tensor) -> Heads:
    """Text by the image's projections, as single-stream layers have it."""
    return Layer.project(layer, Selection(states, states))


def _part(tables: Tables, tokens: slice) -> Tables:
    return tables[0][tokens], tables[1][tokens]


def _rotated_heads(heads: Heads, tables: Tables, tokens: slice) -> Heads:
    cos, sin = _part(tables, tokens)
    return _rotated(heads[0], cos, sin), _rotated(heads[1], cos, sin), heads[2]


def _rotation(tables: Tables) -> Rotate:
    def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
        return _rotated(x, *(_rows(table, positions) for table in tables))

    return rotate


def _rows(table: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of (N, D) for each token, ready to broadcast over (B, H, N, D)."""
    if positions is None:
        return table
    picked = table[positions]
    return picked if positions.ndim == 1 else picked.unsqueeze(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of (B, H, N, D) in float32, as FLUX does (arXiv 2104.09864, eq. 34)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)
