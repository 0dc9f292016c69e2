"""Command lines, and files of results."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, layer, model, stack
from benchmarks import options as cli
from pipelines.cli import provenance
from tests.benchmarks.programs import PROGRAMS, RESULTS, ROOT, error_of

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_help_comes_without_importing_torch(name):
    command = [sys.executable, "-X", "importtime", "-m", f"benchmarks.{name}", "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and f"python -m benchmarks.{name}" in ran.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "diffusers", "attngen"}


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (model, ["--model", "sd9"], "invalid choice: 'sd9'"),
        (model, ["--size", "100"], "--size must be a multiple of 64 for sd15, got 100"),
        (model, ["--size", "-1"], "a whole number of at least 1, got '-1'"),
        (model, ["--block"], "--block measures a block of SiT; sd15 is none"),
        (model, ["--small", "--size", "64", "--methods", "nothing"], "unknown method 'nothing'"),
        (model, ["--small", "--size", "64", "--methods", "agent:x"], "a number goes with agent"),
        (model, ["--small", "--size", "64", "--methods", "todo:4"], "a number goes with agent"),
        (model, ["--small", "--size", "64", "--methods", "values:4"], "learned mediators are a method of SiT"),
        (model, ["--small", "--size", "64", "--methods", "agent:4", "--kernel", "fast"], "unknown kernel 'fast'"),
        (model, ["--small", "--model", "sit-s", "--methods", "values:"], "a number of mediators goes with values"),
        (model, ["--small", "--model", "sit-s", "--methods", "tomesd"], "tomesd merges tokens of a UNet"),
        (model, ["--device", "gpu"], "a device is cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (model, ["--show", "nothing.json"], "nothing.json cannot be read as JSON"),
        (stack, ["--size", "big"], "--size is a number of pixels or small, got 'big'"),
        (stack, ["--size", "100"], "--size must be a multiple of 16 for sit-s, got 100"),
        (stack, ["--caches", "mine"], "invalid choice: 'mine'"),
        (stack, ["--steps", "1"], "a whole number of at least 2, got '1'"),
        (layer, ["--agents", "0"], "a whole number of at least 1, got '0'"),
        (layer, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (gpu, ["--parts", "mine"], "invalid choice: 'mine'"),
        (gpu, ["--split", str(RESULTS / "sd15-512-cpu.json")], "--split needs a folder"),
    ],
)
def test_what_cannot_be_measured_ends_in_a_sentence(program, arguments, message, capsys):
    assert message in error_of(capsys, program, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_sentence(capsys):
    assert "there is no cuda device here" in error_of(capsys, model, "--device", "cuda")


def test_the_machine_names_versions_and_commit(monkeypatch):
    found = provenance.machine("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads() and found["device"]
    assert found["diffusers"] and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert provenance.machine("cpu")["commit"] == "abc1234"


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    cli.write(path, {"x": 1})
    with pytest.raises(TypeError):
        cli.write(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1} and math.isfinite(path.stat().st_size)
