"""The text2image program on a tiny Stable Diffusion with random weights."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import text2image
from pipelines.engine.loading import single_file_pipeline
from pipelines.images import read_settings
from tests.builders.programs import build_sd

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-sd")
    build_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def draw(model, tmp_path, capsys, monkeypatch):
    """Runs the program in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=model):
        try:
            code = text2image.main([*map(str, arguments), "--model", str(model), "--steps", "2"])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_picture_with_its_settings(draw):
    code, out, err = draw("a fox", "--negative-prompt", "blur", "--seed", 4, "--guidance-scale", 3, "--out", "x.png")
    assert (code, err) == (0, "")
    assert out.startswith("x.png  (1 image, ")
    settings = read_settings("x.png")
    expected = {"prompt": "a fox", "negative_prompt": "blur", "seed": 4, "steps": 2, "guidance_scale": 3.0}
    assert {name: settings[name] for name in expected} == expected
    assert settings["method"] == "agent" and settings["size"] == "64x64" and settings["sampler"] == "DDIMScheduler"
    assert Image.open("x.png").size == (64, 64)


def test_methods_change_the_picture_and_seeds_repeat_it(draw):
    for name in ("agent", "none", "softmax", "todo"):
        assert draw("a fox", "--method", name, "--out", f"{name}.png")[0] == 0
    draw("a fox", "--out", "again.png")
    assert (pixels("agent.png") == pixels("again.png")).all()
    assert (pixels("none.png") == pixels("softmax.png")).all()
    assert (pixels("agent.png") != pixels("none.png")).any()
    assert (pixels("agent.png") != pixels("todo.png")).any()


def test_several_prompts_make_a_grid_of_independent_pictures(draw):
    draw("a fox", "a cat", "--images", 2, "--method", "none", "--out", "all.png")
    draw("a cat", "--seed", 3, "--method", "none", "--out", "last.png")
    sheet, last = pixels("all.png").astype(int), pixels("last.png").astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, last.shape)[:, :, 0]
    assert np.abs(windows - last).max(axis=(2, 3, 4)).min() <= 1


def test_compare_and_report(draw):
    code, out, err = draw("a fox", "--compare", "--report", "--out", "both.png")
    assert code == 0, err
    assert "attentions.0.transformer_blocks.0.attn1" in out
    assert "exact: " in out and "agent: " in out and "both.png  (2 images, " in out
    assert Image.open("both.png").width > 2 * 64


def test_json_is_all_there_is_on_stdout(draw):
    code, out, _ = draw("a fox", "--compare", "--report", "--json", "--out", "both.png")
    result = json.loads(out)
    assert code == 0 and result["file"] == "both.png"
    assert set(result["seconds_by_method"]) == {"exact", "agent"}
    assert result["report"]["layers"] and result["settings"]["prompts"] == ["a fox"]


def test_plan_file(draw, tmp_path):
    stages = [{"start": 1.0, "layers": {"*": {"method": "agent", "num_agents": 16}}}]
    plan = {"format": "attngen-plan", "version": 1, "stages": stages, "min_tokens": 64}
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    assert draw("a fox", "--method", "mine.json", "--out", "plan.png")[0] == 0
    assert read_settings("plan.png")["method"] == "mine.json"


@pytest.mark.filterwarnings("default::attngen.AttnGenWarning")
def test_a_patch_that_does_nothing_says_so(draw):
    code, _, err = draw("a fox", "--height", 32, "--width", 32, "--out", "x.png")
    assert code == 0 and err.startswith("pipelines.text2image: warning: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["a fox", "--method", "nope"], "unknown method 'nope'; known: softmax"),
        (["a fox", "--height", "33", "--width", "32"], "height must be a positive multiple of 8, got 33; try 32 or 40"),
        (["a fox", "--height", "32"], "--height and --width go together"),
        (["a fox", "--guidance-scale", "-2"], "'-2' is not a finite number of at least 0"),
        (["a fox", "--images", "0"], "'0' is not a whole number of at least 1"),
        (["a fox", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a fox", "--out", "x.gif"], "'x.gif' does not end in .png"),
        (["a fox", "--offload", "model", "--device", "cpu"], "--offload needs a GPU"),
        (["a fox", "--method", "none", "--compare"], "--compare and --report need a --method other than none"),
        ([], "the following arguments are required: PROMPT"),
    ],
)
def test_wrong_usage_is_one_sentence(draw, arguments, sentence):
    code, out, err = draw(*arguments)
    assert code == 2 and out == "", err
    assert err.startswith("pipelines.text2image: ") and sentence in err and err.count("\n") == 1


def test_models_that_are_none(draw, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sit").mkdir()
    (tmp_path / "sit" / "model_index.json").write_text('{"_class_name": "SiTPipeline"}')
    (tmp_path / "weights.ckpt").write_bytes(b"")
    for name, sentence in (
        ("empty", "not a pipeline folder"),
        ("sit", "draws classes, not texts; try python -m pipelines.class2image"),
        ("weights.ckpt", "is not a .safetensors file; --allow-pickle reads others"),
        ("no/where/at/all", "there is no file or folder 'no/where/at/all', and it is not a hub id"),
    ):
        code, _, err = draw("a fox", model=name)
        assert code == 2 and sentence in err and err.count("\n") == 1


def test_a_pipeline_that_draws_no_texts(draw, tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    DDIMPipeline(UNet2DModel(sample_size=8, **blocks, **kinds), DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    code, _, err = draw("a fox", model=tmp_path / "ddim")
    assert code == 2 and "is a DDIMPipeline, which does not draw texts" in err and err.count("\n") == 1


def test_a_hub_id_without_network(draw):
    code, _, err = draw("a fox", model="nobody/nothing")
    assert code == 1 and err.count("\n") == 1
    assert "cannot get nobody/nothing from the Hugging Face hub: check the name and the network" in err


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_missing_packages_are_named(draw, monkeypatch, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    code, _, err = draw("a fox")
    assert code == 2 and err.count("\n") == 1
    assert f"text-to-image needs {package}: install them with pip install 'attngen[text2image]'" in err


def test_nan_is_one_sentence_and_no_file(draw, tmp_path):
    pipe = build_sd()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    code, _, err = draw("a fox", "--out", "x.png", model=tmp_path / "nan")
    assert code == 1 and "not finite; try --dtype float32" in err and err.count("\n") == 1
    assert "x.png" not in os.listdir()


def test_single_files_are_told_apart(tmp_path):
    from safetensors.torch import save_file

    keys = {
        "StableDiffusionXLPipeline": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        "StableDiffusionPipeline": "model.diffusion_model.input_blocks.0.0.weight",
    }
    for kind, key in keys.items():
        save_file({key: torch.zeros(4, 4)}, tmp_path / f"{kind}.safetensors")
        assert single_file_pipeline(str(tmp_path / f"{kind}.safetensors")) == kind
