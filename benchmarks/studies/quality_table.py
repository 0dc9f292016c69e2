"""The page of `benchmarks.studies.quality` and its plots, made of its results. Nothing in them is written by hand."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.quality_rows import shown
from pipelines.cli import UserError

INTRODUCTION = """\
# What each attention method costs in quality

Written by `python -m benchmarks.studies.quality --table --results docs/quality --page docs/quality.md`; change
nothing by hand.

Every row draws the same pictures from the same noise, so rows of a table can be compared with each other. `FD-emoji` is
the Fréchet distance to the training pictures in the features of a small classifier of emoji: lower is better, it is not
FID, and it falls with the number of pictures, so only sets of one size compare. The spread is the standard deviation
over sets of other noise; that of the difference to the first row is smaller, as both have the same noise in each set.
The floor is what as many real emoji get. Operations are those of one picture, all steps
together, two for a multiply-add; times are medians of the ratio to the first row, measured in turn.

With the weights of Stable Diffusion 1.5, the names of ImageNet's classes and its pictures at 512 px, the protocol of
the AgentSD paper (2,000 pictures, 50 steps) is:

```bash
python -m benchmarks.studies.quality --model stable-diffusion-v1-5/stable-diffusion-v1-5 --name sd15 --pictures 2000 \\
    --seeds 1 --steps 50 --height 512 --width 512 --scheduler PNDMScheduler --class-names imagenet.txt \\
    --reference imagenet-512/
```

`imagenet.txt` has a class a line; `imagenet-512` is a folder of pictures, or a file of statistics that `train.fid`
reads.

Operations of a picture are those of the formulas. Those of the attention layers are as computed, projections
included: a layer with few agents, mediators or merged tokens absorbs projections where that is less work."""

# What a reader has to know of a model beside its numbers, by the name of its results.
NOTES = {
    "sit": """\
The SiT that ships, by its number of mediators. By the change of the picture nothing changes here: in ten steps of an
ODE the ratios of 0.8 and 0.5 are never reached, so that row has 4 mediators throughout.""",
    "sit-softmax": """\
The SiT that ships with softmax attention in place of mediators, trained on (the first 201 of these steps ran with the
learning rates of a run of 400):

```bash
python -m train.sit --preset emoji --attention softmax --init-from attngen/assets/emoji --steps 232 --warmup-steps 20 \\
    --cooldown 0.6 --out runs/emoji-softmax
```

Its 64 tokens are few: five sixths of a layer's operations are projections, which count as attention here.""",
    "sit-1024": """\
The same at 64 px: 1,024 tokens, so that eight ninths of its attention's operations are the products of queries, keys
and values. It starts from the weights of the one of 256 tokens:

```bash
python -m train.sit --preset emoji-experiment --num-layers 6 --image-size 64 --attention softmax --mediator-counts \\
    --init-from runs/emoji-256/pipeline --batch-size 8 --steps 1000 --warmup-steps 20 --cooldown 0.5 --ema-decay 0.98 \\
    --sample-every 500 --save-every 100 --fd-every -1 --out runs/emoji-1024
```""",
    "sit-256": """\
A smaller SiT of 256 tokens, two thirds of whose attention's operations are the products of queries, keys and values:

```bash
python -m train.sit --preset emoji-experiment --num-layers 6 --steps 2000 --warmup-steps 50 --ema-decay 0.995 \\
    --sample-every 500 --save-every 200 --fd-every 400 --fd-pictures 256 --out runs/emoji-256
```

The plans for 1.2 and 2 times were found before `FocalAttention` was among the candidates.""",
}


def write_page(results: Path, page: Path) -> None:
    """Write the page and a plot for each file of results.

    Raises:
        UserError: if there are no results, or a file cannot be read.
        ImportError: without matplotlib.
    """
    from pipelines.images import write_file

    files = sorted(results.glob("*.json"))
    if not files:
        raise UserError(f"{results} holds no results; measure some first")
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    for path in files:
        result = read(path)
        plot = page.parent / "images" / f"quality-{path.stem}.png"
        draw_plot(result, plot)
        parts += section(path.stem, result, f"images/{plot.name}")
        sheet = path.with_suffix(".png")
        if sheet.is_file():
            where = Path(os.path.relpath(sheet, page.parent)).as_posix()
            parts.append(f"The first pictures of each row, the same noise below each other:\n\n![Pictures]({where})")
    write_file(page, ("\n\n".join(parts) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """Results of one model.

    Raises:
        UserError: if the file is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            _ = row["row"], row["mean"], row["values"], row["spread"], row["gflop"], row["speedup"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of benchmarks.studies.quality: {error!r}") from error
    if not result["rows"]:
        raise UserError(f"{path} has no rows")
    return result


def section(name: str, result: Mapping[str, Any], plot: str) -> list[str]:
    """The part of the page on one model."""
    rows = result["rows"]
    first, metric = rows[0], rows[0]["metric"]
    with_attention = any(row["attention_gflop"] is not None for row in rows)
    head = ["attention", metric, "against the first", "GFLOP a picture", "times faster"]
    head += ["attention GFLOP", "times fewer"] if with_attention else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_cells(row, first, with_attention)) + " |" for row in rows]
    floor = "" if first.get("floor") is None else f"; floor {first['floor']:.2f}"
    facts = (
        f"{result['model']}, {result['pictures']:,} pictures x {result['seeds']} sets, {result['steps']} steps, "
        f"guidance {result['guidance_scale'] or 'off'}, {_scheduler(result)}, {result['device']}, torch "
        f"{result['versions'].get('torch', '?')}{floor}."
    )
    note = [NOTES[name]] if name in NOTES else []
    table = "\n".join(lines)
    return [f"## {name}", *note, f"`{result['command']}`", facts, table, f"![Quality against operations]({plot})"]


def _scheduler(result: Mapping[str, Any]) -> str:
    if not result.get("solver"):
        return str(result["scheduler"])
    return f"{result['scheduler']} ({result['sampler']}, {result['solver']})"


def _cells(row: Mapping[str, Any], first: Mapping[str, Any], with_attention: bool) -> list[str]:
    cells = [
        f"`{row['row']}`",
        shown(row),
        _against(row, first),
        "" if row["gflop"] is None else f"{row['gflop']:.2f}",
        f"{row['speedup']:.2f}",
    ]
    if not with_attention:
        return cells
    now, exact = row["attention_gflop"], row["attention_exact"]
    return [*cells, *(["", ""] if now is None else [f"{now:.2f}", f"{exact / now:.2f}"])]


def _against(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """How much further a row is, with its spread over sets: each is compared with the first row's of the same noise."""
    whole = f"{row['mean'] / first['mean'] - 1:+.1%}"
    ratios = [a / b for a, b in zip(row["values"], first["values"], strict=False)]
    return whole if row is first or len(ratios) < 2 else f"{whole} ± {statistics.stdev(ratios):.1%}"


def draw_plot(result: Mapping[str, Any], path: Path) -> None:
    """Quality against operations: a point a row, rows of one kind in one colour.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'attngen[plot]'") from error

    rows = [row for row in result["rows"] if _operations(row) is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        _draw_kind(axes, kind, [row for row in rows if row["kind"] == kind])
    means = [row["mean"] for row in rows]
    if rows and min(means) > 0 and max(means) > 8 * min(means):  # or one failure presses all others onto a line
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.12)  # for the names of points
    axes.axhline(result["rows"][0]["mean"], color="grey", linewidth=0.8, linestyle=":")
    in_attention = rows and rows[0]["attention_gflop"] is not None
    axes.set_xlabel("GFLOP of the attention layers, one picture" if in_attention else "GFLOP of one picture")
    axes.set_ylabel(f"{result['rows'][0]['metric']}, lower is better")
    axes.set_title(f"{result['model']}: what attention costs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _operations(row: Mapping[str, Any]) -> float | None:
    return row["gflop"] if row["attention_gflop"] is None else row["attention_gflop"]


def _draw_kind(axes: Any, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    points = sorted((_operations(row), row["mean"], row["spread"], row["row"]) for row in rows)
    x, y, spread, names = zip(*points, strict=True)
    joined = "-" if kind in ("agents", "fixed", "calibrated") else ""
    bars = None if None in spread else spread
    axes.errorbar(x, y, yerr=bars, marker="o", linestyle=joined, linewidth=1, capsize=3, label=kind or "rows")
    for at, value, name in zip(x, y, names, strict=True):
        axes.annotate(name, (at, value), textcoords="offset points", xytext=(5, 4), fontsize=7)
