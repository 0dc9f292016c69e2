"""The heat map of a calibration: layers down, time across."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attngen.measurements.data import Cell, Measurements

CHEAP = 0.5
"""A layer's difficulty is the smallest error at this share of its exact cost, or that of its cheapest method."""


def draw(measurements: Measurements, path: Path) -> None:
    """Write the heat map. See `Measurements.plot`."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the heat map is a PNG file, so its name must end in .png, not {path.name!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat map needs matplotlib; pip install 'attngen[plot]' brings it") from error

    rows = len(measurements.layers)
    figure = Figure(figsize=(13, 1.8 + 0.32 * rows), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    cells = [layer.cells for layer in measurements.layers]
    _panel(figure, left, measurements, [[_difficulty(cell) for cell in row] for row in cells], "error", None)
    left.set_title("effect on the result of a method at half the cost")
    left.set_yticks([i + 0.5 for i in range(rows)], [layer.name for layer in measurements.layers], fontsize=7)
    left.invert_yaxis()
    shares = [[cell.taken.cost / max(cell.trials[0].cost, 1e-30) for cell in row] for row in cells]
    _panel(figure, right, measurements, shares, "share of the exact cost", [[_name(cell) for cell in r] for r in cells])
    saved = "as fast" if measurements.cost == "time" else "fewer operations in attention"
    right.set_title(f"the plan: error {measurements.error:.3g}, {measurements.speedup:.2f} times {saved}")
    _save(figure, path)


def _panel(
    figure: Any, axes: Any, measurements: Measurements, values: list[list[float]], unit: str, texts: Any
) -> None:
    from matplotlib.colors import LogNorm

    edges = [*measurements.starts, 0.0]
    positive = [value for row in values for value in row if value > 0]
    norm = None
    if texts is None and positive and max(positive) > min(positive):
        norm = LogNorm(min(positive), max(positive))
        values = [[value if value > 0 else min(positive) for value in row] for row in values]
    limits = {"norm": norm} if norm is not None else {"vmin": 0.0, "vmax": max(1.0, *positive, 0.0)}
    mesh = axes.pcolormesh(edges, range(len(values) + 1), values, cmap="viridis", edgecolors="white", lw=0.5, **limits)
    figure.colorbar(mesh, ax=axes, label=unit)
    axes.set_xlim(1, 0)
    axes.set_xlabel("time (1 is noise, 0 is the image)")
    for i, row in enumerate(texts or []):
        for j, text in enumerate(row):
            middle = (edges[j] + edges[j + 1]) / 2
            color = "black" if values[i][j] > 0.6 else "white"
            axes.text(middle, i + 0.5, text, ha="center", va="center", fontsize=6, color=color)


def _difficulty(cell: Cell) -> float:
    """Error of the result by this layer alone at about half its cost; 0 where nothing can be changed."""
    others = cell.trials[1:]
    cheap = [trial for trial in others if trial.cost <= CHEAP * cell.trials[0].cost]
    if not cheap:
        cheap = [min(others, key=lambda trial: trial.cost)] if others else []
    return min((trial.error * cell.influence for trial in cheap), default=0.0)


def _name(cell: Cell) -> str:
    return cell.taken.method.label


def _save(figure: Any, path: Path) -> None:
    import io

    from attngen.files import write_file

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_file(path, content.getvalue())
