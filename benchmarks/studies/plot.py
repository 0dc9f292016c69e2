"""Draw the curves of training runs: python -m benchmarks.studies.plot runs/softmax runs/mediators --out curves.png

One panel a quantity: loss (smoothed), loss by noise level of the last lines, images per second, and the Fréchet
distance where it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("benchmarks.studies.plot", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="image to write: .png, .svg or .pdf")
    parser.add_argument("--smooth", type=float, default=0.02, help="fraction of a run that the loss is averaged over")
    options = parser.parse_args(argv)
    if not 0 <= options.smooth < 1:
        parser.error(f"--smooth must be in [0, 1), got {options.smooth}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse_arguments(argv)
    try:
        names = _short_names(options.runs)
        logs = {name: read_log(run) for name, run in zip(names, options.runs, strict=True)}
        draw(logs, options.out, options.smooth)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks.studies.plot: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def _short_names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two are called alike."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; of a step that was logged twice, because the run was resumed, the later one.

    Raises:
        ValueError: if there is no log, or a line of it is damaged. A last line cut short by a kill is left out.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not a run: it has no log.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    steps: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            steps[record["step"], "loss" in record] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged") from error
    return [record for _, record in sorted(steps.items(), key=lambda item: item[0][0])]


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """The mean of each value and those before it, over a window of a share of all of them."""
    window = max(1, round(share * len(values)))
    sums, result = 0.0, []
    for i, value in enumerate(values):
        sums += value
        if i >= window:
            sums -= values[i - window]
        result.append(sums / min(i + 1, window))
    return result


def draw(logs: dict[str, list[dict[str, Any]]], out: Path, smooth: float) -> None:
    """Write the picture.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'attngen[train]' installs it") from error

    figure = Figure(figsize=(11, 8), layout="constrained")
    loss, levels, speed, distance = figure.subplots(2, 2).flatten()
    for name, records in logs.items():
        losses = [record for record in records if "loss" in record]
        steps = [record["step"] for record in losses]
        loss.plot(steps, smoothed([record["loss"] for record in losses], smooth), label=name)
        speed.plot(steps, smoothed([record["images_per_second"] for record in losses], smooth), label=name)
        _draw_levels(levels, name, losses)
        _draw_distances(distance, name, records)
    for axes, title, x in (
        (loss, "loss", "step"),
        (levels, "loss by noise level, last tenth of the run", "noise level"),
        (speed, "images per second", "step"),
        (distance, "Fréchet distance: FD-emoji, or FID", "step"),
    ):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    loss.set_yscale("log")
    figure.savefig(out, dpi=120)


def _draw_levels(axes: Any, name: str, losses: Sequence[dict[str, Any]]) -> None:
    last = [r["loss_by_noise"] for r in losses[-max(1, len(losses) // 10) :] if "loss_by_noise" in r]
    if not last:
        return
    parts = [[value for value in column if value is not None] for column in zip(*last, strict=True)]
    points = [(i + 0.5) / len(parts) for i, part in enumerate(parts) if part]
    axes.plot(points, [sum(part) / len(part) for part in parts if part], marker="o", label=name)


def _draw_distances(axes: Any, name: str, records: Sequence[dict[str, Any]]) -> None:
    metrics = sorted({key for record in records for key in record if key.startswith(("FD-emoji", "FID"))})
    for metric in metrics:
        found = [(record["step"], record[metric]) for record in records if metric in record]
        kind = metric.partition("] " if "[" in metric else " ")[2]
        axes.plot(*zip(*found, strict=True), marker="o", label=f"{name} {kind}".strip())


if __name__ == "__main__":
    sys.exit(main())
