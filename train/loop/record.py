"""What made a run: a line of `starts.jsonl` for every start, with command, versions, commit, machine and data."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.loop.meter import append_line

STARTS = "starts.jsonl"


def command_of(program: str, argv: Sequence[str] | None) -> str:
    """The command line of a program, as it can be repeated.

    Args:
        program: its module.
        argv: its arguments; None for those of the process.
    """
    return shlex.join(["python", "-m", program, *(sys.argv[1:] if argv is None else argv)])


def record_start(
    out: Path, step: int, command: str, *, device: str, data: str, changes: Mapping[str, Any], processes: int = 1
) -> None:
    """Add a line to `out`/starts.jsonl.

    Args:
        out: folder of the run.
        step: optimiser steps done; 0 at the beginning.
        command: of the program.
        device: that it computes on, as torch names it.
        data: fingerprint of the data.
        changes: options that changed since the checkpoint: name -> [before, now].
        processes: of the run.

    Raises:
        OSError: if it cannot be written.
    """
    from pipelines.cli.provenance import commit, machine, version

    found = machine(device)
    line = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "changes": dict(changes),
        "data": data,
        "host": platform.node(),
        "device": found["device"],
        "processes": processes,
        "threads": found["threads"],
        "cores": os.cpu_count(),
        "commit": commit("attngen", "pipelines", "train"),
        "versions": {
            "python": platform.python_version(),
            **{name: found[name] for name in ("attngen", "torch", "diffusers")},
            "accelerate": version("accelerate"),
        },
    }
    append_line(out / STARTS, line)


def tell_changes(program: str, changes: Mapping[str, Sequence[Any]]) -> None:
    """Print what a resumed run does otherwise than before."""
    for name, (before, now) in changes.items():
        print(f"{program}: {name} is {now!r} from here on, before it was {before!r}", file=sys.stderr)
