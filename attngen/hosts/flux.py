"""FLUX's processor: joint attention with text tokens first and rotary positions. See `attngen.hosts.joint`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from attngen.hosts.image import project, to_heads
from attngen.hosts.joint import Heads, image_heads, mix, select, text_heads
from attngen.hosts.layers import active_method, attention_of, spec_of
from attngen.methods.base import Selection
from attngen.step import StepInfo
from attngen.tokens import split_heads

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (tokens, head size) each, text first."""


class FluxAttnGenProcessor:
    """FLUX's layers; the single-stream ones get text and image in one sequence. See `AttnGenProcessor`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        attngen: StepInfo | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        spec = spec_of(attn)
        original = spec.original if spec is not None else FluxAttnProcessor()
        text_length = 0 if attngen is None else attngen.context
        in_one_sequence = encoder_hidden_states is None
        image_tokens = hidden_states.shape[1] - (text_length if in_one_sequence else 0)
        method = active_method(attn, attngen, image_tokens) if attention_mask is None else None
        if method is None:
            processor = _with_settings(original, self)
            return processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        assert attngen is not None
        if in_one_sequence:
            text_states, image_states = hidden_states[:, :text_length], hidden_states[:, text_length:]
            text = _heads(attn, text_states)
        else:
            image_states = hidden_states
            assert encoder_hidden_states is not None
            text = text_heads(attn, encoder_hidden_states)
        tables = image_rotary_emb

        def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
            return x if tables is None else _rotate(x, *(_rows(table[text_length:], positions) for table in tables))

        if tables is not None:
            cos, sin = (table[:text_length] for table in tables)
            text = (_rotate(text[0], cos, sin), _rotate(text[1], cos, sin), text[2])
        selection = select(method, image_states, attngen)
        image, agents = image_heads(attn, selection, method, attngen, rotate)
        mixed_image, mixed_text = mix(method, image, text, agents, attention_of(self, original, spec), attngen)
        assert mixed_text is not None
        if in_one_sequence:
            restored = mixed_image if selection.restore is None else selection.restore(mixed_image)
            return torch.cat([mixed_text, restored], dim=1)
        output = attn.to_out[1](attn.to_out[0](mixed_image))
        output = output if selection.restore is None else selection.restore(output)
        return output, attn.to_add_out(mixed_text)


def _with_settings(original: Any, ours: Any) -> Any:
    """The original processor with the backend that was set on ours; the original itself stays as it was."""
    if ours._attention_backend is None and ours._parallel_config is None:
        return original
    copied = type(original)()
    copied._attention_backend, copied._parallel_config = ours._attention_backend, ours._parallel_config
    return copied


def _heads(attn: Any, states: Tensor) -> Heads:
    """Text by the image's projections, as single-stream layers have it."""
    query, key, value = project(attn, Selection(states, states))
    return to_heads(attn, query, "norm_q"), to_heads(attn, key, "norm_k"), split_heads(value, attn.heads)


def _rows(table: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of (N, D) for each token, ready to broadcast over (B, H, N, D)."""
    if positions is None:
        return table
    picked = table[positions]
    return picked if positions.ndim == 1 else picked.unsqueeze(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of (B, H, N, D) in float32, as FLUX does (arXiv 2104.09864, eq. 34)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)
