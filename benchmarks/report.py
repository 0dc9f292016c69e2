"""Write docs/benchmarks.md from the measurements in benchmarks/results.

    python -m benchmarks.report
    python -m benchmarks.report --check

The same measurements give the same document, letter by letter. Nothing in it is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import choices, gpu, layer, model, stack
from benchmarks import options as cli
from benchmarks.goals import CPU, H200, Goal, Results

ROOT = Path(__file__).parents[1]
TABLES = {"choices": choices.table, "layer": layer.table, "model": model.table, "stack": stack.table, "gpu": gpu.table}

INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; change nothing by hand.

Every number is a ratio measured in turn in one process: each round runs all candidates, and the ratio is taken within
the round, against the baseline that the table names. For a layer that is the fastest softmax attention present at that
shape, for a model its first row. Weights are random, so errors say how much a method changes the result, not how good a
picture is. How time and memory are measured is
in `benchmarks/timing.py`."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the document is not current")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        parser.error(f"there is no folder {options.results}")
    files = sorted(options.results.glob("*.json"), key=lambda path: path.name)
    text = document({path.name: cli.read(parser, path) for path in files if not _is_crossovers(path)})
    if options.check:
        current = options.out.exists() and options.out.read_text() == text
        print(f"{options.out} is {'current' if current else 'not current; run python -m benchmarks.report'}")
        return 0 if current else 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    return 0


def document(results: Results) -> str:
    """The whole document for results by file name."""
    parts = [INTRODUCTION, "## Goals", *_goals("CPU", CPU, results), *_goals("One H200 GPU, bfloat16", H200, results)]
    for name, result in results.items():
        parts += _section(name, result)
    return "\n\n".join(parts) + "\n"


def _is_crossovers(path: Path) -> bool:
    """Whether the file is a dispatch table, which is for the library and not for people."""
    try:
        return json.loads(path.read_text()).get("format") == "attngen-crossovers"
    except (OSError, ValueError, AttributeError):
        return False


def _goals(title: str, goals: Sequence[Goal], results: Results) -> list[str]:
    lines = ["| what | goal | measured | reached |", "|---|---|---|---|"]
    missed = []
    for goal in goals:
        found = goal.find(results)
        if not found:
            continue
        if goal.why_not and any(value < goal.least for _, value in found):
            missed.append(f"- {goal.text}: {goal.why_not}")
        measured = ", ".join(f"{goal.number(value)} ({label})" for label, value in found)
        reached = _reached([value >= goal.least for _, value in found])
        lines.append(f"| {goal.text} | ≥ {goal.number(goal.least)} | {measured} | {reached} |")
    notes = ["Why not:", "\n".join(missed)] if missed else []
    return [f"### {title}", "\n".join(lines), *notes] if len(lines) > 2 else []


def _reached(each: Sequence[bool]) -> str:
    return "yes" if all(each) else f"{sum(each)} of {len(each)}" if any(each) else "no"


def _section(name: str, result: dict[str, Any]) -> list[str]:
    program = result.get("program", "model")
    lines = [f"## {name.removesuffix('.json')}", f"`{_command(program, result)}`", _machine(result)]
    if result.get("status", "done") != "done":
        lines.append(f"It was {result['status']}; what follows was measured until then.")
    lines.append(TABLES[program](result) if program in TABLES else _plain_table(result["rows"]))
    if result.get("errors"):
        lines.append(_errors(result["errors"]))
    return lines


def _command(program: str, result: dict[str, Any]) -> str:
    """The command, also of files from before it was kept."""
    if "command" in result:
        return result["command"]
    settings = result["settings"]
    return f"python -m benchmarks.{program} --model {settings['model']} --size {settings['size']}"


def _machine(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    known = [
        f"{machine['device']}, {machine['threads']} threads",
        f"torch {machine['torch']}",
        *(f"{name} {machine[name]}" for name in ("triton", "diffusers", "attngen") if machine.get(name)),
        f"commit {machine['commit']}",
        str(machine["date"]),
    ]
    if "clock" in settings:
        known.append(f"clock: {settings['clock']}")
    if "copy_bandwidth" in result:
        known.append(f"copy bandwidth {result['copy_bandwidth'] / 1e9:.0f} GB/s")
    return "Measured on " + ", ".join(known) + "."


def _plain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a program without a table of its own: every column that holds plain values."""
    columns = [key for key in (rows[0] if rows else {}) if isinstance(rows[0][key], (str, int, float))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) if columns else "No rows."


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _errors(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "Error against the same formula in float64, ‖out - float64‖ / ‖float64‖:",
        "",
        "| what | shape | dtype | candidate | error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['what']} | {row['shape']} | {row['dtype']} | {row['candidate']} | {row['error']:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
