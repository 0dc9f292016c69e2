"""pipelines.compare: a labelled grid of methods and seeds, its numbers, and what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageStat

from pipelines import compare
from pipelines.cli import UserError
from pipelines.images import read_settings
from pipelines.methods.uses import Use


def run(tmp_path, *argv):
    return compare.main([*argv, "--steps", "2", "--out", str(tmp_path / "grid.png")])


def test_a_grid_of_mediators_with_its_numbers(tmp_path, capsys):
    argv = ["clock", "--mediators", "4", "1:4,0.5:16", "--images", "2", "--seed", "5", "--difference"]
    assert run(tmp_path, *argv) == 0
    printed = capsys.readouterr().out
    assert "2 warm-up steps per method, not timed" in printed and "grid.png" in printed
    numbers = json.loads((tmp_path / "grid.json").read_text())
    unchanged, four, by_time = numbers["rows"]
    assert [row["label"] for row in numbers["rows"]] == ["unchanged", "mediators 4", "mediators 1:4,0.5:16"]
    assert four["flops"] < by_time["flops"] < unchanged["flops"] and four["seconds"] > 0
    assert (
        "pairs with unchanged on the same noise, 2 images" in printed
        and "mediators 1:4,0.5:16: latent error" in printed
    )
    assert unchanged["paired"]["ssim"]["mean"] == 1 and len(four["paired"]["psnr"]["values"]) == 2
    assert four["paired"]["latent_error"]["mean"] > by_time["paired"]["latent_error"]["mean"] > 0
    assert unchanged["error"] == 0 and by_time["error"] > 0 and "not timed" in numbers["warm_up"]
    settings = read_settings(tmp_path / "grid.png")
    assert settings["program"] == "pipelines.compare" and settings["seed"] == 5 and settings["images"] == 2
    sheet = Image.open(tmp_path / "grid.png")
    with_difference = sheet.height
    assert sheet.width > 2 * compare.SHOWN_SIZE and with_difference > 5 * compare.SHOWN_SIZE
    last = sheet.crop((sheet.width - 130, sheet.height - 130, sheet.width - 2, sheet.height - 2))
    assert ImageStat.Stat(last.convert("L")).mean[0] < 64, "the last row is a difference, black where nothing differs"
    assert run(tmp_path, *argv[:-1]) == 0
    assert Image.open(tmp_path / "grid.png").height == with_difference - 2 * (compare.SHOWN_SIZE + 2)


def test_texts_plans_and_json(tmp_path, capsys):
    pytest.importorskip("transformers")
    from attngen import AgentAttention, Plan
    from tests.builders.programs import build_sd

    build_sd().save_pretrained(tmp_path / "model")
    Plan.of(AgentAttention(num_agents=4)).save(tmp_path / "plan.json")
    argv = ["a fox", "--model", str(tmp_path / "model"), "--methods", "none", "agent", str(tmp_path / "plan.json")]
    assert run(tmp_path, *argv, "--agents", "16", "--images", "1", "--height", "64", "--width", "64", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"]] == ["unchanged", "agent 16", "plan"]
    exact, agent, plan = result["rows"]
    assert exact["flops"] > agent["flops"] and agent["error"] > 0 and plan["error"] > 0
    assert result["settings"]["size"] == "64x64" and result["file"].endswith("grid.png")
    assert json.loads((tmp_path / "grid.json").read_text()) == result


def test_a_stopped_comparison_leaves_no_file(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "watch", stop)
    assert run(tmp_path, "clock", "--mediators", "4") == 130
    assert not list(tmp_path.glob("*")) and "interrupted" in capsys.readouterr().err


def test_methods_as_they_are_typed(tmp_path):
    assert compare.read_use("tome:ratio=0.3,stride=4") == Use("tome", {"ratio": "0.3", "stride": "4"})
    options = compare.parse_arguments(["clock", "--agents", "16", "64"])
    uses = compare.expand("agent", options)
    assert [use.options["num_agents"] for use in uses] == ["16", "64"]
    for one in ("agent:num_agents=8", "agent 8", "agent:8"):
        assert compare.expand(one, options) == [Use("agent", {"num_agents": "8"}).checked()]
    with pytest.raises(UserError, match="cannot read the plan file"):
        compare.expand(str(tmp_path / "none.json"), options)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clock", "--methods", "none"], "at least two methods"),
        (["clock", "--mediators", "4", "4"], "is given twice"),
        (["clock", "--methods", "none", "agentt"], "agentt"),
        (["clock", "--methods", "none", "tome:ratio=0.3,4"], "'0.3,4' is not a number from 0 to 0.9"),
        (["clock", "--methods", "none", "tome:ratio"], "'ratio' is not a number from 0 to 0.9"),
        (["dragon", "--mediators", "4", "16"], "dragon"),
        (["clock", "--methods", "none", "tome"], "tome"),
        (["clock", "--mediators", "4", "999"], "999 is more than"),
        (["clock", "--mediators", "4", "1:4,0.001:999"], "999 is more than"),
        (["clock", "--methods", "none", "mediators", "--agents", "4"], "--agents is for the method 'agent'"),
    ],
)
def test_wrong_arguments_end_in_a_sentence_and_no_file(tmp_path, argv, message, capsys):
    assert run(tmp_path, *argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("*"))
