"""--help of every program answers within a second without torch; wrong usage ends in a line and exit status 2."""

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
APP = {path.stem for path in ROOT.glob("app.py")}
PROBE = """
import runpy, sys, time
program = sys.argv[1]
def code(*arguments):
    sys.argv[1:] = arguments
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
assert code("--help") == 0
assert time.process_time() < 1, f"{time.process_time():.1f} s of the processor for --help"
assert code("--no-such-option") == 2
heavy = {"torch", "diffusers", "transformers", "gradio", "matplotlib", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_all_programs_are_found():
    assert {"pipelines.class2image", "pipelines.compare", "train.sit", "train.fid", "benchmarks.layer"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", sorted({*PROGRAMS, *APP}))
def test_help_waits_for_nothing(program):
    ran = subprocess.run([sys.executable, "-c", PROBE, program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout and "--help" in ran.stdout
    assert "no-such-option" in ran.stderr or "required" in ran.stderr, "the complaint names what is wrong"
