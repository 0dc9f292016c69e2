"""What a patch does: for each layer the grid, tokens, agents, method by stage, and operations exact and now.

The rows are made of the routes that the processors run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from attngen.checks import Grid, sides
from attngen.hosts import hooks
from attngen.hosts.core import core_enter
from attngen.hosts.families import default_grid, family_of, halved, halvings, has_levels
from attngen.hosts.product import core_layer, why_missed, why_unreachable
from attngen.hosts.references import num_cells
from attngen.hosts.spec import MASKED, LayerSpec, decide, spec_of
from attngen.kernels.crossovers import TOLERANCE
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import EXACT
from attngen.learned.modules import num_weights
from attngen.methods.base import LayerShape
from attngen.methods.softmax import SoftmaxAttention


@dataclass(frozen=True)
class StageReport:
    """One layer in one stage.

    Attributes:
        start: time from which the stage holds, 1 is noise.
        method: kind of the method that runs.
        agents: number of agents, or None for a method without.
        flops: floating-point operations of the layer for one sample.
        why_exact: why the layer is exact in this stage, or None where its method runs.
        kernel: what computes the method, see `attngen.layers.route.Route`; None where the layer is exact.
        speedup: how many times faster than the best softmax attention its attention was measured to be at sizes like
            these, without projections; None where that was not measured.
        why_not_kernel: why it is not the kernel that was asked for, or None.
        references: what reduces the keys of reference images, or None.
    """

    start: float
    method: str
    agents: int | None
    flops: int
    why_exact: str | None
    kernel: str | None = None
    speedup: float | None = None
    why_not_kernel: str | None = None
    references: str | None = None

    def __str__(self) -> str:
        return f"{self._image()}{'' if self.references is None else f', references {self.references}'}"

    def _image(self) -> str:
        if self.why_exact is not None:
            return f"exact: {self.why_exact}"
        agents = "" if self.agents is None else f" ({self.agents})"
        slower = f", {self.speedup:.2f}x the speed of softmax" if self.is_slower else ""
        return f"{self.method}{agents} by {self.kernel}{slower}"

    @property
    def is_slower(self) -> bool:
        """Whether softmax attention was measured to be faster, by more than 2%."""
        return self.speedup is not None and self.speedup < TOLERANCE


@dataclass(frozen=True)
class LayerReport:
    """One attention layer, or a whole model that was left alone.

    Attributes:
        model: component of the pipeline, "" for a bare model.
        name: module name; "" for a whole model.
        grid: (height, width) or (frames, height, width) in tokens, or None for a layer left alone.
        tokens: in the grid.
        heads: attention heads.
        head_dim: size of a head.
        flops_exact: operations with softmax attention, projections included, for one sample.
        stages: one entry a stage; empty for a layer left alone.
        left_alone: why the patch did not change it, or None.
        learned_weights: number of parameters the patch added; see `attngen.LearnedLayers`.
    """

    model: str
    name: str
    grid: Grid | None
    tokens: int | None
    heads: int | None
    head_dim: int | None
    flops_exact: int | None
    stages: tuple[StageReport, ...]
    left_alone: str | None
    learned_weights: int = 0

    @property
    def is_active(self) -> bool:
        """Whether a method other than exact attention runs in some stage."""
        return any(stage.why_exact is None or stage.references is not None for stage in self.stages)

    @property
    def path(self) -> str:
        """Component and name, separated by a dot."""
        return ".".join(part for part in (self.model, self.name) if part)


@dataclass(frozen=True)
class Report:
    """All attention layers of the patched models. `str()` is a table, `to_dict()` is JSON.

    Attributes:
        layers: patched layers in the order of the model, then those left alone.
        starts: times at which the plan's stages start.
    """

    layers: list[LayerReport]
    starts: tuple[float, ...]

    @property
    def patched(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.left_alone is None]

    @property
    def flops_exact(self) -> int:
        """Operations of all patched layers with softmax attention, for one sample and one network call."""
        return sum(layer.flops_exact or 0 for layer in self.patched)

    @property
    def flops(self) -> tuple[int, ...]:
        """The same as patched, in each stage."""
        return tuple(sum(layer.stages[i].flops for layer in self.patched) for i in range(len(self.starts)))

    @property
    def learned_weights(self) -> int:
        """Number of parameters the patch added to all layers."""
        return sum(layer.learned_weights for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "starts": list(self.starts),
            "flops_exact": self.flops_exact,
            "flops": list(self.flops),
            "learned_weights": self.learned_weights,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table with one line for each group of layers that differ in their names alone."""
        header = ("layers", "number", "grid", "tokens", *(f"from {s:g}" for s in self.starts), "GFLOP", "of exact")
        lines = table(header, [_row(group) for group in _grouped(self.patched, _content)])
        if self.flops_exact:
            shares = zip(self.starts, self.flops, strict=True)
            now = ", ".join(f"{flops / self.flops_exact:.1%} from {start:g}" for start, flops in shares)
            lines.append(f"attention layers: {self.flops_exact / 1e9:.2f} GFLOP exact; now {now}")
            if self.learned_weights:
                learned = sum(layer.learned_weights > 0 for layer in self.patched)
                lines.append(f"learned weights: {self.learned_weights:,} in {learned} layers")
        else:
            lines = ["no layer is patched"]
        return "\n".join([*lines, *self._other_kernels(), *self._left_alone()])

    def _other_kernels(self) -> list[str]:
        reasons: dict[str, list[LayerReport]] = {}
        for layer in self.patched:
            for reason in {stage.why_not_kernel for stage in layer.stages if stage.why_not_kernel is not None}:
                reasons.setdefault(reason, []).append(layer)
        return [f"another kernel than asked for: {_names(layers)}: {reason}" for reason, layers in reasons.items()]

    def _left_alone(self) -> list[str]:
        alone = [layer for layer in self.layers if layer.left_alone is not None]
        groups = _grouped(alone, lambda layer: (layer.model, layer.left_alone))
        return [f"unchanged: {_names(group)}: {group[0].left_alone}" for group in groups]


def _grouped(layers: Iterable[LayerReport], key: Callable[[LayerReport], Any]) -> list[list[LayerReport]]:
    groups: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.values())


def _content(layer: LayerReport) -> tuple[Any, ...]:
    return layer.model, layer.grid, layer.heads, layer.head_dim, layer.flops_exact, layer.stages, layer.learned_weights


def _row(group: Sequence[LayerReport]) -> tuple[str, ...]:
    layer = group[0]
    assert layer.grid is not None and layer.flops_exact is not None
    cells = [str(stage) for stage in layer.stages]
    flops = "/".join(f"{stage.flops / 1e9:.3f}" for stage in layer.stages)
    share = "/".join(f"{stage.flops / layer.flops_exact:.0%}" for stage in layer.stages)
    grid = "x".join(map(str, layer.grid))
    return (pattern([one.path for one in group]), str(len(group)), grid, str(layer.tokens), *cells, flops, share)


def _names(layers: Sequence[LayerReport]) -> str:
    if len(layers) == 1 and not layers[0].name:
        return layers[0].path
    return f"{len(layers)} layer{'s' * (len(layers) > 1)} ({pattern([layer.path for layer in layers])})"


def pattern(names: Sequence[str]) -> str:
    """The names in short: `*` for numbers that differ, `a|b` for other parts that do, one pattern a number of parts."""
    by_length: dict[int, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        by_length.setdefault(len(parts), []).append(parts)
    return ", ".join(".".join(map(_alternatives, zip(*rows, strict=True))) for rows in by_length.values())


def _alternatives(words: tuple[str, ...]) -> str:
    different = list(dict.fromkeys(words))
    if len(different) == 1:
        return different[0]
    return "*" if len(different) > 3 or any(word.isdigit() for word in different) else "|".join(different)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


# Rows from routes


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
    )


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
