"""Rows of a report, made of the routes that the processors run; and the warning about a call that gains nothing."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from attngen.checks import Grid, sides
from attngen.hosts import hooks
from attngen.hosts.core import core_enter
from attngen.hosts.cost import other_flops
from attngen.hosts.families import default_grid, family_of, halved, halvings, has_levels
from attngen.hosts.product import core_layer, why_missed, why_unreachable
from attngen.hosts.references import num_cells
from attngen.hosts.spec import MASKED, LayerSpec, decide, spec_of
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import EXACT
from attngen.learned.modules import num_weights
from attngen.methods.base import LayerShape
from attngen.methods.softmax import SoftmaxAttention
from attngen.report import LayerReport, StageReport


class Review:
    """The warning of `RootHook` about a new call: a patch that does nothing there, or costs more than it saves."""

    def __init__(self, starts: tuple[float, ...]) -> None:
        self.starts = starts

    def __call__(self, model: nn.Module, seen: hooks.Seen) -> str | None:
        layers = rows_of(model, "", self.starts, seen)
        wanted = [layer for layer in layers if any(stage.method != SoftmaxAttention.kind for stage in layer.stages)]
        if not wanted:
            return None
        what = f"{type(model).__name__} at a grid of {sides(seen.grid)}"
        if not any(layer.is_active for layer in wanted):
            reason = next(stage.why_exact for stage in wanted[0].stages if stage.method != SoftmaxAttention.kind)
            return f"the patch does nothing for {what}: {wanted[0].name} is exact because {reason}"
        return next((message for layer in wanted if (message := _cost_warning(layer, what))), None)


def _cost_warning(layer: LayerReport, what: str) -> str | None:
    assert layer.flops_exact is not None
    for stage in layer.stages:
        if stage.why_exact is None and stage.flops > layer.flops_exact:
            return (
                f"{stage.method} costs more than softmax attention in {layer.name} of {what}: "
                f"{stage.flops / layer.flops_exact:.2f} times the operations"
            )
        if stage.is_slower:
            return (
                f"{stage.method} attention by {stage.kernel} is slower than softmax attention in {layer.name} "
                f"of {what}: {stage.speedup:.2f} times its speed, as measured at sizes like these; "
                "min_tokens leaves small layers exact"
            )
    return None


def default_call(model: nn.Module) -> hooks.Seen:
    """The call that the model's configuration was made for, with guidance; pipelines record no gradients."""
    grid = default_grid(model)
    dtype, device = getattr(model, "dtype", torch.float32), getattr(model, "device", torch.device("cpu"))
    return hooks.Seen(grid, 0, math.prod(grid), 2, dtype, device, model.training and torch.is_grad_enabled())


def rows_of(
    model: nn.Module,
    component: str,
    starts: tuple[float, ...],
    seen: hooks.Seen,
    grids: Mapping[str, Grid] = MappingProxyType({}),
) -> list[LayerReport]:
    """Rows of the layers whose processors are ours.

    Args:
        model: patched.
        component: its name in the pipeline.
        starts: of the plan's stages.
        seen: the call that the rows are for.
        grids: by block, where that call has been made; otherwise they follow from the model's structure.
    """
    family = family_of(model)
    on_one_grid = family is not None and not has_levels(family)
    rows: list[LayerReport] = []
    with _as_in(seen):
        for name, attn in hooks.patched_layers(model).items():
            if hooks.is_ours(attn):
                grid = seen.grid if on_one_grid else _grid_of(model, name, seen.grid, grids)
                tokens = seen.tokens if on_one_grid else math.prod(grid)
                rows.append(_layer_row(component, name, attn, starts, seen._replace(grid=grid, tokens=tokens)))
    return rows


def _grid_of(model: nn.Module, name: str, latents: Grid, grids: Mapping[str, Grid]) -> Grid:
    """The grid of a layer of a UNet: what its block had, or what follows from its place in the model."""
    block = next((block for block in grids if name.startswith(f"{block}.")), None)
    return halved(latents, halvings(model, name)) if block is None else grids[block]


@contextmanager
def _as_in(seen: hooks.Seen) -> Generator[None]:
    """Gradients and autocast as they were in a call: routes depend on them."""
    kind = seen.device.type
    with torch.set_grad_enabled(seen.records):
        if torch.amp.is_autocast_available(kind):
            with torch.autocast(kind, dtype=seen.autocast, enabled=seen.autocast is not None):
                yield
        else:
            yield


def _layer_row(component: str, name: str, attn: Any, starts: tuple[float, ...], seen: hooks.Seen) -> LayerReport:
    spec = spec_of(attn)
    assert spec is not None
    layer = _layer_of(attn, spec, seen.text + seen.references)
    if isinstance(layer, str):
        return left_alone(component, name, layer)
    shape = layer_shape(layer, seen.grid)
    stages = tuple(_stage_row(spec, layer, shape, i, start, seen) for i, start in enumerate(starts))
    return LayerReport(
        component,
        name,
        seen.grid,
        seen.tokens,
        layer.heads,
        layer.head_dim,
        shape.exact_flops(),
        stages,
        None,
        num_weights(attn),
        layer.context_tokens,
    )


def others_of(model: nn.Module, rows: Sequence[LayerReport], seen: hooks.Seen) -> int:
    """A model's operations besides attention products, in a call, from the rows of its layers."""
    text = max((row.context for row in rows), default=0) - seen.references
    return other_flops(model, seen.grid, max(0, text), seen.references)


def _layer_of(attn: Any, spec: LayerSpec, context: int) -> Layer | str:
    """The layer as it was in the last call, or as its processor sees it; a reason where it is not known yet."""
    if not spec.core:
        return attn.processor.layer(attn, context)
    enter = core_enter(attn)
    sizes = None if enter is None else enter.seen
    if sizes is None:
        heads, width = getattr(attn, "heads", None), getattr(attn, "inner_dim", None)
        if not isinstance(heads, int) or not isinstance(width, int):
            return "its sizes are known after the first call"
        sizes = heads, width // heads, context
    return core_layer(attn, *sizes)


def _stage_row(
    spec: LayerSpec, layer: Layer, shape: LayerShape, stage: int, start: float, seen: hooks.Seen
) -> StageReport:
    method = spec.methods[stage]
    tokens = Like((seen.batch, seen.tokens, layer.channels), seen.dtype, seen.device, seen.requires_grad)
    why = f"decided per call: {MASKED}" if seen.masked else _why_not_caught(layer.attn) if spec.core else None
    route = decide(layer, Call(str(stage), seen.grid, context=seen.text), layer.like(tokens), why)
    factor = spec.reduction_at(stage) if seen.reference_grids and why is None else None
    references, others = (None, 0) if factor is None else (spec.references[stage].label, _left_out(seen, factor))
    kept = replace(shape, context=shape.context - others)
    flops = kept.exact_flops() if route.kernel == EXACT else method.flops(kept, route.kernel)
    # The tokens of the references that give no key are projected, and ask themselves.
    flops += shape.projection_flops(0, 0) - kept.projection_flops(0, 0)
    flops += 4 * shape.width * others * (shape.tokens + kept.context)
    if route.kernel == EXACT:
        return StageReport(start, method.kind, None, flops, route.why, references=references)
    how = route.kernel, route.speedup, route.why, references
    return StageReport(start, method.kind, route.agents, flops, None, *how)


def _left_out(seen: hooks.Seen, factor: int) -> int:
    """Tokens of reference images that give no key of their own."""
    return seen.references - num_cells(seen.reference_grids, factor)


def _why_not_caught(attn: Any) -> str | None:
    enter = core_enter(attn)
    return why_missed(attn) if enter is not None and enter.missed else why_unreachable(attn)


def layer_shape(layer: Layer, grid: Grid) -> LayerShape:
    """Sizes of a layer; which projections it has decides whether text takes part and who projects the output."""
    attn = layer.attn
    return LayerShape(
        grid,
        channels=layer.channels,
        width=layer.width,
        num_heads=layer.heads,
        context=layer.context_tokens,
        has_output=not getattr(attn, "pre_only", False),
        has_context_output=getattr(attn, "to_add_out", None) is not None,
    )


def left_alone(component: str, name: str, reason: str) -> LayerReport:
    """The row of a layer, or of a whole model, that the patch did not change."""
    return LayerReport(component, name, None, None, None, None, None, (), reason)
