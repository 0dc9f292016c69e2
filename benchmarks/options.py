"""What the command lines of the benchmark programs share. Nothing here imports torch before it is needed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", default="cpu", type=device, help="cpu, cuda or cuda:1")
    made.add_argument("--threads", type=at_least(1), help="CPU threads; torch's default if not given")
    made.add_argument("--crossovers", type=Path, help="choose kernels by these measurements of benchmarks.crossovers")
    made.add_argument("--out", type=Path, help="write the measurements as JSON")
    made.add_argument("--show", type=Path, help="print the table of a file written before, and stop")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and the command that gives them again as `command`."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = made.parse_args(given)
    options.command = shlex.join([*made.prog.split(), *_without_out(given)])
    return options


def _without_out(given: list[str]) -> list[str]:
    """Without where the results go, which says nothing about them."""
    kept: list[str] = []
    for word in given:
        if kept and kept[-1] == "--out":
            kept.pop()
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


def device(name: str) -> str:
    """A device's name; argparse's error for anything but a CPU and CUDA."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise argparse.ArgumentTypeError(f"a device is cpu, cuda or cuda:NUMBER, got {name!r}")
    return name


def at_least(low: int) -> Callable[[str], int]:
    """A type of whole numbers of at least `low`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"it takes a whole number of at least {low}, got {text!r}")
        return int(text)

    return number


def prepare(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Set the threads and check that the device is there; ends in argparse's error where it is not."""
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        made.error(f"there is no {options.device} device here; leave --device out to measure on the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.crossovers is not None:
        from attngen.kernels.crossovers import use_crossovers

        try:
            use_crossovers(options.crossovers)
        except ValueError as error:
            made.error(str(error))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values, without those that say where results go."""
    given = {name: value for name, value in vars(options).items() if name not in ("out", "show", "command")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def read(made: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Measurements written before; ends in argparse's error where the file is not that."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        made.error(f"{path} cannot be read as JSON: {error}")
    if not isinstance(result, dict) or not {"settings", "machine", "rows"} <= result.keys():
        made.error(f"{path} holds no measurements; the programs in benchmarks write them by --out")
    return result


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write measurements; nothing for None."""
    from attngen.files import write_file

    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())
