"""Configurations as JSON files: `config.json` of a run, and those of --config."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")
BESIDE = ("id2label",)
"""Keys of a run's `config.json` that are no fields of its configuration."""
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "int | float": (int, float),
}
_NAMES = {"bool": "true or false", "int": "an integer", "float": "a number", "int | float": "a number"}


def read_config(path: Path, base: C) -> C:
    """The configuration in a JSON file.

    Args:
        path: of the file.
        base: a configuration, a dataclass with checks of its own; it has the values of fields that the file leaves out.

    Raises:
        ValueError: if the file cannot be read, or has an unknown field or a value that the field cannot have.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the configuration {path} is not a JSON object")
    fields = {field.name: str(field.type) for field in dataclasses.fields(base)}  # type: ignore[arg-type]
    values = {}
    for name, value in found.items():
        if name in fields:
            values[name] = _value(f"{name} in {path}", value, fields[name])
        elif name not in BESIDE:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ValueError(f"{path} has an unknown field {name!r}{f'; near it: {near[0]}' if near else ''}")
    return dataclasses.replace(base, **values)  # type: ignore[type-var]


def add_run_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--out and --resume, as every program that trains has them."""
    parser.add_argument("--out", type=Path, metavar="RUN", help=f"folder of the run (default: {default})")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help="continue RUN as it was configured; without a name continue --out, or start it where there is no run",
    )


def find_run(resume: str | bool | None, out: Path | None, default: Path) -> Path:
    """The folder of the run that --resume and --out name.

    Raises:
        ValueError: if they name two, or --resume one that is not there.
    """
    if not isinstance(resume, str):
        return out or default
    run = Path(resume)
    if out not in (None, run):
        raise ValueError(f"--resume {run} and --out {out} name two runs")
    if not (run / "config.json").is_file():
        raise ValueError(f"there is no run to resume in {run}: it has no config.json")
    return run


def changes(before: dict[str, Any], config: Any) -> dict[str, list[Any]]:
    """Fields whose values differ: name -> [before, now], as JSON values.

    Args:
        before: a saved configuration; fields that it lacks had the defaults.
        config: the present one, a dataclass.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    was = {**json.loads(json.dumps(defaults)), **before}
    return {name: [was[name], value] for name, value in now.items() if was[name] != value}


def _value(what: str, value: Any, kind: str) -> Any:
    """A value of JSON as a field of that type has it."""
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise ValueError(f"{what} must be a list, got {value!r}")
        return tuple(_value(f"each of {what}", part, kind[6:].partition(",")[0]) for part in value)
    types = _KINDS.get(kind, (str,))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{what} must be {_NAMES.get(kind, 'a string')}, got {value!r}")
    return float(value) if kind == "float" else value
