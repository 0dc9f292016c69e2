"""What a patch does: for each layer the grid, tokens, agents, method by stage, and operations exact and now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attngen.checks import Grid


@dataclass(frozen=True)
class StageReport:
    """One layer in one stage.

    Attributes:
        start: time from which the stage holds, 1 is noise.
        method: kind of the method that runs.
        agents: number of agents, or None for a method without.
        flops: floating-point operations of the layer for one picture.
        why_exact: why the layer is exact in this stage, or None where its method runs.
        kernel: the path that computes the method, see `attngen.kernels.dispatch`: one of its names, the name of the
            attention backend the user chose, or None where there is one way only.
        speedup: how many times faster than the best softmax attention its attention was measured to be at sizes like
            these, without projections; None where that was not measured.
        why_not_kernel: why it is not the kernel that was asked for, or None.
    """

    start: float
    method: str
    agents: int | None
    flops: int
    why_exact: str | None
    kernel: str | None = None
    speedup: float | None = None
    why_not_kernel: str | None = None

    def __str__(self) -> str:
        if self.why_exact is not None:
            return f"exact: {self.why_exact}"
        agents = "" if self.agents is None else f" ({self.agents})"
        kernel = "" if self.kernel is None else f" by {self.kernel}"
        slower = f", {self.speedup:.2f}x the speed of softmax" if self.is_slower else ""
        return f"{self.method}{agents}{kernel}{slower}"

    @property
    def is_slower(self) -> bool:
        """Whether softmax attention was measured to be faster, by more than 2%."""
        return self.speedup is not None and self.speedup < 0.98


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        model: component of the pipeline, "" for a bare model.
        name: module name.
        grid: (height, width) in tokens, or None for a layer left alone.
        tokens: height times width.
        heads: attention heads.
        head_dim: size of a head.
        flops_exact: operations with softmax attention, projections included, for one picture.
        stages: one entry a stage; empty for a layer left alone.
        left_alone: why the patch did not touch it, or None.
        learned_weights: numbers that the patch put beside it; see `attngen.LearnedLayers`.
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
        return any(stage.why_exact is None for stage in self.stages)


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
        """Operations of all patched layers with softmax attention, for one picture and one network call."""
        return sum(layer.flops_exact or 0 for layer in self.patched)

    @property
    def flops(self) -> tuple[int, ...]:
        """The same as patched, in each stage."""
        return tuple(sum(layer.stages[i].flops for layer in self.patched) for i in range(len(self.starts)))

    @property
    def learned_weights(self) -> int:
        """Numbers that the patch put beside all layers."""
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
        header = ("layer", "grid", "tokens", *(f"from {start:g}" for start in self.starts), "GFLOP", "of exact")
        rows = [self._row(layer) for layer in self.patched]
        lines = _table(header, rows)
        if self.flops_exact:
            shares = zip(self.starts, self.flops, strict=True)
            now = ", ".join(f"{flops / self.flops_exact:.1%} from {start:g}" for start, flops in shares)
            lines.append(f"attention layers: {self.flops_exact / 1e9:.2f} GFLOP exact; now {now}")
            if self.learned_weights:
                learned = sum(layer.learned_weights > 0 for layer in self.patched)
                lines.append(f"learned weights: {self.learned_weights:,} beside {learned} layers")
        else:
            lines = ["no layer is patched"]
        return "\n".join([*lines, *self._other_kernels(), *self._left_alone()])

    def _row(self, layer: LayerReport) -> tuple[str, ...]:
        assert layer.grid is not None and layer.flops_exact is not None
        cells = [str(stage) for stage in layer.stages]
        flops = "/".join(f"{stage.flops / 1e9:.3f}" for stage in layer.stages)
        share = "/".join(f"{stage.flops / layer.flops_exact:.0%}" for stage in layer.stages)
        name = f"{layer.model}.{layer.name}" if layer.model else layer.name
        return (name, f"{layer.grid[0]}x{layer.grid[1]}", str(layer.tokens), *cells, flops, share)

    def _other_kernels(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for layer in self.patched:
            for reason in {stage.why_not_kernel for stage in layer.stages if stage.why_not_kernel is not None}:
                reasons.setdefault(reason, []).append(layer.name)
        return [f"another kernel than asked for: {len(n)} layers ({n[0]}, …): {r}" for r, n in reasons.items()]

    def _left_alone(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.left_alone is not None:
                reasons.setdefault(layer.left_alone, []).append(layer.name)
        return [f"left alone: {len(n)} layers ({n[0]}{', …' if len(n) > 1 else ''}): {r}" for r, n in reasons.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
