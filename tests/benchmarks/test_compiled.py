"""The Triton kernels compiled for GPUs that are not here, and the program that does it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import compiled

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@needs_triton
def test_no_kernel_falls_short_on_any_gpu(tmp_path):
    """In a process of its own, because Triton decides at its import whether kernels are compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--faults"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith(" 0 fall short")


def test_the_covering_set_covers():
    cases = compiled.covering_cases(compiled.parser().parse_args([]))
    assert {case.target for case in cases} == set(compiled.TARGETS)
    assert {case.head_dim for case in cases if case.agents} == set(compiled.LAYERS)
    assert {case.agents for case in cases} == {0, *compiled.AGENTS}
    assert {case.dtype for case in cases if case.agents} == set(compiled.DTYPES)
    assert {case.extra for case in cases} == {*compiled.BRANCHES, *compiled.MAPS}
    for target in compiled.TARGETS:
        mine = [case for case in cases if case.target == target]
        assert any(case.agents and case.extra == "all" for case in mine) and any(not case.agents for case in mine)
    assert len(cases) <= 28


def test_all_cases_are_those_that_the_kernels_take():
    cases = compiled.every_case(compiled.parser().parse_args(["--targets", "sm_86"]))
    sizes = {(case.head_dim, case.agents, case.dtype) for case in cases}
    assert (128, 64, "bfloat16") in sizes and (160, 16, "float16") in sizes and (32, 64, "tf32") in sizes
    assert (160, 64, "bfloat16") not in sizes and (160, 4, "tf32") not in sizes and (128, 64, "tf32") not in sizes


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"stack": 65}, "65 bytes of stack a thread"),
        ({"shared": 101377}, "101377 bytes of shared memory where there are 101376"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ],
)
def test_what_falls_short(change, fault):
    case = compiled.Case("sm_89", 64, "bfloat16", 16, "plain")._asdict()
    row = {
        **case,
        "kernel": "k",
        "warps": 4,
        "stages": 1,
        "registers": 99,
        "stack": 64,
        "shared": 101376,
        "programs": 1,
    }
    assert "; ".join(compiled.faults(row | change, 64)) == fault
    assert fault in compiled.line(row | change, 64)
