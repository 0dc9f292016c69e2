"""The program that measures the host time of launches, in a process of its own: kernels must not be interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_every_kernel_is_launched_once():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "3", "--repeats", "20"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [int(number) for number in re.findall(r"(\d+) launches", done.stdout)]
    # Two passes and a combination, then two backward passes; linear attention combines in its backward pass too.
    assert launches == [0, 3, 3, 0, 5, 6], done.stdout
