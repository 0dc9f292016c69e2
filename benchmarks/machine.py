"""What numbers were measured with, for the JSON of every benchmark program."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import time
from pathlib import Path
from typing import Any


def machine(device: str) -> dict[str, Any]:
    """Device, threads, versions, commit and date, as JSON values.

    The commit has "+changes" behind it where the working tree differs from it; results and documents do not count.
    """
    import torch

    import attngen

    on_cpu = torch.device(device).type == "cpu"
    return {
        "device": processor() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "attngen": attngen.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The short commit of this repository, or BENCHMARK_COMMIT, for copies without one."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    revision = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "attngen", "benchmarks/*.py")
    return f"{revision}+changes" if revision and changed else revision


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
