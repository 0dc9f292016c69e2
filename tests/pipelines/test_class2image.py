"""The class2image program, and the samples and the exported pipeline of a training run that it draws from."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from pipelines import class2image
from pipelines.images import read_settings
from train.loop.preview import export_pipeline, sample_grid
from train.recipe.objectives import make_objective
from train.recipe.presets import PRESETS

NAMES = {0: "face", 1: "heart"}
DATA = SimpleNamespace(channels=3, vae=None, id2label=NAMES)
OBJECTIVE = make_objective("velocity")
CONFIG = PRESETS["emoji-tiny"]
ROOT = Path(__file__).parents[2]


def make_transformer(attention="mediator"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiTTransformer2DModel(
            sample_size=16,
            patch_size=4,
            in_channels=3,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_classes=2,
            learn_sigma=False,
            attention=attention,
            num_mediators=4,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    export_pipeline(make_transformer(), OBJECTIVE, DATA, folder)
    return folder


@pytest.fixture(scope="module")
def softmax_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("softmax") / "pipeline"
    export_pipeline(make_transformer("softmax"), OBJECTIVE, DATA, folder)
    return folder


@pytest.fixture
def draw(model, tmp_path, capsys, monkeypatch):
    """Runs the program in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=model):
        try:
            code = class2image.main([*map(str, arguments), "--steps", "2", "--model", str(model)])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_picture_with_its_settings(draw, tmp_path):
    code, out, err = draw("heart", "--seed", 5, "--out", "new/x.png", "--mediators", 4, "--guidance-scale", 1.5)
    assert (code, err) == (0, "")
    assert out.startswith("new/x.png  (1 image, ") and out.endswith(" s)\n")
    settings = read_settings(tmp_path / "new/x.png")
    expected = {"prompt": "heart", "labels": [1], "seed": 5, "steps": 2, "guidance_scale": 1.5, "mediators": 4}
    assert {name: settings[name] for name in expected} == expected
    assert settings["size"] == "16x16" and settings["sampler"] == "ode heun" and settings["model"] == "pipeline"
    assert len(settings["model_hash"]) == 10
    with Image.open(tmp_path / "new/x.png") as image:
        assert image.size == (128, 128) and image.info["parameters"].startswith("heart\nSteps: 2")


def test_it_is_the_pipelines_picture(draw, model, tmp_path):
    draw("face", "heart", "--images", 2, "--seed", 3, "--out", "all.png", "--scale", 1)
    pipe = SiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for label, seed in ((0, 3), (0, 4), (1, 5), (1, 6)):
        generator = torch.Generator().manual_seed(seed)
        (picture,) = pipe(label, num_inference_steps=2, guidance_scale=2.0, generator=generator).images
        assert contains(pixels("all.png"), np.asarray(picture)), (label, seed)


def contains(sheet, picture):
    """Whether the picture stands somewhere in the sheet, up to rounding."""
    height, width = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet.astype(int), (height, width, 3))[:, :, 0]
    return np.abs(windows - picture.astype(int)).max(axis=(2, 3, 4)).min() <= 1


def test_batches_do_not_change_a_picture(draw, monkeypatch):
    draw("face", "--images", 5, "--out", "one.png")
    monkeypatch.setattr(class2image, "BATCH_SIZE", 2)
    draw("face", "--images", 5, "--out", "two.png")
    assert np.abs(pixels("one.png").astype(int) - pixels("two.png").astype(int)).max() <= 1


def test_numbers_and_names_are_the_same(draw):
    draw("heart", "--out", "name.png")
    draw("1", "--out", "number.png")
    assert (pixels("name.png") == pixels("number.png")).all()


def test_json(draw, tmp_path):
    code, out, _ = draw("face", "--json", "--out", "x.png", "--mediators", "1:1,0.5:16")
    result = json.loads(out)
    assert code == 0 and result["file"] == "x.png" and result["seconds"] > 0
    assert result["settings"]["mediators"] == "1:1,0.5:16"
    assert {**result["settings"], "versions": read_settings("x.png")["versions"]} == read_settings("x.png")


def test_without_out_a_new_file_is_made(draw, tmp_path):
    draw("face", "heart", "--seed", 9)
    draw("face", "heart", "--seed", 9)
    assert sorted(os.listdir("outputs")) == ["face-heart-9-2.png", "face-heart-9.png"]


def test_list(draw):
    assert draw("--list")[:2] == (0, "   0  face\n   1  heart\n")


@pytest.mark.parametrize(
    "arguments, sampler",
    [
        ([], "ode heun"),
        (["--solver", "euler"], "ode euler"),
        (["--sampler", "sde"], "sde euler"),
        (["--sampler", "sde", "--solver", "heun"], "sde heun"),
        (["--sampler", "ode"], "ode heun"),
    ],
)
def test_samplers(draw, arguments, sampler):
    assert draw("face", *arguments, "--out", "x.png")[0] == 0
    assert read_settings("x.png")["sampler"] == sampler


def test_sizes(draw):
    draw("face", "--height", 24, "--width", 32, "--out", "x.png", "--scale", 2)
    assert Image.open("x.png").size == (64, 48)


def test_methods(draw, softmax_model, tmp_path):
    plan = {"format": "attngen-plan", "version": 1, "min_tokens": 1, "stages": []}
    plan["stages"] = [{"start": 1.0, "layers": {"*": {"method": "agent", "num_agents": 4}}}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert draw("face", "--out", "exact.png", model=softmax_model)[0] == 0
    code, _, err = draw("face", "--out", "plan.png", "--method", "plan.json", model=softmax_model)
    assert code == 0, err
    assert read_settings("plan.png")["method"] == "plan.json"
    assert (pixels("exact.png") != pixels("plan.png")).any()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["cat"], "unknown class 'cat'"),
        (["7"], "class label 7 is out of range"),
        (["-1"], "class label -1 is out of range"),
        (["face", "--mediators", "99"], "99 is more than 16, the 4 x 4 tokens of this image; give 1 to 16"),
        (["face", "--mediators", "1:4,0.001:99"], "99 is more than 16, the 4 x 4 tokens of this image; give 1 to 16"),
        (["face", "--mediators", "9", "--height", "8", "--width", "16"], "9 is more than 8, the 2 x 4 tokens"),
        (["face", "--mediators", "few"], "'few' is neither a count"),
        (["face", "--mediators", "1:4,x:2"], "'1:4,x:2' is neither a count"),
        (
            ["face", "--mediators", "0.5:4"],
            "--mediators: times must fall from 1 (noise)",
        ),
        (["face", "--height", "15"], "height must be a positive multiple of 4"),
        (["face", "--guidance-scale", "nan"], "'nan' is not a finite number of at least 0"),
        (["face", "--images", "0"], "'0' is not a whole number of at least 1"),
        (["face", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["face", "--out", "x.jpg"], "'x.jpg' does not end in .png"),
        (["face", "--method", "nope"], "unknown method 'nope'; known: softmax"),
        (["face", "--method", "agent"], "this model already uses mediator attention"),
        (["face", "--device", "abacus"], "there is no device 'abacus' here"),
        (["face", "--sampler", "magic"], "invalid choice: 'magic'"),
        ([], "name at least one class; --list prints them"),
    ],
)
def test_wrong_usage_is_one_sentence(draw, arguments, sentence):
    code, out, err = draw(*arguments)
    assert code == 2 and out == "", err
    assert err.startswith("pipelines.class2image: ") and sentence in err
    assert err.count("\n") == 1
    assert os.listdir() in ([], ["outputs"]) and not any(Path().rglob("*.png"))


def test_models_that_are_none(draw, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text("{")
    for name, sentence in (
        ("empty", "empty is not a pipeline folder: it has no model_index.json"),
        ("other", "holds a StableDiffusionPipeline, not a SiTPipeline; try python -m pipelines.text2image"),
        ("bad", "cannot be read"),
        ("no/where/at/all", "there is no folder 'no/where/at/all', and it is not a hub id"),
    ):
        code, _, err = draw("face", model=name)
        assert code == 2 and sentence in err and err.count("\n") == 1


def test_a_hub_id_without_network(draw):
    code, _, err = draw("face", model="nobody/nothing")
    assert code == 1 and err.count("\n") == 1
    assert "cannot get nobody/nothing from the Hugging Face hub: check the name and the network" in err


def test_a_damaged_model_is_one_sentence(draw, model, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "copy")
    weights = tmp_path / "copy/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = draw("face", model=tmp_path / "copy")
    assert code == 1 and err.count("\n") == 1 and "cannot load" in err


def test_nan_is_one_sentence_and_no_file(draw, tmp_path):
    transformer = make_transformer()
    torch.nn.init.constant_(transformer.proj_out.bias, float("nan"))
    export_pipeline(transformer, OBJECTIVE, DATA, tmp_path / "nan")
    code, _, err = draw("face", "--out", "x.png", model=tmp_path / "nan")
    assert code == 1 and err.count("\n") == 1 and "not finite" in err
    assert not Path("x.png").exists()


def test_interruption(draw, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(class2image, "draw_rows", interrupt)
    assert draw("face") == (130, "", "pipelines.class2image: interrupted\n")


def test_without_the_shipped_model(monkeypatch, capsys):
    monkeypatch.setattr(class2image, "shipped_models", dict)
    assert class2image.main(["--list"]) == 2
    assert "give one with --model" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["class2image", "text2image"])
def test_help_imports_nothing_heavy(program):
    code = (
        f"import sys; from pipelines.{program} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m pipelines.{program}" in done.stdout and "examples:" in done.stdout


# Samples and export of a training run


def test_an_exported_pipeline_is_half_and_readable(model):
    assert not list(model.parent.glob(".*"))
    for path in (model, *model.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
    pipe = SiTPipeline.from_pretrained(model, dtype=torch.float16)
    assert pipe.transformer.dtype == torch.float16 and pipe.id2label == NAMES
    assert pipe.scheduler.config["sampler"] == "ode"
    index = json.loads((model / "model_index.json").read_text())
    assert index["transformer"] == ["attngen", "SiTTransformer2DModel"]


def test_export_replaces_a_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    export_pipeline(make_transformer(), OBJECTIVE, DATA, folder)
    (folder / "stale.txt").write_text("old")
    export_pipeline(make_transformer(), OBJECTIVE, SimpleNamespace(vae=None, id2label={0: "new", 1: "names"}), folder)
    assert not (folder / "stale.txt").exists() and os.listdir(tmp_path) == ["pipeline"]

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(SiTTransformer2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(make_transformer(), OBJECTIVE, DATA, folder)
    assert SiTPipeline.load_config(folder)["id2label"]["0"] == "new" and os.listdir(tmp_path) == ["pipeline"]


def test_sample_sheet(tmp_path):
    paths = [sample_grid(make_transformer(), OBJECTIVE, CONFIG, DATA, tmp_path, step) for step in (1, 2)]
    assert paths[0] == tmp_path / "samples" / "step-00000001.png"
    assert (pixels(paths[0]) == pixels(paths[1])).all(), "the seeds are fixed"
    assert read_settings(paths[0])["training_step"] == 1
    plain = dataclasses.replace(CONFIG, attention="softmax", mediator_counts=())
    one_group = sample_grid(make_transformer("softmax"), OBJECTIVE, plain, DATA, tmp_path, 3)
    assert pixels(one_group).shape[1] < pixels(paths[0]).shape[1], "two counts of mediators stand side by side"
