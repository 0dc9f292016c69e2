"""A core host's attention product: image queries by the route of the plan's method, all others exactly.

A row says where the image is among the tokens; a mask of text keys, and fewer keys of references, are a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attngen.hosts.backend import BackendAttention, attention_of
from attngen.hosts.family import Core
from attngen.hosts.references import Grids, log_counts, means, num_tokens
from attngen.hosts.spec import MASKED, LayerSpec, decide, noted, spec_of
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Attention, FusedAttention, Heads, Layer, Selection
from attngen.layers.route import Route
from attngen.tokens import join_heads, split_heads

EXACT_ATTENTION = F.scaled_dot_product_attention


class CoreLayer(Layer):
    """A layer whose queries, keys and values its model has computed: nothing is left to project.

    Args:
        attn: the attention module.
        attention: exact attention.
        wanted: the kernel asked for.
        heads: number of heads.
        head_dim: size of a head.
        context_tokens: text and reference tokens.
        rotary: whether queries and keys are rotated by position.
    """

    def __init__(
        self,
        attn: nn.Module,
        attention: Attention,
        wanted: str,
        heads: int,
        head_dim: int,
        context_tokens: int,
        rotary: bool,
    ) -> None:
        self.attn, self.attention, self.wanted, self.core = attn, attention, wanted, None
        self._heads, self._head_dim, self.context_tokens, self.rotary = heads, head_dim, context_tokens, rotary
        self._given: Heads | None = None

    @property
    def heads(self) -> int:
        return self._heads

    @property
    def head_dim(self) -> int:
        return self._head_dim

    @property
    def width(self) -> int:
        return self._heads * self._head_dim

    @property
    def channels(self) -> int:
        return self.width

    def given(self, image: Heads, context: tuple[Tensor, Tensor] | None) -> CoreLayer:
        """The layer in a call: heads (B, H, N, D) of the image, keys and values (B, H, T, D) of everything else."""
        self._given, self.context = image, context
        return self

    def project(self, selection: Selection) -> Heads:
        assert self._given is not None
        query, key, value = self._given
        if selection.key_positions is not None:
            key, value = key[:, :, selection.key_positions], value[:, :, selection.key_positions]
        return query, key, value

    def project_queries(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return split_heads(tokens, self.heads)

    def output(self, mixed: Tensor) -> Tensor:
        return mixed

    def why_not_matrices(self) -> str | None:
        return "the model's own processor projects"


class Asked(NamedTuple):
    """A product as a layer asks for it: the arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


Exactly = Callable[[Asked], Tensor]
"""Exact attention by whatever the layer would have used."""


def attend(
    attn: nn.Module,
    place: Core,
    call: Call,
    asked: Asked,
    exactly: Exactly,
    attention: BackendAttention | None = None,
    saw: Callable[[int, int, int], None] | None = None,
) -> Tensor:
    """A layer's product: image queries by the plan's method, all others exactly, over fewer keys of references.

    Args:
        attn: the layer.
        place: where the image is in its tokens.
        call: of the model.
        asked: the product, (B, H, N, D).
        exactly: exact attention as the layer would have computed it.
        attention: the user's backend where that was asked; None for the one that the layer's processor names.
        saw: is given heads, head size, and tokens other than the image's, of a product over the image.
    """
    query, key, value, mask = asked[:4]
    call = call._replace(grid=place.grid_of(call.grid, query.shape[2]))
    tokens, num_keys = math.prod(call.grid), key.shape[2]
    found = place.in_front(num_keys - num_tokens(call.references), tokens, call.context)
    in_front = found or 0
    image = slice(in_front, in_front + tokens)
    factor = _spec(attn).reduction(call)
    others, references = max(0, num_keys - tokens), 0 if factor is None else num_tokens(call.references)
    why, bias = _why_exact(asked, tokens, image.stop + references), None
    if why is None and found is None:
        why = f"its {num_keys} keys are not those of the image's {tokens} tokens and of what is around them"
    if why is None and mask is not None:
        # A mask of references has to be that of the image: they are reduced as one.
        bias = _bias_of_context(mask, slice(image.start, image.stop + references), query.shape[2] == tokens)
        why = MASKED if bias is None else None
    if why is None and saw is not None:
        saw(query.shape[1], query.shape[3], others)
    layer = core_layer(attn, query.shape[1], query.shape[3], others, attention)
    like = Like((query.shape[0], tokens, layer.width), query.dtype, query.device, query.requires_grad)
    why = why or _why_not_biased(layer, bias, factor)
    route = decide(layer, call, layer.like(like), why)
    reduces = why is None and factor is not None and (mask is None or mask.ndim == 2 or mask.shape[-2] == 1)
    noted(route, attn, call, reduces)
    if route.run is None and not reduces:
        return exactly(asked)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    if reduces:
        assert factor is not None
        key, value, bias = _reduced(key, value, bias, image.stop, call.references, factor)
    asked = asked._replace(key=key, value=value)
    weights = bias if reduces else None
    if route.run is None:
        return _exact(asked, slice(None), weights, exactly)
    mixed = _image(route, layer, call, (query, key, value), image, asked.scale, bias)
    if query.shape[2] == tokens:
        return mixed
    before, after = (
        [_exact(asked, rows, weights, exactly)] if len(range(*rows.indices(query.shape[2]))) else []
        for rows in (slice(0, image.start), slice(image.stop, None))
    )
    return torch.cat([*before, mixed, *after], dim=2)


def _exact(asked: Asked, rows: slice, bias: Tensor | None, exactly: Exactly) -> Tensor:
    """Some of the queries, exactly, (B, H, rows, D)."""
    query = asked.query[:, :, rows]
    if bias is None:
        return exactly(asked._replace(query=query, attn_mask=_rows(asked.attn_mask, rows)))
    size, width = query.shape[3], asked.value.shape[3]
    scale = size**-0.5 if asked.scale is None else asked.scale
    query, key, value = _widened(query, asked.key, asked.value, bias / scale)
    changed = asked._replace(query=query, key=key, value=value, attn_mask=None, scale=scale, enable_gqa=False)
    return exactly(changed)[..., :width]


def _widened(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Heads:
    """Heads with a bias of the keys (·, ·, L, 1) as a channel, against ones: fused kernels take no mask."""
    query = F.pad(F.pad(query, (0, 1), value=1.0), (0, 7))
    key = F.pad(torch.cat([key, bias.to(key.dtype).expand(*key.shape[:3], 1)], dim=3), (0, 7))
    return query, key, F.pad(value, (0, 8))


def _reduced(
    key: Tensor, value: Tensor, bias: Tensor | None, start: int, references: Grids, factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias with the cells of the references in place of their tokens, which begin at `start`."""
    stop = start + num_tokens(references)
    weights = log_counts(references, factor, key)
    if bias is None or not bool(bias.numel()):
        bias = weights.new_zeros(1, 1, key.shape[2], 1)
    weights = weights.expand(bias.shape[0], -1, -1, -1).to(bias.dtype)
    key, value = (
        torch.cat([x[:, :, :start], means(x[:, :, start:stop], references, factor), x[:, :, stop:]], dim=2)
        for x in (key, value)
    )
    return key, value, torch.cat([bias[:, :, :start], weights, bias[:, :, stop:]], dim=2)


def _image(
    route: Route,
    layer: CoreLayer,
    call: Call,
    heads: Heads,
    image: slice,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    """What the image queries of (B, H, ·, D) heads get by a route, (B, H, N, D)."""
    query, key, value = heads
    tokens, size = image.stop - image.start, query.shape[3]
    query = query if query.shape[2] == tokens else query[:, :, image]
    if scale is not None and scale != size**-0.5:
        query = query * (scale / size**-0.5)
    if bias is not None and bool(bias.numel()):
        layer.attention = Scaled(layer.attention, size**-0.5)
        query, key, value = _widened(query, key, value, bias / size**-0.5)
    context = None
    if key.shape[2] > tokens:
        before, after = ((x[:, :, : image.start], x[:, :, image.stop :]) for x in (key, value))
        context = torch.cat(before, dim=2), torch.cat(after, dim=2)
    layer.given((query, key[:, :, image], value[:, :, image]), context)
    assert route.run is not None
    mixed = split_heads(route.run(layer, join_heads(query), call), layer.heads)
    return mixed[..., : heads[2].shape[3]].to(heads[0].dtype)


class Scaled:
    """`Attention` whose usual scale is not that of its tensors, which have channels that are no part of a head."""

    def __init__(self, attention: Attention, scale: float) -> None:
        self.attention, self.scale = attention, scale

    @property
    def name(self) -> str:
        return self.attention.name

    @property
    def kernel(self) -> str | None:
        return self.attention.kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        return self.attention(query, key, value, scale=self.scale if scale is None else scale)


def _why_exact(asked: Asked, tokens: int, last: int) -> str | None:
    """Why a product stays exact by its form, or None.

    Args:
        asked: the product.
        tokens: of the image.
        last: keys up to the last one of the image and the references that are reduced.
    """
    queries, keys = asked.query.shape[2], asked.key.shape[2]
    if asked.is_causal:
        return "its attention is causal"
    if asked.dropout_p:
        return "it drops attention weights"
    if queries < tokens or keys < tokens:
        return f"{queries} queries and {keys} keys are not the {tokens} tokens of the image"
    if queries not in (tokens, keys):
        return f"{queries} queries are not the {tokens} tokens of the image, nor all {keys} of the keys"
    if keys < last:
        return f"{keys} keys are not the tokens of image and references"
    return None


def _why_not_biased(layer: CoreLayer, bias: Tensor | None, factor: int | None) -> str | None:
    """Sage's kernels have heads of at most 128 channels, and a bias is one more."""
    wide = factor is not None or (bias is not None and bool(bias.numel()))
    if wide and "sage" in layer.attention.name and layer.head_dim > 120:
        return f"{layer.attention.name} attention has no room for weights of keys in heads of {layer.head_dim}"
    return None


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some of the queries."""
    return mask if mask is None or mask.ndim == 2 or mask.shape[-2] == 1 else mask[..., rows, :]


def _bias_of_context(mask: Any, image: slice, only_image: bool) -> Tensor | None:
    """A mask as a bias of the keys, (B, 1, L, 1); empty where it masks nothing, None where it is more than that.

    It is more where it differs between heads, image queries or image keys. Looking waits for the GPU, so it is done
    once a mask, and not in compiled code.
    """
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor):
        return None
    known: dict[tuple[int, int], Tensor | None] = getattr(mask, "_attngen_bias", {})
    place = image.start, image.stop
    if place not in known:
        known[place] = _look(mask, image, only_image)
        mask._attngen_bias = known  # type: ignore[attr-defined]
    return known[place]


def _look(mask: Tensor, image: slice, only_image: bool) -> Tensor | None:
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    if mask.ndim != 4:
        return None
    rows = mask if mask.shape[2] == 1 or only_image else mask[:, :, image]
    if not bool((rows == rows[:, :1, :1]).all()):
        return None
    row = rows[:, :1, 0]
    if row.dtype == torch.bool:
        if not bool(row[..., image].all()):
            return None
        return row.new_empty(0) if bool(row.all()) else torch.where(row, 0.0, _MASKED).unsqueeze(-1)
    own = row[..., image]
    if not bool((own == own[..., :1]).all()):
        return None
    bias = (row - own[..., :1]).clamp(min=_MASKED)
    return row.new_empty(0) if bool((bias == 0).all()) else bias.unsqueeze(-1)


_MASKED = -3e3
"""Bias of a key that is not attended to; float16 holds it over the scale of a head of up to 256, too."""


def core_layer(
    attn: Any, heads: int, head_dim: int, context_tokens: int, attention: BackendAttention | None = None
) -> CoreLayer:
    """The layer, in a call or in a report; `attention` where a product shows what computes it."""
    spec, processor = _spec(attn), getattr(attn, "processor", None)
    found: FusedAttention | BackendAttention = attention or FusedAttention(spec.kernel)
    if attention is None and hasattr(processor, "_attention_backend"):
        found = attention_of(processor, spec.original, spec.kernel)
    if isinstance(found, BackendAttention) and found.name == "native":
        found = FusedAttention(spec.kernel)
    return CoreLayer(attn, found, spec.kernel, heads, head_dim, context_tokens, spec.rotary)


def _spec(attn: nn.Module) -> LayerSpec:
    spec = spec_of(attn)
    assert spec is not None
    return spec


def why_unreachable(attn: Any) -> str | None:
    """Why none of a layer's products can be caught, or None."""
    if getattr(getattr(attn, "processor", None), "_parallel_config", None) is not None:
        return "context parallelism splits its tokens between devices"
    return None


def why_missed(attn: Any) -> str:
    """Why the products of a layer were not caught: neither torch's function nor diffusers' dispatcher had them."""
    return f"its processor {type(attn.processor).__name__} computes its product by itself"
