"""python -m pipelines.calibrate: plan, measurements, heat map, and one-sentence refusals."""

from __future__ import annotations

import json

import pytest

from attngen import Plan
from pipelines import calibrate
from tests.builders.programs import save_sit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_sit(tmp_path_factory.mktemp("sit"), attention="softmax")


def run(*arguments):
    return calibrate.main([str(argument) for argument in arguments])


def test_plan_measurements_and_heat_map(model, tmp_path, capsys):
    plan, heat_map = tmp_path / "plans" / "p.json", tmp_path / "map.png"
    arguments = ("--model", model, "--labels", "face", "1", "--speedup", 1.2, "--cost", "flops", "--steps", 2)
    assert run(*arguments, "--stages", 1, "--out", plan, "--heat-map", heat_map, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["speedup"] >= 1.2 and printed["file"] == str(plan) and printed["bound"] == {"speedup": 1.2}
    assert Plan.load(plan).stages and heat_map.read_bytes().startswith(b"\x89PNG")
    assert Plan.load(plan).measurements.error == printed["error"]


def test_seconds_first_and_a_file_to_go_on_from(model, tmp_path, capsys):
    """Agents in 64 tokens are not faster: exact attention is returned, with the reason."""
    arguments = ("--model", model, "--labels", "face", "--max-error", 0.5, "--steps", 2, "--threads", 1)
    files = ("--out", tmp_path / "p.json", "--resume", tmp_path / "kept" / "measured.json")
    assert run(*arguments, *files, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bound"] == {"max_error": 0.5} and printed["cost"] == "time"
    if printed["why_exact"] is None:
        assert printed["speedup"] >= 1.02 and printed["seconds"] < printed["seconds_exact"]
    else:
        assert printed["speedup"] == 1 and printed["error"] == 0
    assert run(*arguments, *files) == 0
    said = capsys.readouterr().out
    assert "exact attention everywhere: " in said or " s exact, " in said
    assert run(*arguments, *files, "--seed", 1) == 2
    assert "is of another calibration: its seed is 0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (("--solver", "euler"), 2),
        (("--solver", "heun"), 4),
        (("--scheduler", "FlowMatchHeunDiscreteScheduler"), 3),
    ],
)
def test_calibrated_with_the_sampler_that_will_draw(model, tmp_path, capsys, arguments, calls):
    sampling = ("--steps", 2, *arguments)
    asked = ("--labels", "face", "--speedup", 1.2, "--cost", "flops", "--stages", 1, "--out", tmp_path / "p.json")
    assert run("--model", model, *asked, *sampling, "--json") == 0
    assert Plan.load(tmp_path / "p.json").measurements.calls == (calls,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a cat", "--speedup", 2), "draws classes, not texts"),
        (("--labels", "dragon", "--speedup", 2), "dragon"),
        (("--labels", "face", "--speedup", 0.5), "above 1, got 0.5"),
        (("--labels", "face", "--speedup", 900, "--steps", 3, "--cost", "flops"), "the most these candidates reach"),
        (("--labels", "face", "--max-error", 0.1, "--steps", 2, "--stages", 3), "3 stages need as many steps"),
        (
            ("--labels", "face", "--max-error", 0.1, "--stages", 9),
            "num_stages must be a whole number from 1 to 8",
        ),
        (
            ("--labels", "face", "--speedup", 2, "--scheduler", "NoScheduler"),
            "diffusers has no scheduler 'NoScheduler'",
        ),
        (
            ("--labels", "face", "--speedup", 2, "--scheduler", "FlowMatchEulerDiscreteScheduler", "--solver", "heun"),
            "--sampler and --solver are for SiT's own scheduler",
        ),
    ],
)
def test_one_sentence_for_what_cannot_be(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("--model", model, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "x", "--labels", "face"),
        ("--model", "x", "--speedup", 2),
        ("--model", "x", "--labels", "face", "--speedup", 2, "--out", "plan.png"),
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_labels_of_no_model_of_classes(tmp_path, capsys):
    assert run("--model", tmp_path / "none", "--labels", "face", "--speedup", 2) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert run("--model", tmp_path, "--labels", "face", "--speedup", 2) == 2
    assert "give --prompt" in capsys.readouterr().err
