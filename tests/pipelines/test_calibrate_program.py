"""python -m pipelines.calibrate: plan, measurements, heat map, and one-sentence refusals."""

from __future__ import annotations

import json

import pytest

from attngen import Plan
from attngen.calibration import Measurements
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
    assert Measurements.load(plan.with_suffix(".measurements.json")).error == printed["error"]


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
    assert Measurements.load(tmp_path / "p.measurements.json").calls == (calls,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a cat", "--speedup", 2), "draws classes, not texts"),
        (("--labels", "dragon", "--speedup", 2), "dragon"),
        (("--labels", "face", "--speedup", 0.5), "above 1, got 0.5"),
        (("--labels", "face", "--speedup", 900, "--steps", 3, "--cost", "flops"), "the most these candidates reach"),
        (("--labels", "face", "--max-error", 0.1, "--steps", 2), "3 stages need as many steps"),
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
        ("--model", "x", "--labels", "face", "--speedup", 2, "--max-error", 0.1),
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
