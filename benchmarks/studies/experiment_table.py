"""The page and the plot of `benchmarks.studies.experiment`, from its results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen.files import write_file

PLOT = "curves.png"

_HEAD = """# Softmax, mediators, linear: the same model with each

Made by `python -m benchmarks.studies.experiment --table` from the JSON files in [{folder}]({folder}). A small
experiment: a SiT with {layers} blocks of width {width} on the emoji of {classes}, {tokens} tokens, {steps} steps of
{batch} pictures, one seed. It shows that every kind of attention trains, and what each costs. It ends far from the
end of training: a few hundredths of the loss, and a few tenths of the distance, mean nothing.

"""
_COLUMNS = (
    *("attention", "mediators", "loss, training emoji", "loss, held-out emoji", "FD-emoji"),
    *("pictures/s, training", "pictures/s, forward"),
)
_FOOT = """
- Mediators: those that are used here. `elastic` is one model, trained with all three numbers.
- Loss: of the averaged weights at fixed noise and times, the same for every run.
- FD-emoji: Fréchet distance in the features of a small classifier of emoji, not FID, of {drawn:,} pictures drawn
  without guidance in {calls} network calls each. Lower is better; as many real emoji have {floor:.2f}.
- Pictures a second: forward and backward pass, and forward alone, of one thread's own time on {device}, batches of
  {batch}, median of {rounds} rounds with each network in turn.

![Loss by step](PLOT_PATH)

`python -m benchmarks.studies.experiment --run` trains, resumes and measures in `runs/experiment`. Its commands:

```bash
{commands}
```

torch {torch}, commit {commit}, {date}.
"""


def write_page(results: Path, page: Path, names: Sequence[str]) -> Path:
    """Write the page, and the plot beside the results.

    Args:
        results: folder with NAME.json of every run, and speed.json.
        page: to write.
        names: of the runs, in the order of the table.

    Raises:
        ValueError: if there is no result yet, or one is damaged.
        ImportError: without matplotlib, saying how to get it.
    """
    found = {name: _read(results / f"{name}.json") for name in names if (results / f"{name}.json").is_file()}
    if not found:
        raise ValueError(f"there are no results in {results}; python -m benchmarks.studies.experiment --run makes them")
    speed = _read(results / "speed.json") if (results / "speed.json").is_file() else {}
    plot(found, results / PLOT)
    write_file(page, text(found, speed, _link(page, results)).encode())
    return page


def _link(page: Path, results: Path) -> str:
    """The folder as the page refers to it."""
    from os.path import relpath

    return Path(relpath(results, page.parent)).as_posix()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def text(found: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Any], folder: str) -> str:
    """The page.

    Args:
        found: results by name of the run.
        speed: what `measure_speed` found, or nothing.
        folder: of the results, as the page refers to it.
    """
    first = next(iter(found.values()))
    config, distance = first["config"], first["distance"]
    head = _HEAD.format(
        folder=folder,
        layers=config["num_layers"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        classes=", ".join(config["classes"]),
        tokens=(config["image_size"] // config["patch_size"]) ** 2,
        steps=config["steps"],
        batch=config["batch_size"],
    )
    columns = _row(_COLUMNS) + "\n" + _row("---" for _ in _COLUMNS) + "\n"
    rows = [row for name, result in found.items() for row in _rows(name, result, speed.get("speed", {}))]
    machine = speed.get("machine", first["machine"])
    foot = _FOOT.format(
        drawn=distance["pictures"],
        calls=config["sample_steps"],
        floor=distance["floor"],
        device=machine["device"],
        rounds=max(0, speed.get("rounds", 1) - 1),
        batch=config["batch_size"],
        commands="\n".join(result["command"] for result in found.values()),
        **{name: machine[name] for name in ("torch", "commit", "date")},
    )
    return head + columns + "\n".join(rows) + "\n" + foot.replace("PLOT_PATH", f"{folder}/{PLOT}")


def _rows(name: str, result: Mapping[str, Any], speeds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row for each number of mediators that the run was trained with."""
    rows = []
    for kind, loss in result["loss"]["train"].items():
        fixed = f"{result['config']['num_mediators']}" if result["config"]["attention"] == "mediator" else ""
        distances = [v for k, v in result["distance"].items() if k.startswith("FD-emoji") and k.endswith(kind)]
        rate = speeds.get(f"{name} {kind}".strip(), {})
        cells = [
            name,
            kind.partition(" ")[0] or fixed,
            f"{loss:.4f}",
            f"{result['loss']['test'][kind]:.4f}",
            f"{distances[0]:.2f}",
            *(f"{rate[what]:.0f}" if rate else "" for what in ("training", "forward")),
        ]
        rows.append(_row(cells))
    return rows


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the curves of the training loss, smoothed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'attngen[train]' installs it") from error
    from benchmarks.studies.plot import smoothed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, result in found.items():
        steps, losses = zip(*result["curve"], strict=True)
        axes.plot(steps, smoothed(losses, 0.1), label=name)
    axes.set(xlabel="step", ylabel="training loss, smoothed", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
