"""The document of all measurements and the goals."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from tests.benchmarks.programs import RESULTS, error_of

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_the_committed_report_is_what_the_program_writes():
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"


def test_the_report_states_goals_commands_and_machines(tmp_path):
    results = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    text = report.document(results)
    for name in results:
        assert f"## {name.removesuffix('.json')}\n\n`python -m benchmarks." in text
    assert text.count("Measured on ") == len(results)


def layer_result(device, rows):
    complete = {"dtype": "bfloat16", "batch": 2, "what": "core", "pass": "forward", "kind": "agents", "tokens": 4096}
    complete |= {"shape": "sd15-512-l0", "agents": 64, "variant": "plain", "baseline": "softmax flash"}
    complete |= {"heads": 8, "head_dim": 40, "candidate": "x"}
    machine_ = {"device": device, "threads": 1, "torch": "2", "commit": "c", "date": "d"}
    return {
        "program": "layer",
        "command": "python -m benchmarks.layer",
        "settings": {"device": "cpu" if device == "CPU" else "cuda"},
        "machine": machine_,
        "rows": [{**complete, **row} for row in rows],
        "skipped": [],
    }


def times(seconds, speedup):
    return {"median_seconds": seconds, "speedup": {"median": speedup, "q1": speedup, "q3": speedup}}


def test_goals_are_found_among_the_measurements():
    rows = [
        {"path": "sdpa", **times(2.0, 6.0)},
        {"path": "triton", **times(1.0, 12.0)},
        {"path": "triton", "variant": "shortcut", "bandwidth_share": 0.7, **times(1.5, 8.0)},
        {"path": "triton", "shape": "sd15-1024-l0", "tokens": 16384, "batch": 64, **times(1.0, 99.0)},
    ]
    text = report.document({"a.json": layer_result("NVIDIA H200", rows)})
    assert (
        "| Attention layer sd15-512-l0, 64 agents, batch 2 | ≥ 10.00× | 12.00× (sd15-512-l0 bfloat16) | yes |" in text
    )
    assert "sd15-1024-l0, 64 agents" not in text, "a goal without a number is not in the document"
    assert "| Over two exact calls, 64 agents | ≥ 1.50× | 2.00× (sd15-512-l0 bfloat16) | yes |" in text
    assert "| Share of the copy bandwidth, N ≥ 4096, 64 agents | ≥ 80% | 70% (sd15-512-l0) | no |" in text
    # Numbers of another GPU or of the CPU are none of the H200.
    for device in ("NVIDIA A100", "CPU"):
        text = report.document({"a.json": layer_result(device, rows)})
        assert "H200" not in text.replace("NVIDIA H200", "")


def test_goals_of_the_cpu_and_partial_success():
    block = {"what": "block", "agents": 4, "path": "absorbed", "dtype": "float32"}
    rows = [
        {**block, "shape": "sit-s-256", **times(1.0, 4.5)},
        {**block, "shape": "sit-xl-256", **times(1.0, 3.9)},
        {**block, "shape": "sit-s-512", "variant": "values", **times(1.0, 50.0)},
    ]
    einsum = {"dtype": "float32", "shape": "sit-s-512"}
    rows += [{**einsum, "path": "einsum", **times(3.0, 1.0)}, {**einsum, "path": "matmul", **times(2.0, 1.0)}]
    rows += [{**einsum, "path": "sdpa", **times(2.5, 1.0)}, {**einsum, "path": "absorbed", **times(1.0, 1.0)}]
    text = report.document({"a.json": layer_result("CPU", rows)})
    assert "| ≥ 4.00× | 4.50× (sit-s-256 float32), 3.90× (sit-xl-256 float32) | 1 of 2 |" in text.replace(
        "3.90× (sit-xl-256 float32), 4.50× (sit-s-256 float32)", "4.50× (sit-s-256 float32), 3.90× (sit-xl-256 float32)"
    )
    assert "| The same, N = 1024 | ≥ 12.00×" not in text
    assert "N = 1024, float32 | ≥ 1.40× | 1.50× (sit-s-512 float32) | yes |" in text
    assert "Why not:" not in text
    rows[-2] |= times(2.9, 1.0)  # the two calls are slower now, so the goal over einsum is missed and has a reason
    rows[-3] |= times(2.9, 1.0)
    missed = report.document({"a.json": layer_result("CPU", rows)})
    assert "Why not:\n\n- 64 agents over the einsums" in missed and missed.count("\n- 64 agents over the einsums") == 1


def test_the_report_checks_what_is_there(tmp_path, capsys):
    out = tmp_path / "docs" / "benchmarks.md"
    arguments = ["--results", str(RESULTS), "--out", str(out)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    first = out.read_text()
    assert report.main(arguments) == 0 and out.read_text() == first
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    assert "holds no measurements" in error_of(capsys, report, "--results", tmp_path / "results")
    assert "there is no folder" in error_of(capsys, report, "--results", tmp_path / "nothing")
