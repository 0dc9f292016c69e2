"""Joint attention, where image and text tokens attend to each other: what SD3 and FLUX share, and SD3's processor.

Image queries go through the plan's method. Text queries stay exact: softmax over the text and the image keys the method
keeps, which are all of them for agents, so the prompt is read in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from attngen.hosts.image import project, project_query, to_heads
from attngen.hosts.layers import active_method, attention_of, spec_of
from attngen.methods.base import Attention, AttentionMethod, Selection, with_context
from attngen.methods.softmax import SoftmaxAttention
from attngen.step import StepInfo
from attngen.tokens import join_heads, nearest_positions, pool_tokens, split_heads

Heads = tuple[Tensor, Tensor, Tensor]
Rotate = Callable[[Tensor, Tensor | None], Tensor]
"""Rotate (B, H, N, D) by the positions (N,) or (B, N) of its tokens in the image; None is all in order."""


class JointAttnGenProcessor:
    """SD3's layers: two streams with their own projections; image tokens come first. See `AttnGenProcessor`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attngen: StepInfo | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        spec = spec_of(attn)
        original: Any = spec.original if spec is not None else JointAttnProcessor2_0()
        attention = attention_of(self, original, spec)
        method = active_method(attn, attngen, hidden_states.shape[1]) if attention_mask is None else None
        if method is None and (attention.backend is None or attention_mask is not None):
            given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
            return original(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        method = method or SoftmaxAttention()
        selection = select(method, hidden_states, attngen)
        image, agents = image_heads(attn, selection, method, attngen)
        text = None if encoder_hidden_states is None else text_heads(attn, encoder_hidden_states)
        mixed_image, mixed_text = mix(method, image, text, agents, attention, attngen)
        output = attn.to_out[1](attn.to_out[0](mixed_image))
        output = output if selection.restore is None else selection.restore(output)
        if mixed_text is None:
            return output
        return output, mixed_text if attn.context_pre_only else attn.to_add_out(mixed_text)


def select(method: AttentionMethod, hidden_states: Tensor, info: StepInfo | None) -> Selection:
    """The image tokens that the method lets take part."""
    if info is None or isinstance(method, SoftmaxAttention):
        return Selection(hidden_states, hidden_states)
    return method.select(hidden_states, hidden_states, info.grid, info.draws)


def image_heads(
    attn: Any, selection: Selection, method: AttentionMethod, info: StepInfo | None, rotate: Rotate | None = None
) -> tuple[Heads, Tensor | None]:
    """Queries, keys and values of the image, and its agents or None, (B, H, ·, D) each.

    Agents are pooled before the rotation and rotated by the token nearest to their cell's centre: the mean of rotated
    queries would lose the high frequencies.
    """
    query, key, value = project(attn, selection)
    query, key, value = to_heads(attn, query, "norm_q"), to_heads(attn, key, "norm_k"), split_heads(value, attn.heads)
    agents, agent_positions = None, selection.agent_positions
    size = None if info is None else method.pool_size(info.grid)
    if selection.agents is not None:
        agents = to_heads(attn, project_query(attn, selection.agents), "norm_q")
    elif info is not None and size is not None:
        agents = split_heads(pool_tokens(join_heads(query), info.grid, size), attn.heads)
        agent_positions = nearest_positions(info.grid, size, query.device)
    if rotate is not None:
        query, key = rotate(query, selection.query_positions), rotate(key, selection.key_positions)
        agents = None if agents is None else rotate(agents, agent_positions)
    return (query, key, value), agents


def text_heads(attn: Any, encoder_hidden_states: Tensor) -> Heads:
    """Queries, keys and values of the text by its own projections, (B, H, T, D) each."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = (p(encoder_hidden_states) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return (
        to_heads(attn, query, "norm_added_q"),
        to_heads(attn, key, "norm_added_k"),
        split_heads(value, attn.heads),
    )


def mix(
    method: AttentionMethod,
    image: Heads,
    text: Heads | None,
    agents: Tensor | None,
    attention: Attention,
    info: StepInfo | None,
) -> tuple[Tensor, Tensor | None]:
    """Image by the method, text exactly: (B, N, H · D) and (B, T, H · D) or None."""
    context = None if text is None else (text[1], text[2])
    mixed = method.attend(
        *image, grid=None if info is None else info.grid, agents=agents, context=context, attention=attention
    )
    mixed_image = join_heads(mixed).to(image[0].dtype)
    if text is None:
        return mixed_image, None
    keys, values = with_context(image[1], image[2], context)
    return mixed_image, join_heads(attention(text[0], keys, values)).to(text[0].dtype)
