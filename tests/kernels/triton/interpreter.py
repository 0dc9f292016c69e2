"""Tests of kernels in Triton's interpreter, in a process of their own.

Triton decides at its import, and again for every kernel it decorates, whether kernels are interpreted, and other tests
may have imported it before. So a file names its checks `interpreted_*`, which pytest does not collect, and has one test
that starts pytest on the file again, with TRITON_INTERPRET set from the start, to collect those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def interpreter_reads_numpy() -> bool:
    """Triton 3.6 converts arrays of one element to integers, which newer versions of NumPy refuse."""
    import numpy
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version > (3, 6) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)


needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or not interpreter_reads_numpy(), reason="needs Triton, and NumPy as old as it"
)


def run_interpreted(file: str, *options: str) -> None:
    """Run the functions of a test file that are named `interpreted_*`, in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_functions=interpreted_*"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # options of the outer run, such as its number of processes
    done = subprocess.run([*command, *options, file], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def start_with_nan(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What a kernel leaves unwritten, or reads before it is written, shows. Returns the list of buffers' shapes."""
    from attngen.kernels.triton import common

    shapes = []

    def nan(shape, dtype, device):
        shapes.append(tuple(shape))
        return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(common, "empty", nan)
    monkeypatch.setattr(common, "PLANS", {})  # plans hold what other tests replaced
    return shapes
