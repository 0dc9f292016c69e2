"""The measurements of a calibration, as data: JSON, a table, and a heat map of layers over time."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attngen.calibration import plot
from attngen.files import write_file
from attngen.methods import AttentionMethod, method_from_dict

FORMAT, VERSION = "attngen-measurements", 1


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
        speedup: cost of all attention layers over all calls, exact by planned.
        bound: the one that was given: {"max_error": ...} or {"speedup": ...}.
        checks: every plan that was run: {"predicted": ..., "error": ..., "speedup": ...}.
        settings: seed, device, dtype, number of runs.
    """

    layers: tuple[LayerMeasurements, ...]
    starts: tuple[float, ...]
    calls: tuple[int, ...]
    cost: str
    error: float
    predicted_error: float
    speedup: float
    bound: dict[str, float]
    checks: tuple[dict[str, float], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        content = asdict(self)
        for layer, data in zip(self.layers, content["layers"], strict=True):
            for cell, cell_data in zip(layer.cells, data["cells"], strict=True):
                for trial, trial_data in zip(cell.trials, cell_data["trials"], strict=True):
                    trial_data["method"] = trial.method.to_dict()
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(content))}

    @classmethod
    def from_dict(cls, data: Any) -> Measurements:
        """The measurements that `to_dict` wrote.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f'not a measurements file: expected "format": "{FORMAT}", "version": {VERSION}')
        try:
            content = {name: value for name, value in data.items() if name not in ("format", "version")}
            content["layers"] = tuple(_layer_from_dict(layer) for layer in content["layers"])
            for name in ("starts", "calls", "checks"):
                content[name] = tuple(content[name])
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"these measurements are damaged: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON."""
        write_file(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measurements:
        """Read a file that `save` wrote; raises ValueError, naming the file, if it is missing or something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the measurements {os.fspath(path)}: {error}") from error

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
        saved = "as fast" if self.cost == "time" else "fewer operations"
        lines.append(
            f"relative error {self.error:.4f} (predicted {self.predicted_error:.4f}), "
            f"{self.speedup:.2f} times {saved} in attention layers"
        )
        return "\n".join(lines)


def _describe(cell: Cell) -> str:
    taken = cell.taken
    return "exact" if cell.chosen == 0 else f"{taken.method.label} ({taken.error:.3f})"


def _layer_from_dict(data: dict[str, Any]) -> LayerMeasurements:
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
