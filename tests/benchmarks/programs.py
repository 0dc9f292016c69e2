"""The programs, the committed measurements, an error that a program ends in, work of a known time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, layer, model, report, stack

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PROGRAMS = {"layer": layer, "model": model, "stack": stack, "gpu": gpu, "report": report}


def error_of(capsys, program, *arguments):
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def spin(seconds):
    """Use that much CPU time, and hand back a tensor."""
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass
    return torch.zeros(1)
