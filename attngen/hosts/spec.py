"""The part of a patch that is attached to a layer, and the one decision of what the layer runs in a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import nn

from attngen.checks import Grid, sides
from attngen.kernels.dispatch import AUTO, CHOOSING
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import Route, exact
from attngen.layers.trace import note
from attngen.methods.base import AttentionMethod
from attngen.methods.downsample import DownsampledKV
from attngen.methods.softmax import ASKED_FOR, SoftmaxAttention

SPEC = "attngen"
"""Attribute of an attention module that holds its `LayerSpec`."""

MASKED = "an attention mask was given"


@dataclass(frozen=True)
class LayerSpec:
    """Attached to each patched layer, not to its processor: diffusers creates processors without arguments.

    Attributes:
        name: of the layer in its model.
        group: equal for layers with equal sizes and methods; see `attngen.layers.trace`.
        original: the layer's own processor; it computes the layer wherever it is exact.
        methods: one a stage of the plan.
        min_tokens: layers with fewer tokens stay exact.
        level: how many attention resolutions of the model are finer than this layer's.
        max_levels: only layers whose level is below it take part; None for all.
        rotary: whether the layer rotates queries and keys by position.
        kernel: which of attngen's kernels computes the methods, see `attngen.kernels.dispatch`.
        core: whether the layer's own processor runs, see `attngen.hosts.core`.
        references: what reduces keys of reference images, one a stage; empty where they stay exact.
    """

    name: str
    group: str
    original: Any
    methods: tuple[AttentionMethod, ...]
    min_tokens: int = 0
    level: int = 0
    max_levels: int | None = None
    rotary: bool = False
    kernel: str = AUTO
    core: bool = False
    references: tuple[AttentionMethod, ...] = ()

    def method(self, call: Call) -> AttentionMethod:
        """The method of a call."""
        return self.methods[int(call.stage)] if call.method is None else call.method

    def reduction(self, call: Call) -> int | None:
        """The factor by which keys of reference images are reduced in a call, or None where none are."""
        return self.reduction_at(int(call.stage)) if call.references else None

    def reduction_at(self, stage: int) -> int | None:
        """The factor by which a stage reduces keys of reference images, or None where they stay exact."""
        method = self.references[stage] if self.references else None
        return method.factor if isinstance(method, DownsampledKV) and method.factor > 1 else None

    def why_exact(self, method: AttentionMethod, grid: Grid, tokens: int) -> str | None:
        """The reason why the plan or the tokens leave the layer exact; None where its method decides."""
        if math.prod(grid) != tokens:
            return f"{tokens} tokens do not fill its grid of {sides(grid)}"
        if isinstance(method, SoftmaxAttention):
            return ASKED_FOR
        if self.max_levels is not None and self.level >= self.max_levels:
            return f"not among the {self.max_levels} finest level(s)"
        if tokens < self.min_tokens:
            return f"below {self.min_tokens} tokens"
        if self.rotary and not method.supports_rotary:
            return f"{method.kind} attention does not fit layers with rotary positions"
        if self.core and method.needs_tokens:
            return f"{method.kind} attention needs the layer's input, and the model's own processor projects it"
        return None


def spec_of(attn: nn.Module) -> LayerSpec | None:
    """The spec attached to a layer, or None."""
    return getattr(attn, SPEC, None)


def decide(layer: Layer, call: Call | None, like: Like, why: str | None = None) -> Route:
    """The route of a layer in a call: for the processor that runs it, and for the report.

    Exact wherever the payload does not describe these tokens: merged by another tool, a shard of them, tokens with
    objects among them.

    Args:
        layer: the layer.
        call: of the denoiser, or None where no payload reached the layer.
        like: of its image tokens (B, N, C).
        why: a reason of the host for exact attention, such as a mask, or None.
    """
    spec = spec_of(layer.attn)
    if spec is None or call is None:
        return exact("it was called outside of its patched model")
    if why is not None:
        return exact(why)
    if _scores_skipped(layer.attn):
        return exact("a guider skips its attention")
    method = spec.method(call)
    why = spec.why_exact(method, call.grid, like.shape[1])
    if why is not None:
        return exact(why)
    route = method.route(layer, call, like)
    if route.vain is not None and spec.min_tokens > 0:
        # The plan leaves it to attngen where the method pays; without `min_tokens` the user has decided.
        return exact(route.vain)
    return _explained(route, layer, method)


def _explained(route: Route, layer: Layer, method: AttentionMethod) -> Route:
    """`route`, with a reason wherever its kernel is not the one asked for."""
    if route.run is None or route.why is not None or layer.wanted in (*CHOOSING, route.kernel):
        return route
    if layer.kernel is None:
        return route._replace(why="an attention backend was chosen")
    return route._replace(why=f"{method.kind} attention has no path {layer.wanted!r} here")


def noted(route: Route, attn: nn.Module, call: Call | None, reduces: bool = False) -> Route:
    """`route`, counted where a trace runs; `reduces` where it has fewer keys of reference images."""
    if call is not None and call.trace is not None:
        spec = spec_of(attn)
        if spec is not None:
            # Names differ from layer to layer, and a guard on them would keep blocks from sharing a compiled graph.
            name = spec.group if torch.compiler.is_compiling() else spec.name
            references = spec.references[int(call.stage)].label if reduces else ""
            note(call.trace, name, call.stage, route, references)
    return route


def _scores_skipped(attn: nn.Module) -> bool:
    """Whether a diffusers guider replaces this layer's attention with its values, which requires exact attention."""
    registry = getattr(attn, "_diffusers_hook", None)
    if registry is None:
        return False
    return any(isinstance(h, AttentionProcessorSkipHook) and h.skip_attention_scores for h in registry.hooks.values())
