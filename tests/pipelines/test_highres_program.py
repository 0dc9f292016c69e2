"""The highres program on a tiny Stable Diffusion with random weights: its options, its files and what it refuses."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attngen import AgentAttention, Plan, SoftmaxAttention, Stage
from pipelines.images import read_settings

pytest.importorskip("transformers")

from pipelines import dry_run, highres, upscale
from tests.builders.programs import build_sd

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def pixels(image):
    return np.asarray(image, dtype=int)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def no_estimate(monkeypatch):
    """For tests of something else: the memory is not worked out, which costs more than the tiny pictures."""
    need = dry_run.MemoryNeed(*(size * 2**30 for size in (9, 3, 1, 2)))
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 4 * 2**30)
    monkeypatch.setattr(dry_run, "DryRun", lambda pipe: SimpleNamespace(enlargement=lambda *_: need))


@pytest.fixture
def run(model, tmp_path, capsys, monkeypatch):
    """Runs the program in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def program(*arguments, model=model):
        arguments = ["a fox", *arguments] if "--model" not in arguments else arguments
        try:
            code = highres.main([*map(str, arguments), "--model", str(model), "--steps", "4"])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return program


def test_a_picture_with_its_settings(run, no_estimate):
    code, out, err = run(
        "--height", 64, "--width", 96, "--base-size", 40, "--seed", 3, "--out", "x.png", "--keep-stages"
    )
    assert (code, err) == (0, "")
    assert (
        out.startswith("48x32 -> 96x64; needs about 12.00 GiB (weights 9.00 GiB, denoiser 3.00 GiB")
        and "x.png  (1 image, " in out
    )
    assert sorted(os.listdir()) == ["x-48x32.png", "x.png"]
    settings = read_settings("x.png")
    expected = {"prompt": "a fox", "seed": 3, "steps": 4, "strength": 0.4, "method": "agent", "size": "96x64"}
    assert {name: settings[name] for name in expected} == expected
    assert settings["stages"] == ["48x32", "96x64"] and settings["tiling"] is True and len(settings["model_hash"]) == 10
    assert read_settings("x-48x32.png")["stages"] == ["48x32"]
    assert Image.open("x.png").size == (96, 64)

    code, _, err = run("--height", 64, "--width", 96, "--image", "x-48x32.png", "--seed", 3, "--out", "again.png")
    assert code == 0, err
    assert (pixels(Image.open("again.png")) == pixels(Image.open("x.png"))).all()


def test_json_and_several_pictures(run, no_estimate):
    code, out, _ = run("--size", 48, "--base-size", 32, "--images", 2, "--json", "--out", "x.png", "--report")
    result = json.loads(out)
    assert code == 0 and result["files"] == ["x-0.png", "x-1.png"] == sorted(os.listdir())
    assert [stage["size"] for stage in result["stages"]] == ["32x32", "48x48"]
    assert [stage["steps"] for stage in result["stages"]] == [4, 1] and len(result["stages"][0]["seconds"]) == 2
    assert result["memory"]["total"] > result["memory"]["weights"] > 0
    assert result["report"]["layers"] and result["settings"]["size"] == "48x48"
    assert read_settings("x-1.png")["seed"] == 1
    run("--size", 48, "--base-size", 32, "--seed", 1, "--out", "one.png")
    assert (pixels(Image.open("one.png")) == pixels(Image.open("x-1.png"))).all()


def test_a_dry_run_draws_nothing(run):
    code, out, err = run("--size", 96, "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, err, os.listdir()) == (0, "", [])
    assert plan["stages"] == ["64x64", "96x96"] and plan["memory"]["denoiser"] > 0


def test_too_much_memory_is_refused(run, no_estimate, monkeypatch):
    code, _, err = run("--size", 128, "--max-memory", "11.5")
    assert code == 2 and err.count("\n") == 1 and os.listdir() == []
    assert "128x128 needs about 12.00 GiB, more than the 11.50 GiB of --max-memory; draw it smaller" in err
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 2 * 2**30)
    code, _, err = run("--size", 48, "--base-size", 32, "--max-memory", 12, "--out", "x.png")
    assert code == 0 and "warning: 48x48 needs about 3.00 GiB, but 2.00 GiB are free" in err


def test_an_unknown_need_is_said(run, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no numbers")

    monkeypatch.setattr(dry_run, "DryRun", lambda pipe: SimpleNamespace(enlargement=fail))
    code, out, err = run("--size", 48, "--base-size", 32, "--out", "x.png")
    assert code == 0 and out.startswith("32x32 -> 48x48\n")
    assert "warning: the memory cannot be estimated: no numbers" in err
    code, _, err = run("--size", 48, "--base-size", 32, "--max-memory", 9)
    assert code == 2 and "so --max-memory cannot be kept" in err


def test_a_plan_file(run, no_estimate):
    plan = Plan((Stage(1.0, {"*": SoftmaxAttention()}), Stage(0.3, {"*": AgentAttention(num_agents=4)})))
    plan.save("plan.json")
    code, _, err = run("--size", 48, "--base-size", 32, "--method", "plan.json", "--out", "x.png")
    assert code == 0, err
    assert read_settings("x.png")["method"] == "plan.json"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--size, or --height and --width, is required"),
        (["--height", 128], "--height and --width, is required"),
        (["--size", 128, "--width", 128], "--size sets both sides"),
        (["--size", 64], "64x64 is not larger than the 64x64 of the first stage"),
        (["--size", 127], "height must be a multiple of 2, got 127; the nearest is 128"),
        (["--size", 128, "--strength", 0], "'0' is not above 0 and up to 1"),
        (["--size", 128, "--strength", "nan"], "'nan' is not a finite number"),
        (["--size", 128, "--strength", 0.1], "a strength of 0.1 leaves none of 4 steps to an enlargement"),
        (["--size", 128, "--stages", 40], "40 enlargements are too many"),
        (["--size", 128, "--method", "nope"], "unknown method 'nope'; known: softmax"),
        (["--size", 128, "--method", "none", "--report"], "--report needs a --method other than none"),
        (["--size", 128, "--max-memory", 0], "argument --max-memory: must be greater than 0"),
        (["--size", 128, "--image", "none.png"], "none.png cannot be read as an image"),
        (["--size", 128, "--image", "x.png", "--base-size", 64], "so it excludes --base-size"),
        (["--size", 128, "--offload", "model", "--device", "cpu"], "--offload needs a GPU"),
    ],
)
def test_wrong_usage_is_one_sentence(run, no_estimate, arguments, sentence):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and sentence in err, err
    assert err.startswith("pipelines.highres: ") and err.count("\n") == 1
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory"),
    ],
)
def test_no_file_is_left_of_what_failed(run, no_estimate, monkeypatch, error, code, sentence):
    draw_stage = upscale._draw_stage

    def fail(pipe, picture, index, *rest):
        if index:
            raise error
        return draw_stage(pipe, picture, index, *rest)

    monkeypatch.setattr(upscale, "_draw_stage", fail)
    found, _, err = run("--size", 48, "--base-size", 32, "--out", "x.png")
    assert found == code and sentence in err and err.count("\n") == 1 and os.listdir() == []
