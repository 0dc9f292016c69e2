"""--help of every program answers without importing torch, and wrong usage ends in a line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("pipelines", "train", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
PROBE = """
import runpy, sys
program = sys.argv[1]
sys.argv[1:] = ["--help"]
try:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = {"torch", "diffusers", "transformers", "gradio", "matplotlib", "datasets"} & set(sys.modules)
    assert not end.code and not heavy, (end.code, heavy)
"""


def test_all_programs_are_found():
    assert {"pipelines.class2image", "pipelines.compare", "train.sit", "train.fid", "benchmarks.layer"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", [*PROGRAMS, "app"] if (ROOT / "app.py").exists() else PROGRAMS)
def test_help_waits_for_nothing(program):
    ran = subprocess.run([sys.executable, "-c", PROBE, program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout and "--help" in ran.stdout
