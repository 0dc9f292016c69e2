"""Everything at once, in parts."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu, layer, model, stack
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


def test_no_part_starts_after_the_minutes(tmp_path, capsys):
    arguments = ["--tiny", "--device", "cpu", "--minutes", "0.1", "--out", str(tmp_path), "--parts", "layer"]
    assert gpu.main(arguments) == 0
    assert "| layer | not started: the minutes were over | 0 |" in capsys.readouterr().out


def test_the_command_lines_of_the_parts_are_understood(monkeypatch):
    """Every part parses and passes the checks before it would need a GPU."""
    programs = {"benchmarks.layer": layer, "benchmarks.model": model, "benchmarks.stack": stack}
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
    assert sum(part.limit for part in gpu.PARTS if part.default) <= 1200
