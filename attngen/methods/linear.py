"""Linear attention: with a feature map in place of the softmax, keys and values are summed once for all queries.

Papers: Katharopoulos et al. 2020, arXiv 2006.16236 (elu); focused linear attention, FLatten, Han et al., ICCV 2023,
arXiv 2308.00442. The normaliser uses the mean of the keys' features and both factors of the sum are divided by the
number of keys, so that half precision does not overflow at high resolution.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Results of some of torch's methods have no types.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attngen.checks import check_choice, check_heads, check_number
from attngen.kernels import dispatch
from attngen.kernels.dispatch import AUTO, CHOOSING, LINEAR_KERNELS, Kernel
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route
from attngen.methods.base import AttentionMethod, LayerShape, Preset, option
from attngen.tokens import join_heads

FeatureMap = Callable[[Tensor], Tensor]
FeatureMapName = Literal["elu", "relu", "focused", "identity"]

_EPS = 1e-6


def focused_feature_map(x: Tensor, factor: float = 3) -> Tensor:
    """‖x‖ · xᵖ / ‖xᵖ‖ over the last axis: the norm stays, the direction moves to the nearest axis (eq. 6, 2308.00442).

    Args:
        x: non-negative features, any shape.
        factor: the power p; 1 returns `x`.

    Returns:
        The shape and dtype of `x`; computed in float32 at least, on x divided by its maximum, so no power overflows.

    Raises:
        ValueError: for a factor below 1.
    """
    check_number("factor", factor, at_least=1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The direction does not depend on the divisor, so no gradient need flow through it.
    powered = (wide / wide.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny).detach()) ** factor
    direction = F.normalize(powered, dim=-1)
    return (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * direction).to(x.dtype)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _focused(x: Tensor) -> Tensor:
    return focused_feature_map(F.relu(x) + 1e-6)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: Mapping[str, FeatureMap] = {"elu": _elu, "relu": F.relu, "focused": _focused, "identity": _identity}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMapName | FeatureMap = "elu",
    eps: float = _EPS,
    kernel: Kernel = AUTO,
) -> Tensor:
    """φ(qᵢ) Σⱼ φ(kⱼ)ᵀvⱼ / (φ(qᵢ) · Σⱼ φ(kⱼ)): 4·N·D² multiply-adds a head (eq. 5, arXiv 2006.16236).

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: "elu" (elu + 1), "relu", "focused" (cubed relu at unchanged norm, over the head), "identity" (the
            inputs are features), or a function of a tensor that keeps its shape.
        eps: added to φ(qᵢ) · meanⱼ φ(kⱼ); a query without any matching key gives 0.
        kernel: "auto" uses the one measured to be fastest; "reference" is PyTorch's products, "triton" one fused
            pair of kernels for CUDA devices and the maps with a name.

    Returns:
        (B, H, N, E) in the dtype of `value`; features and sums are float32 at least.

    Raises:
        ValueError: for a wrong rank, head size, batch or dtype, an unknown feature map, or a `kernel` that is unknown
            or cannot run on these tensors.
    """
    check_heads(query, key, value)
    dispatch.check_kernel(kernel, (*CHOOSING, *LINEAR_KERNELS))
    features = resolve_feature_map(feature_map)
    name = feature_map if isinstance(feature_map, str) else ""
    choice = dispatch.choose_linear_kernel(query, key, value, name, kernel)
    if kernel not in CHOOSING and choice.reason is not None:
        raise ValueError(f"the kernel {kernel!r} cannot run here: {choice.reason}")
    return dispatch.linear_attention(query, key, value, name, features, eps, choice.kernel)


def resolve_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
    """The function of a feature map's name; raises ValueError, listing the known ones, for another."""
    if callable(feature_map):
        return feature_map
    check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
    return FEATURE_MAPS[feature_map]


@dataclass(frozen=True)
class LinearAttention(AttentionMethod):
    """A feature map in place of the softmax, for models trained with it; without training the image is lost.

    In joint attention image queries read the image linearly and the text exactly, weighted by the number of keys, as
    in MM-EDiT (arXiv 2503.16726); text queries stay exact.

    Attributes:
        feature_map: "elu", "relu", "focused" or "identity", see `linear_attention`.
    """

    feature_map: FeatureMapName = option("elu", "what replaces the exponential of the softmax")

    kind: ClassVar[str] = "linear"
    title: ClassVar[str] = "Linear"
    source: ClassVar[str] = "arXiv 2006.16236"
    presets: ClassVar[Mapping[str, Preset]] = {"linear": Preset(min_tokens=1024)}
    # A feature map after the rotation is another operator than the rotation after a feature map.
    supports_rotary: ClassVar[bool] = False

    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        batch, tokens, _ = like.shape
        heads = like.sized(batch, layer.heads, tokens, layer.head_dim)
        choice = dispatch.choose_linear_kernel(heads, heads, heads, self.feature_map, layer.kernel or AUTO)
        return Route(partial(self._run, kernel=choice.kernel), choice.kernel, choice.reason, None, choice.speedup)

    def _run(self, layer: Layer, hidden_states: Tensor, call: Call, *, kernel: str) -> Tensor:
        query, key, value = layer.project(Selection(hidden_states, hidden_states))
        features = FEATURE_MAPS[self.feature_map]
        mixed = dispatch.linear_attention(query, key, value, self.feature_map, features, _EPS, kernel)
        if layer.context is not None:
            share = key.shape[2] / (key.shape[2] + layer.context[0].shape[2])
            mixed = share * mixed + (1 - share) * layer.attention(query, *layer.context)
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        # Text queries are exact over image and text; image queries are exact over the text alone.
        text = 4 * shape.width * shape.context * (2 * shape.tokens + shape.context)
        core = 4 * shape.tokens * shape.width * shape.head_dim + 3 * shape.tokens * shape.width
        return shape.projection_flops(shape.tokens, shape.tokens) + core + text
