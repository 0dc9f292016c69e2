"""Joint attention, where image and text tokens attend to each other: common parts of SD3 and FLUX, SD3's processor.

Image queries go through the plan's method. Text queries stay exact: softmax over the text and the image keys that the
method keeps. Agents keep all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from attngen.checks import Grid
from attngen.hosts.backend import BackendAttention, attention_of
from attngen.hosts.image import softmax
from attngen.hosts.spec import MASKED, decide, noted, spec_of
from attngen.kernels.dispatch import AUTO
from attngen.layers.call import Call
from attngen.layers.layer import Attention, Heads, Layer, Selection
from attngen.methods.base import with_context
from attngen.tokens import join_heads, nearest_positions, pool_tokens, split_heads

Rotate = Callable[[Tensor, Tensor | None], Tensor]
"""Rotate (B, H, N, D) by the positions (N,) or (B, N) of its tokens in the image; None means row-major order."""


class JointLayer(Layer):
    """A layer whose image queries attend to text as well.

    Agents are pooled before the rotation and rotated by the token nearest to their cell's centre: the mean of rotated
    queries would lose high frequencies.

    Args:
        attn: see `Layer`.
        attention: see `Layer`.
        wanted: see `Layer`.
        text_tokens: T, for a report.
        projects_output: whether the layer projects its output; some leave that to the block.
    """

    def __init__(
        self, attn: Any, attention: Attention, wanted: str, text_tokens: int = 0, projects_output: bool = True
    ) -> None:
        super().__init__(attn, attention, wanted)
        self.context_tokens, self.projects_output = text_tokens, projects_output
        self.text: Heads | None = None
        self.rotate: Rotate | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._unrotated: Tensor | None = None

    def with_text(self, text: Heads | None, rotate: Rotate | None = None) -> JointLayer:
        """The layer in a call: queries, keys and values (B, H, T, D) of the text, and the rotation of the image."""
        self.text, self.rotate = text, rotate
        if text is not None:
            self.context, self.context_tokens = (text[1], text[2]), text[1].shape[2]
        return self

    def project(self, selection: Selection) -> Heads:
        query, key, value = super().project(selection)
        self._unrotated = query
        if self.rotate is not None:
            query, key = self.rotate(query, selection.query_positions), self.rotate(key, selection.key_positions)
        self._kept = key, value
        return query, key, value

    def project_queries(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        query = super().project_queries(tokens)
        return query if self.rotate is None else self.rotate(query, positions)

    def pool_queries(self, query: Tensor, grid: Grid, size: Grid) -> Tensor:
        unrotated = query if self._unrotated is None else self._unrotated
        agents = split_heads(pool_tokens(join_heads(unrotated), grid, size), self.heads)
        return agents if self.rotate is None else self.rotate(agents, nearest_positions(grid, size, query.device))

    def output(self, mixed: Tensor) -> Tensor:
        return super().output(mixed) if self.projects_output else mixed

    def why_not_matrices(self) -> str | None:
        return "image and text attend jointly"

    def mixed_text(self) -> Tensor:
        """Text queries over the text and the image keys that were kept, exactly: (B, T, H · D)."""
        assert self.text is not None and self._kept is not None
        query = self.text[0]
        return join_heads(self.attention(query, *with_context(*self._kept, self.context))).to(query.dtype)


class JointAttnGenProcessor:
    """SD3's layers: two streams with their own projections; image tokens come first. See `AttnGenProcessor`."""

    default = JointAttnProcessor2_0

    _attention_backend = None
    _parallel_config = None

    def layer(self, attn: Any, text_tokens: int = 0) -> JointLayer:
        """The layer as this processor sees it."""
        spec = spec_of(attn)
        original, kernel = (self.default(), AUTO) if spec is None else (spec.original, spec.kernel)
        has_text = getattr(attn, "add_k_proj", None) is not None
        return JointLayer(attn, attention_of(self, original, kernel), kernel, text_tokens if has_text else 0)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attngen: Call | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layer = self.layer(attn, 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1])
        why = None if attention_mask is None else MASKED
        run = noted(decide(layer, attngen, layer.like(hidden_states), why), attn, attngen).run
        if run is None and why is None and isinstance(layer.attention, BackendAttention):
            run = softmax
        if run is None:
            spec = spec_of(attn)
            original: Any = self.default() if spec is None else spec.original
            given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
            return original(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        layer.with_text(None if encoder_hidden_states is None else text_heads(layer, encoder_hidden_states))
        output = run(layer, hidden_states, attngen)  # type: ignore[arg-type]
        if layer.text is None:
            return output
        text = layer.mixed_text()
        return output, text if attn.context_pre_only else attn.to_add_out(text)


def text_heads(layer: Layer, encoder_hidden_states: Tensor) -> Heads:
    """Queries, keys and values of the text by its own projections, (B, H, T, D) each."""
    attn = layer.attn
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = (p(encoder_hidden_states) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return (
        layer.to_heads(query, "norm_added_q"),
        layer.to_heads(key, "norm_added_k"),
        split_heads(value, layer.heads),
    )
