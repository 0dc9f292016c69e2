"""Everything at once, in parts."""

from __future__ import annotations

import json

import pytest

from benchmarks import choices, crossovers, gpu, layer, model, stack
from benchmarks import options as cli

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_parts_run_and_a_failing_one_leaves_the_others(tmp_path, monkeypatch, capsys):
    fine = gpu.Part(
        "fine", "", 300, tiny="benchmarks.layer --shapes sit-s-256 --quick --rounds 1 --agents 4 --what core"
    )
    slow = gpu.Part("slow", "", 2, tiny="timeit -n 1 -r 1 -s pass __import__('time').sleep(60)")
    wrong = gpu.Part("wrong", "", 60, tiny="benchmarks.layer --shapes nothing")
    monkeypatch.setattr(gpu, "PARTS", (wrong, slow, fine))
    assert gpu.main(["--tiny", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path)]) == 0
    monkeypatch.delenv("BENCHMARK_COMMIT")
    result = json.loads((tmp_path / "gpu.json").read_text())
    status = {row["name"]: row["status"] for row in result["rows"]}
    assert status == {"wrong": "failed with 2", "slow": "ended after its limit of 2 s", "fine": "done"}
    assert "no shape is called 'nothing'" in result["rows"][0]["log"]
    assert result["results"]["fine"]["machine"]["commit"] == result["machine"]["commit"] == "abc"
    assert "| slow | ended after its limit of 2 s |" in capsys.readouterr().out
    assert gpu.main(["--split", str(tmp_path / "gpu.json"), "--out", str(tmp_path / "split")]) == 0
    assert [path.name for path in (tmp_path / "split").iterdir()] == ["gpu-fine.json"]


def test_what_is_done_is_kept_by_the_next_run(tmp_path, monkeypatch):
    """A run of the same commit goes on with what is left; of another commit, or with --again, it begins anew."""
    ran = []

    def run(part, options, limit):
        ran.append(part.name)
        status = "failed with 1" if part.name == "layer" and len(ran) < 3 else "done"
        return {"name": part.name, "status": status, "seconds": 1.0}, {"machine": {"device": "x"}, "rows": []}

    monkeypatch.setattr(gpu, "_run", run)
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "choices", "layer"]
    for commit, more, wanted in (
        ("a", [], ["choices", "layer"]),
        ("a", [], ["layer"]),
        ("a", [], []),
        ("a", ["--again"], ["choices", "layer"]),
        ("b", [], ["choices", "layer"]),
    ):
        before = len(ran)
        assert gpu.main([*arguments, "--commit", commit, *more]) == 0
        assert ran[before:] == wanted
        result = json.loads((tmp_path / "gpu.json").read_text())
        assert [row["name"] for row in result["rows"]] == ["choices", "layer"]
        assert result["results"].keys() == {"choices", "layer"} and result["machine"] == {"device": "x"}
    monkeypatch.delenv("BENCHMARK_COMMIT")


def test_a_damaged_file_of_an_earlier_run_is_no_reason_to_stop(tmp_path):
    (tmp_path / "gpu.json").write_text("{")
    assert gpu.main(["--tiny", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path), "--parts", "layer"]) == 0


def test_correctness_is_first_and_the_defaults_fit_ten_minutes():
    default = [part for part in gpu.PARTS if part.default]
    assert default[0].name == gpu.CORRECT and default[0].arguments.startswith("pytest -m gpu")
    assert sum(part.limit for part in default) <= 600
    assert all(part.tiny for part in default), "each can be tried without a GPU"
    measured = " ".join(part.arguments for part in default)
    for model_ in ("sd15", "sdxl", "flux", "flux2", "qwen", "wan", "sit-xl"):
        assert f"--model {model_} " in measured
    assert "--pass training" in measured and "softmax@cudnn" in measured


PROGRAMS = {
    "benchmarks.choices": choices,
    "benchmarks.crossovers": crossovers,
    "benchmarks.layer": layer,
    "benchmarks.model": model,
    "benchmarks.stack": stack,
}


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part.tiny and part.default], ids=lambda part: part.name)
def test_each_part_runs_on_tiny_shapes(part, tmp_path, capsys):
    """In this process; the slow test runs them as the command does."""
    program, *arguments = part.tiny.split()
    if program not in PROGRAMS:
        return
    out = tmp_path / "out.json"
    assert PROGRAMS[program].main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    if program != "benchmarks.crossovers":
        assert written["rows"] and written["machine"].keys() >= {"device", "driver", "torch", "triton", "commit"}
        assert gpu._highlights({"results": {part.name: written}}) and capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command_on_tiny_shapes(tmp_path):
    assert gpu.main(["--tiny", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["status"] for row in result["rows"]} == {"done"}, [(r["name"], r["log"]) for r in result["rows"]]
    assert result["machine"].keys() >= {"device", "driver", "torch", "triton", "diffusers", "attngen", "commit"}


def test_no_part_starts_after_the_minutes(tmp_path, capsys):
    arguments = ["--tiny", "--device", "cpu", "--minutes", "0.1", "--out", str(tmp_path), "--parts", "layer"]
    assert gpu.main(arguments) == 0
    assert "| layer | not started: the minutes were over | 0 |" in capsys.readouterr().out


def test_the_command_lines_of_the_parts_are_understood(monkeypatch):
    """Every part parses and passes the checks before it would need a GPU."""
    programs = {name: program for name, program in PROGRAMS.items() if program is not crossovers}
    measured = []
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    for program in programs.values():
        monkeypatch.setattr(program, "measure", lambda *arguments: measured.append(arguments) or {})
        monkeypatch.setattr(program, "table", lambda result: "")
    names = [part.name for part in gpu.PARTS]
    assert len(set(names)) == len(names)
    for part in gpu.PARTS:
        for line in (part.arguments, part.tiny):
            name, *arguments = (line or "none").split()
            if name in programs:
                assert programs[name].main([*arguments, "--device", "cuda"]) == 0
    assert len(measured) > 15
