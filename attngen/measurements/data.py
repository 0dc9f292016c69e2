"""The measurements of a calibration: JSON values, a table, and a heat map of layers over time."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attngen.measurements import plot
from attngen.methods import AttentionMethod, method_from_dict


@dataclass(frozen=True)
class Trial:
    """One method in one layer and stage.

    Attributes:
        method: with its fitted options.
        error: relative error of the layer's output.
        cost: seconds or operations of one call of the layer.
        error_as_given: of the candidate before it was fitted, or None where nothing is fitted.
    """

    method: AttentionMethod
    error: float
    cost: float
    error_as_given: float | None = None


@dataclass(frozen=True)
class Cell:
    """One layer in one stage.

    Attributes:
        start: time at which the stage begins.
        influence: relative error of the result by relative error of this layer.
        trials: the first is exact attention.
        chosen: index of the trial in the plan.
    """

    start: float
    influence: float
    trials: tuple[Trial, ...]
    chosen: int

    @property
    def taken(self) -> Trial:
        return self.trials[self.chosen]


@dataclass(frozen=True)
class LayerMeasurements:
    """One attention layer.

    Attributes:
        name: module name.
        tokens: of the image.
        cells: one a stage.
    """

    name: str
    tokens: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Measurements:
    """Everything behind a calibrated plan.

    Attributes:
        layers: in the order of the model.
        starts: times at which the stages begin.
        calls: network calls in each stage.
        cost: "time" (seconds) or "flops" (operations).
        error: relative error of the pipeline's final latents with the plan, measured by running it.
        predicted_error: the same, as it was predicted from the layers.
        speedup: what the plan was chosen for. With cost="time" how many times faster than exact attention the whole
            pipeline is, the median of `rounds`; with "flops" how many times fewer operations its attention layers need.
        attention_speedup: cost of all attention layers over all calls, exact by planned.
        bound: those that were given, of "max_error" and "speedup".
        rounds: seconds of a whole run of the pipeline, (exact, with the plan), measured in turn; none with "flops" and
            for a plan that is exact everywhere.
        why_exact: why the plan is exact attention everywhere, or None.
        checks: every plan that was run: {"predicted": ..., "error": ..., "speedup": ...}.
        settings: steps, seed, device, dtype, threads, number of runs.
    """

    layers: tuple[LayerMeasurements, ...]
    starts: tuple[float, ...]
    calls: tuple[int, ...]
    cost: str
    error: float
    predicted_error: float
    speedup: float
    attention_speedup: float
    bound: dict[str, float]
    rounds: tuple[tuple[float, float], ...] = ()
    why_exact: str | None = None
    checks: tuple[dict[str, float], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_exact(self) -> float | None:
        """Median seconds of a whole run with exact attention, or None where none was timed."""
        return statistics.median(exact for exact, _ in self.rounds) if self.rounds else None

    @property
    def seconds(self) -> float | None:
        """Median seconds of a whole run with the plan, or None where none was timed."""
        return statistics.median(own for _, own in self.rounds) if self.rounds else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        content = asdict(self)
        for layer, data in zip(self.layers, content["layers"], strict=True):
            for cell, cell_data in zip(layer.cells, data["cells"], strict=True):
                for trial, trial_data in zip(cell.trials, cell_data["trials"], strict=True):
                    trial_data["method"] = trial.method.to_dict()
        return json.loads(json.dumps(content))

    @classmethod
    def from_dict(cls, data: Any) -> Measurements:
        """The measurements that `to_dict` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            content = dict(data)
            content["layers"] = tuple(_layer_from_dict(layer) for layer in content["layers"])
            for name in ("starts", "calls", "checks"):
                content[name] = tuple(content[name])
            content["rounds"] = tuple((float(exact), float(own)) for exact, own in content["rounds"])
            return cls(**content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"these measurements are damaged: {error!r}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the heat map, a PNG: layers over time, how hard each is to approximate, and the plan's method there.

        Raises:
            ImportError: without matplotlib, with the command that installs it.
            ValueError: for a file name that does not end in .png.
        """
        plot.draw(self, Path(path))

    def __str__(self) -> str:
        rows = [("layer", "tokens", *(f"from {start:g}" for start in self.starts))]
        for layer in self.layers:
            rows.append((layer.name, str(layer.tokens), *(_describe(cell) for cell in layer.cells)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The outcome in one line: seconds first."""
        if self.why_exact is not None:
            return f"exact attention everywhere: {self.why_exact}"
        error = f"relative error {self.error:.4f} (predicted {self.predicted_error:.4f})"
        if self.cost == "flops":
            return f"{error}, {self.speedup:.2f} times fewer operations in attention layers"
        ratios = sorted(exact / own for exact, own in self.rounds)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds"
        return (
            f"{self.seconds_exact:.2f} s exact, {self.seconds:.2f} s with the plan: {self.speedup:.2f} times as fast"
            f" ({spread}); {error}; attention layers {self.attention_speedup:.2f} times as fast"
        )


def _describe(cell: Cell) -> str:
    taken = cell.taken
    return "exact" if cell.chosen == 0 else f"{taken.method.label} ({taken.error:.3f})"


def _layer_from_dict(data: Mapping[str, Any]) -> LayerMeasurements:
    cells = tuple(
        Cell(
            cell["start"],
            cell["influence"],
            tuple(Trial(**{**trial, "method": method_from_dict(trial["method"])}) for trial in cell["trials"]),
            cell["chosen"],
        )
        for cell in data["cells"]
    )
    return LayerMeasurements(data["name"], data["tokens"], cells)
