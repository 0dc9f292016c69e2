"""The core host: a model's own processors run, and only their product over image tokens goes through a method.

Projections, norms, rotation, the order of text and image, caches, LoRA and the output stay the model's. Hooks on an
attention module put a mode around it that catches its `scaled_dot_product_attention`; a row says where the image is.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attngen.hosts.backend import BackendAttention, attention_of
from attngen.hosts.calls import Calls
from attngen.hosts.family import Core
from attngen.hosts.spec import MASKED, decide, noted, spec_of
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Attention, FusedAttention, Heads, Layer, Selection
from attngen.layers.route import Route
from attngen.tokens import join_heads, nearest_positions, split_heads

_EXACT_ATTENTION = F.scaled_dot_product_attention


class CoreLayer(Layer):
    """A layer whose queries, keys and values its model has computed: nothing is left to project.

    Args:
        attn: the attention module.
        attention: exact attention.
        wanted: the kernel asked for.
        heads: number of heads.
        head_dim: size of a head.
        context_tokens: text and reference tokens.
        rotary: whether queries are rotated by position, so that their mean is no query.
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
        self._heads, self._head_dim, self.context_tokens, self._rotary = heads, head_dim, context_tokens, rotary
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

    def pool_queries(self, query: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        if not self._rotary:
            return super().pool_queries(query, grid, size)
        # The mean of rotated queries loses the high frequencies; the query nearest to the cell's centre keeps them.
        return query[:, :, nearest_positions(grid, size, query.device)]

    def output(self, mixed: Tensor) -> Tensor:
        return mixed

    def why_not_matrices(self) -> str | None:
        return "the model's own processor projects"


class Hook:
    """Base of the hooks on attention modules of a core host."""


class Enter(Hook):
    """Before an attention module: begins to catch its products.

    Attributes:
        seen: heads, head size, and tokens other than the image's, of the last product that had the image; for reports.
    """

    def __init__(self, calls: Calls, core: Core) -> None:
        self.calls, self.core = calls, core
        self.seen: tuple[int, int, int] | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = self.calls.now
        if call is not None:
            self.calls.enter(Product(module, self, call))

    @contextmanager
    def catching(self, module: nn.Module, call: Call) -> Generator[None]:
        """Within it the module's products belong to `call`."""
        self.calls.push(call)
        try:
            with Product(module, self, call):
                yield
        finally:
            self.calls.pop()


class Leave(Hook):
    """After it, also where it raised."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.calls.now is not None:
            self.calls.leave()


class Product(TorchFunctionMode):
    """Catches the attention products of one attention module."""

    def __init__(self, attn: nn.Module, enter: Enter, call: Call) -> None:
        super().__init__()
        self.attn, self.enter, self.call = attn, enter, call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _EXACT_ATTENTION:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return attend(self.attn, self.enter, self.call, *args, **(kwargs or {}))


def attend(
    attn: nn.Module,
    enter: Enter,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of a layer, its image queries by the plan's method, all others exactly."""
    tokens, num_keys = math.prod(call.grid), key.shape[2]
    in_front = enter.core.in_front(num_keys, tokens, call.context)
    image = slice(in_front, in_front + tokens)
    why, bias = _why_exact(query, key, tokens, dropout_p, is_causal), None
    if why is None and attn_mask is not None:
        bias = _bias_of_context(attn_mask, image, query.shape[2] == tokens)
        why = MASKED if bias is None else None
    others = max(0, num_keys - tokens)
    if why is None and not torch.compiler.is_compiling():
        enter.seen = query.shape[1], query.shape[3], others
    layer = core_layer(attn, query.shape[1], query.shape[3], others)
    like = Like((query.shape[0], tokens, layer.width), query.dtype, query.device, query.requires_grad)
    route = noted(decide(layer, call, layer.like(like), why), attn, call)
    if route.run is None:
        given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return _EXACT_ATTENTION(query, key, value, **given, enable_gqa=enable_gqa)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    mixed = _image(route, layer, call, (query, key, value), image, scale, bias)
    if query.shape[2] == tokens:
        return mixed
    exact = [
        _EXACT_ATTENTION(query[:, :, rows], key, value, attn_mask=_rows(attn_mask, rows), scale=scale)
        for rows in (slice(0, image.start), slice(image.stop, None))
        if len(range(*rows.indices(query.shape[2])))
    ]
    return torch.cat([*exact[: image.start > 0], mixed, *exact[image.start > 0 :]], dim=2)


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
        # Fused kernels take no mask, so the bias is a channel of the keys against ones in the queries.
        layer.attention = Scaled(layer.attention, size**-0.5)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, 7))
        key = F.pad(torch.cat([key, (bias / size**-0.5).to(key.dtype).expand(*key.shape[:3], 1)], dim=3), (0, 7))
        value = F.pad(value, (0, 8))
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


def _why_exact(query: Tensor, key: Tensor, tokens: int, dropout_p: float, is_causal: bool) -> str | None:
    if is_causal:
        return "its attention is causal"
    if dropout_p:
        return "it drops attention weights"
    if query.shape[2] < tokens or key.shape[2] < tokens:
        return f"{query.shape[2]} queries and {key.shape[2]} keys are not the {tokens} tokens of the image"
    if query.shape[2] not in (tokens, key.shape[2]):
        return f"{query.shape[2]} queries are not the {tokens} tokens of the image, nor all {key.shape[2]} of the keys"
    return None


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some of the queries."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def _bias_of_context(mask: Tensor, image: slice, only_image: bool) -> Tensor | None:
    """A mask as a bias of the keys, (B, 1, L, 1); empty where it masks nothing, None where it is more than that.

    It is more where it differs between the image's queries or between the image's keys. Looking waits for the GPU, so
    it is done once a mask, and not in compiled code.
    """
    if torch.compiler.is_compiling() or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    known = getattr(mask, "_attngen_bias", None)
    if known is None:
        known = (_look(mask, image, only_image),)
        mask._attngen_bias = known  # type: ignore[attr-defined]
    return known[0]


def _look(mask: Tensor, image: slice, only_image: bool) -> Tensor | None:
    rows = mask if mask.shape[2] == 1 or only_image else mask[:, :, image]
    if not bool((rows == rows[:, :, :1]).all()):
        return None
    row = rows[:, :, 0]
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


def core_layer(attn: Any, heads: int, head_dim: int, context_tokens: int) -> CoreLayer:
    """The layer, in a call or in a report."""
    spec = spec_of(attn)
    assert spec is not None
    processor = getattr(attn, "processor", None)
    attention: FusedAttention | BackendAttention = FusedAttention(spec.kernel)
    if hasattr(processor, "_attention_backend"):
        attention = attention_of(processor, spec.original, spec.kernel)
    if isinstance(attention, BackendAttention) and attention.name == "native":
        attention = FusedAttention(spec.kernel)
    return CoreLayer(attn, attention, spec.kernel, heads, head_dim, context_tokens, spec.rotary)


def why_unreachable(layer: Layer) -> str | None:
    """Why a layer's product is not caught, or None: backends other than torch's own compute it by themselves."""
    if isinstance(layer.attention, BackendAttention) and "native" not in layer.attention.name:
        return f"the attention backend {layer.attention.name} computes its product"
    return None


def core_enter(attn: nn.Module) -> Enter | None:
    """The hook that begins to catch a layer's products, or None where the layer is not of a core host."""
    return next((hook for hook in attn._forward_pre_hooks.values() if isinstance(hook, Enter)), None)
