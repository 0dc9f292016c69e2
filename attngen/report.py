"""What a patch does: for each layer the grid, tokens, agents, method by stage, and operations exact and now.

`attngen.layer_rows` makes the rows of the routes that the processors run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from attngen.checks import Grid
from attngen.kernels.crossovers import TOLERANCE
from attngen.tables import pattern, table


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
        context: tokens of text and references that take part.
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
    context: int = 0

    @property
    def products(self) -> int:
        """Operations of both products of softmax attention, without projections, for one sample."""
        if self.tokens is None or self.heads is None or self.head_dim is None:
            return 0
        return 4 * self.heads * self.head_dim * (self.tokens + self.context) ** 2

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
        others: operations of each model besides attention products, by component, see `attngen.hosts.cost`.
    """

    layers: list[LayerReport]
    starts: tuple[float, ...]
    others: Mapping[str, int] = field(default_factory=dict[str, int])

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
    def attention_share(self) -> float | None:
        """The part that products of softmax attention are of the models' operations, estimated; None if unknown."""
        others = sum(self.others.values())
        products = sum(layer.products for layer in self.patched if layer.model in self.others)
        return products / (products + others) if products and others else None

    @property
    def most_speedup(self) -> float | None:
        """How many times faster the models get at most, whatever the attention: with none of its products."""
        return None if self.attention_share is None else 1 / (1 - self.attention_share)

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
            "attention_share": self.attention_share,
            "most_speedup": self.most_speedup,
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
            if self.attention_share is not None:
                lines.append(
                    f"attention products are {self.attention_share:.0%} of the model's operations at this size; no"
                    f" attention makes it more than {self.most_speedup:.2f}x as fast"
                )
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
