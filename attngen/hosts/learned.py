"""Layers of image tokens with learned weights beside them: what they compute, and how many weights they take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.hosts.layers import spec_of
from attngen.kernels.absorbed import (
    LayerSize,
    Projection,
    absorbed_agent_attention,
    effective_projection,
    layer_projections,
    why_not_absorbed,
)
from attngen.kernels.autocast import autocast_dtype
from attngen.kernels.crossovers import Choice
from attngen.learned.methods import LearnedMediators, LearnedMethod
from attngen.learned.modules import HeadMap, HiddenModule, LayerSizes, LearnedCore, LinearCore, MediatorCore
from attngen.methods.base import LayerShape
from attngen.tokens import convolve_tokens, join_heads, pool_tokens, split_heads

CORE = "attngen_core"
"""Child module of an attention module that holds its `LearnedCore`, hidden from parameters and state dict."""

_PARTS = ("to_q", "to_k", "to_v")


def put_core(attn: nn.Module, hidden: HiddenModule) -> None:
    """Put learned weights beside a layer."""
    attn.add_module(CORE, hidden)


def hidden_core(attn: nn.Module) -> HiddenModule | None:
    """The learned weights beside a layer, as they hang there, or None."""
    return attn._modules.get(CORE)  # type: ignore[return-value]


def drop_core(attn: nn.Module) -> None:
    """Take learned weights off a layer; nothing happens where there are none."""
    attn._modules.pop(CORE, None)


def sizes_of(attn: Any, grid: Grid, num_mediators: int) -> LayerSizes:
    """Sizes of a layer, with learned weights stored for a grid and a number of mediators."""
    channels = getattr(attn, "query_dim", None) or attn.inner_dim
    biases = [getattr(module, "bias", None) is not None for module in (attn.to_q, attn.to_out[0])]
    return LayerSizes(channels, attn.inner_dim, attn.heads, grid, num_mediators, *biases)


def copy_projections(attn: Any, core: LearnedCore) -> None:
    """Fill a core's own projections with the layer's.

    Raises:
        ValueError: if one of the layer's is more than one matrix.
    """
    projections = layer_projections(attn)
    if projections is None:
        raise ValueError("own projections start as the model's, and one of them is more than a matrix")
    assert core.projections is not None
    with torch.no_grad():
        for module, (weight, bias) in zip(core.projections.values(), projections, strict=True):
            linear: Any = module
            linear.weight.copy_(weight)
            if linear.bias is not None and bias is not None:
                linear.bias.copy_(bias)


def core_for(attn: Any, hidden_states: Tensor) -> Any:
    """The layer's weights where its input is; they follow it once if offloading moved the layer past them."""
    hidden = hidden_core(attn)
    assert hidden is not None
    core: LearnedCore = hidden.content
    parameter = next(core.parameters())
    if parameter.device != hidden_states.device:
        core.to(hidden_states.device)
    if parameter.dtype != hidden_states.dtype and not parameter.requires_grad:
        if autocast_dtype(hidden_states.device.type) is None:
            core.to(hidden_states.dtype)
    return core


def learned_attention(attn: Any, hidden_states: Tensor, method: LearnedMethod, grid: Grid, kernel: str) -> Tensor:
    """The layer's output (B, N, C) before its dropout.

    Args:
        attn: the layer, with its weights beside it.
        hidden_states: (B, N, C).
        method: what runs.
        grid: (height, width) of the tokens.
        kernel: the path wanted.
    """
    core = core_for(attn, hidden_states)
    if isinstance(method, LearnedMediators):
        if why_not_absorbed_here(attn, core, hidden_states, method, grid, kernel) is None:
            return _absorbed(attn, core, hidden_states, method, grid)
        convolved = _convolved_input(attn, core, hidden_states, grid) if method.convolution == "input" else None
        query, key, value = (project(attn, core, name, hidden_states) for name in _PARTS)
        mixed = method.mix(
            core, _normed(attn, query, "norm_q"), _normed(attn, key, "norm_k"), value, grid, kernel, convolved=convolved
        )
    else:
        assert isinstance(core, LinearCore)
        for_query = for_key = hidden_states
        if isinstance(core.query_map, nn.Sequential) and isinstance(core.key_map, nn.Sequential):
            for_query = hidden_states + core.query_map(hidden_states)
            for_key = hidden_states + core.key_map(hidden_states)
        inputs = (for_query, for_key, hidden_states)
        query, key, value = (project(attn, core, name, x) for name, x in zip(_PARTS, inputs, strict=True))
        mixed = method.mix(core, _normed(attn, query, "norm_q"), _normed(attn, key, "norm_k"), value, grid, kernel)
    mixed = mixed.to(query.dtype)
    return attn.to_out[0](mixed) if core.projections is None else core.projections["to_out"](mixed)


def project(attn: Any, core: LearnedCore, name: str, tokens: Tensor) -> Tensor:
    """Queries, keys or values (B, N, H · D) of `tokens`, by the core's own projection or the layer's."""
    if core.projections is not None:
        return core.projections[name](tokens)
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(tokens).chunk(3, dim=-1)[_PARTS.index(name)]
    return getattr(attn, name)(tokens)


def _normed(attn: Any, x: Tensor, norm: str) -> Tensor:
    """(B, N, H · D), each head normalised where the layer has that norm."""
    module = getattr(attn, norm, None)
    return x if module is None else join_heads(module(split_heads(x, attn.heads)).to(x.dtype))


def _convolved_input(attn: Any, core: MediatorCore, x: Tensor, grid: Grid) -> Tensor:
    """The convolution of the input by the projection of the values without its bias, (B, N, H · D)."""
    convolved = convolve_tokens(core.mixer.dwc, x, grid)
    nothing = torch.zeros_like(convolved[:1, :1])
    return project(attn, core, "to_v", convolved) - project(attn, core, "to_v", nothing)


def why_not_absorbed_here(
    attn: Any, core: MediatorCore, hidden_states: Tensor, method: LearnedMediators, grid: Grid, kernel: str
) -> str | None:
    """Why a mediator layer computes its projections, in a few words; None where they are absorbed."""
    if getattr(attn, "norm_q", None) is not None or getattr(attn, "norm_k", None) is not None:
        return "queries and keys are normalised"
    weight = getattr(attn.to_q, "weight", hidden_states)
    size = absorbed_size(core.sizes, hidden_states.shape[2], method, grid)
    reason = why_not_absorbed(size, hidden_states, weight, kernel)
    if reason is None and _projections(attn, core) is None:
        return "a projection is more than one matrix"
    return reason


def absorbed_size(sizes: LayerSizes, channels: int, method: LearnedMediators, grid: Grid) -> LayerSize:
    """Sizes of a layer as absorption counts them."""
    agents = method.num_agents_at(grid)
    assert agents is not None
    kept = 2 if method.convolution == "values" else 1
    return LayerSize(agents, sizes.head_dim, sizes.num_heads, channels, grid[0] * grid[1], kept_projections=kept)


def _projections(attn: Any, core: LearnedCore) -> list[Projection] | None:
    if core.projections is None:
        return layer_projections(attn)
    found = [effective_projection(module) for module in core.projections.values()]
    return None if any(projection is None for projection in found) else found  # type: ignore[return-value]


def _absorbed(attn: Any, core: MediatorCore, x: Tensor, method: LearnedMediators, grid: Grid) -> Tensor:
    projections, mediators, mixer = _projections(attn, core), method.pool_size(grid), core.mixer
    assert projections is not None
    query_factor, key_factor = core.factors()
    query, key, value, out = projections

    def convolve(tokens: Tensor) -> Tensor:
        return convolve_tokens(mixer.dwc, tokens, grid)

    return absorbed_agent_attention(
        x,
        pool_tokens(x, grid, mediators),
        query=_folded(query, query_factor, core.query_map),
        key=_folded(key, key_factor, core.key_map),
        value=value,
        out=out,
        num_heads=attn.heads,
        aggregation_bias=mixer.aggregation_bias(mediators, grid),
        broadcast_bias=mixer.broadcast_bias(mediators, grid).transpose(-1, -2),
        value_branch=convolve if method.convolution == "values" else None,
        input_branch=convolve if method.convolution == "input" else None,
    )


def _folded(projection: Projection, factor: Tensor, head_map: HeadMap | None) -> Projection:
    """The projection and what comes after it as one: outputs of each head multiplied by a factor (H,), then mapped."""
    weight, bias = projection
    wide = torch.promote_types(weight.dtype, torch.float32)
    by_head = weight.to(wide).unflatten(0, (len(factor), -1)) * factor[:, None, None]
    biases = None if bias is None else bias.to(wide).unflatten(0, (len(factor), 1, -1)) * factor[:, None, None]
    if head_map is not None:
        matrix = head_map.weight.to(wide)
        by_head = by_head + matrix.transpose(1, 2) @ by_head
        biases = head_map.bias.to(wide) if biases is None else head_map(biases)
    folded = None if biases is None else biases.flatten().to(weight.dtype)
    return Projection(by_head.flatten(0, 1).to(weight.dtype), folded)


class LayerCost(NamedTuple):
    """What a report says about a learned layer.

    Attributes:
        choice: the path it takes.
        flops: operations for one picture.
    """

    choice: Choice
    flops: int


def describe_learned(
    attn: Any, method: LearnedMethod, shape: LayerShape, hidden_states: Tensor, heads: tuple[Tensor, Tensor | None]
) -> LayerCost:
    """The path and cost of a learned layer.

    Args:
        attn: the layer.
        method: what runs.
        shape: its sizes.
        hidden_states: (B, N, C) with the right dtype, device and `requires_grad`, and no content.
        heads: queries (B, H, N, D) and mediators (B, H, M, D) of the same kind.
    """
    spec, core = spec_of(attn), hidden_core(attn)
    assert spec is not None and core is not None
    query, agents = heads
    choice = method.choose_path(query, query, query, agents, spec.kernel)
    if not isinstance(method, LearnedMediators):
        return LayerCost(choice, method.flops(shape))
    reason = why_not_absorbed_here(attn, core.content, hidden_states, method, shape.grid, spec.kernel)
    if reason is None:
        size = absorbed_size(core.content.sizes, shape.channels, method, shape.grid)
        return LayerCost(Choice("absorbed"), size.flops + method.absorbed_flops(shape))
    if spec.kernel == "absorbed":
        choice = choice._replace(reason=reason)
    return LayerCost(choice, method.flops(shape))


def learned_weights(attn: nn.Module) -> int:
    """Numbers that a patch put beside a layer."""
    hidden = hidden_core(attn)
    return 0 if hidden is None else sum(parameter.numel() for parameter in hidden.content.parameters())
