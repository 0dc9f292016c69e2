"""A run as a folder: resumed, exported and drawn from by its name alone, and what it records of itself."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import attngen
from pipelines import class2image
from pipelines.cli import UserError
from pipelines.engine import runs
from pipelines.engine.loading import LoadOptions, load_pipeline
from train import distill, export, fid, sample, sit, vae
from train.loop.checkpoint import list_checkpoints
from train.recipe.config import TrainingConfig
from train.recipe.files import read_config
from train.recipe.presets import PRESETS

CPU = torch.device("cpu")
FACTS = {"name": "a set", "pictures": 3, "size": "16 x 16"}


def train(*argv: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process runs many trainings here
    return sit.main([*argv, "--cpu", "--trackers", "none"])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped after step 5 of 20, with checkpoints of 2, 4 and 5."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    given = ["--preset", "emoji-tiny", "--save-every", "2", "--keep-every", "2", "--keep", "1", "--ema-stds", "0.1"]
    assert train(*given, "--steps", "5", "--sample-every", "0", "--sample-steps", "1", "--out", str(out)) == 0
    import shutil

    shutil.rmtree(out / "pipeline")  # as if it went on
    return out


def test_resume_needs_the_name_of_the_run_alone(tmp_path, capsys):
    given = ["--preset", "emoji-tiny", "--steps", "4", "--num-layers", "1", "--sample-steps", "1", "--seed", "7"]
    assert train(*given, "--out", str(tmp_path / "whole")) == 0
    assert train(*given, "--out", str(tmp_path / "parts"), "--max-minutes", "0") == 0
    assert f"--resume {tmp_path / 'parts'} continues" in capsys.readouterr().err
    assert train("--resume", str(tmp_path / "parts")) == 0
    whole, parts = (list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts"))
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(parts / file.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_start_is_recorded_with_what_changed(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train("--preset", "emoji-tiny", "--steps", "2", "--sample-steps", "1", "--out", out) == 0
    capsys.readouterr()
    assert train("--resume", out, "--steps", "3", "--balance", "0.5") == 0
    assert "balance is 0.5 from here on, before it was 0.0" in capsys.readouterr().err
    first, second = lines(tmp_path / "run" / "starts.jsonl")
    assert (first["step"], first["changes"]) == (0, {})
    assert (second["step"], second["changes"]) == (2, {"balance": [0.0, 0.5], "steps": [2, 3]})
    assert first["command"].startswith("python -m train.sit --preset emoji-tiny --steps 2")
    assert second["command"].startswith(f"python -m train.sit --resume {out} --steps 3")
    assert first["data"] == second["data"] and first["host"] and first["device"] and first["threads"] >= 1
    assert first["versions"]["torch"] == torch.__version__ and {"commit", "time", "processes"} <= first.keys()


def test_a_run_that_is_not_there_or_is_another(tmp_path, stopped, capsys):
    for argv, message in (
        (["--resume", str(tmp_path)], "there is no run to resume"),
        (["--resume", str(stopped), "--out", str(tmp_path)], "name two runs"),
        (["--resume", str(stopped), "--preset", "emoji-tny"], "near it: emoji-tiny"),
        (["--num-layrs", "3"], "near it: --num-layers"),
    ):
        with pytest.raises(SystemExit) as exit:
            sit.main(argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert train("--resume", str(stopped), "--num-layers", "3") == 2
    assert "num_layers = 2, not 3" in capsys.readouterr().err


def test_a_configuration_from_a_file(tmp_path, stopped):
    _, config = sit.parse_arguments(["--config", str(stopped / "config.json"), "--steps", "9"])
    assert config.steps == 9 and config.num_layers == 2 and config.classes == ("face", "heart")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"image_size": 16, "ema_stds": [0.1], "max_broken": 3, "cooldown": 1}))
    read = read_config(file, PRESETS["emoji-tiny"])
    assert read.ema_stds == (0.1,) and read.num_layers == 2 and read.max_broken == 3 and read.cooldown == 1.0
    for name, preset in PRESETS.items():
        file.write_text(json.dumps(preset.to_dict()))
        assert read_config(file, TrainingConfig()) == preset, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
        ('{"stps": 3}', "unknown field 'stps'; near it: steps"),
        ('{"steps": "3"}', "steps in .* must be an integer, got '3'"),
        ('{"steps": true}', "must be an integer, got True"),
        ('{"flip": 1}', "must be true or false"),
        ('{"classes": "heart"}', "must be a list"),
        ('{"mediator_counts": [4, 1.5]}', "each of mediator_counts in .* must be an integer, got 1.5"),
        ('{"steps": 0}', "steps must be at least 1"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(file, TrainingConfig())


def test_milestones_are_kept(stopped):
    assert runs.steps_of(stopped) == [2, 4, 5]
    with pytest.raises(ValueError, match="keep_every must be a multiple of save_every, got 3 and 2"):
        TrainingConfig(keep_every=3, save_every=2)


@pytest.mark.parametrize(
    ("options", "file", "dtype"),
    [
        ((), "step-00000005/ema", torch.float16),
        (("--step", "4", "--dtype", "bf16"), "step-00000004/ema", torch.bfloat16),
        (("--weights", "model", "--dtype", "fp32"), "step-00000005/model", torch.float32),
        (("--weights", "std:0.1", "--step", "2", "--dtype", "fp32"), "step-00000002/average_0", torch.float32),
    ],
)
def test_any_checkpoint_is_exported(stopped, tmp_path, capsys, options, file, dtype):
    assert export.main([str(stopped), *options, "--out", str(tmp_path / "made")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    made = load_file(tmp_path / "made/transformer/diffusion_pytorch_model.safetensors")
    wanted = load_file(stopped / "checkpoints" / f"{file}.safetensors")
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, wanted[name].to(dtype), atol=1e-6, rtol=1e-5)
    pipe = attngen.SiTPipeline.from_pretrained(tmp_path / "made")
    assert pipe.id2label == {0: "face", 1: "heart"} and pipe.scheduler.config["solver"] == "heun"


def test_what_cannot_be_exported(stopped, tmp_path, capsys):
    for argv, message in (
        ([f"{stopped}@3"], "has no checkpoint of step 3; it has 2, 4, 5"),
        ([str(tmp_path / "none")], "there is no run"),
        ([str(tmp_path)], "has no checkpoint yet"),
        ([str(stopped), "--weights", "std:0.1", "--step", "99"], "up to step 5"),
    ):
        assert export.main(argv) == 2 and message in capsys.readouterr().err
    for argv, message in (
        (["run", "--weights", "std:2"], "between 0 and 0.288"),
        (["run", "--push-to", "name"], "OWNER/NAME"),
        ([f"{stopped}@4", "--step", "2"], "two steps"),
    ):
        with pytest.raises(SystemExit):
            export.main(argv)
        assert message in capsys.readouterr().err


def test_push_to_the_hub(stopped, tmp_path, monkeypatch, capsys):
    called = []

    class Hub:
        def create_repo(self, repository, **options):
            called.append((repository, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "me/refused":
                raise RuntimeError("403 Forbidden\nand more")
            called.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    given = [str(stopped), "--out", str(tmp_path / "made"), "--push-to"]
    assert export.main([*given, "me/emoji", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/emoji"
    assert called == [
        ("me/emoji", {"private": True, "exist_ok": True}),
        ("me/emoji", ["model_index.json", "scheduler", "transformer"]),
    ]
    assert export.main([*given, "me/refused"]) == 1
    assert "is written, and could not be uploaded to me/refused: 403 Forbidden" in capsys.readouterr().err


def test_programs_draw_from_a_run_by_its_name(stopped, tmp_path, capsys, global_rng_untouched):
    assert runs.resolve(str(stopped)) == str(stopped / "checkpoints" / "step-00000005")
    assert runs.resolve(f"{stopped}@4") == str(stopped / "checkpoints" / "step-00000004")
    assert [runs.resolve(name) for name in ("owner/model", "emoji@4", "no/such@folder")] == [
        *("owner/model", "emoji@4", "no/such@folder")
    ]
    pipe = load_pipeline(f"{stopped}@4", LoadOptions(dtype="float32"), CPU)
    averaged = load_file(stopped / "checkpoints" / "step-00000004" / "ema.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipe.transformer.state_dict().items())
    with pytest.raises(UserError, match="has no checkpoint of step 3"):
        load_pipeline(f"{stopped}@3", LoadOptions(), CPU)

    picture = tmp_path / "face.png"
    assert class2image.main(["face", "--model", f"{stopped}@2", "--steps", "1", "--out", str(picture)]) == 0
    assert picture.is_file()
    capsys.readouterr()
    assert class2image.main(["--list", "--model", str(stopped)]) == 0
    assert capsys.readouterr().out.split() == ["0", "face", "1", "heart"]
    given = ["--num-pictures", "3", "--steps", "1", "--labels", "balanced", "--model", f"{stopped}@4"]
    assert sample.main([*given, "--out", str(tmp_path / "set")]) == 0
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["settings"]["model"] == "stopped@4"


def test_fid_draws_the_images_of_a_run(stopped, tmp_path, monkeypatch, capsys):
    measured = []

    def numbers(options):
        measured.append(options)
        return {"values": {"FD": 1.0}, "skipped": {}, "extractor": "x", "generated": FACTS, "reference": FACTS}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "fid", numbers)
    given = [f"{stopped}@4", "emoji", "--extractor", "emoji", "--num-pictures", "3"]
    assert fid.main(given) == 0 and fid.main([*given, "--samples", "mine"]) == 0
    assert fid.main(["mine", "emoji"]) == 0  # images as before
    assert [options.generated for options in measured] == ["samples/stopped@4", "mine", "mine"]
    assert len(list(Path("samples/stopped@4/pictures").iterdir())) == 3
    assert json.loads(Path("mine/manifest.json").read_text())["settings"]["labels"] == "data"
    assert fid.main([f"{stopped}@3", "emoji"]) == 2
    assert "has no checkpoint of step 3" in capsys.readouterr().err


def test_a_checkpoint_that_describes_nothing_is_refused(stopped, tmp_path):
    import shutil

    broken = tmp_path / "run" / "checkpoints" / "step-00000004"
    shutil.copytree(stopped / "checkpoints" / "step-00000004", broken)
    state = json.loads((broken / "state.json").read_text())
    del state["pipeline"]
    (broken / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="does not describe a pipeline"):
        load_pipeline(str(tmp_path / "run"), LoadOptions(), CPU)
    (broken / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_pipeline(f"{tmp_path / 'run'}@4", LoadOptions(), CPU)
    (broken / "state.json").write_text((stopped / "checkpoints/step-00000004/state.json").read_text())
    (broken / "ema.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="ema.safetensors cannot be read"):
        load_pipeline(str(broken), LoadOptions(), CPU)


def test_an_autoencoder_resumes_by_the_name_of_its_run(tmp_path, capsys):
    given = ["--data", "emoji", "--image-size", "16", "--crop-size", "8", "--latent-channels", "2", "--batch-size", "2"]
    given += [
        "--channels",
        "4",
        "8",
        "8",
        "--layers",
        "1",
        "1",
        "1",
        "--eval-images",
        "2",
        "--out",
        str(tmp_path / "a"),
    ]
    assert vae.main([*given, "--steps", "2", "--save-every", "1"]) == 0
    capsys.readouterr()
    assert vae.main(["--resume", str(tmp_path / "a"), "--steps", "3"]) == 0
    assert "steps is 3 from here on, before it was 2" in capsys.readouterr().err
    first, second = lines(tmp_path / "a" / "starts.jsonl")
    assert second["changes"] == {"steps": [2, 3]} and second["step"] == 2 and first["data"] == second["data"]
    with pytest.raises(SystemExit):
        vae.main(["--resume", str(tmp_path / "none")])
    assert "there is no run to resume" in capsys.readouterr().err


def test_a_distillation_takes_a_run_and_resumes_by_its_name(tmp_path, capsys):
    assert train("--preset", "emoji-tiny", "--attention", "softmax", "--mediator-counts", *(), "--steps", "1",
                 "--sample-steps", "1", "--out", str(tmp_path / "run")) == 0  # fmt: skip
    out = tmp_path / "m4.safetensors"
    given = ["--model", f"{tmp_path / 'run'}@1", "--method", "mediator:4", "--data", "emoji", "--batch-size", "2"]
    given += ["--steps", "3", "--measure", "1", "--cpu"]
    assert distill.main([*given, "--out", str(tmp_path / "whole.safetensors")]) == 0
    assert distill.main([*given, "--out", str(out), "--max-minutes", "0"]) == 0
    assert distill.main(["--resume", str(tmp_path / "m4.run"), "--save-every", "7"]) == 0
    whole, parts = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    first, second = lines(tmp_path / "m4.run" / "starts.jsonl")
    assert (first["step"], second["step"]) == (0, 1) and second["changes"] == {"save_every": [200, 7]}
    for argv, message in (
        (["--resume", str(tmp_path / "no.run")], "there is no run to resume"),
        (["--resume", str(out), "--out", str(tmp_path / "other.safetensors")], "name two runs"),
    ):
        with pytest.raises(SystemExit):
            distill.main(argv)
        assert message in capsys.readouterr().err


def test_a_pipeline_of_latents_has_its_autoencoder_in_half_precision(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    from train.loop.preview import describe_pipeline, export_pipeline
    from train.recipe.objectives import make_objective

    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = AutoencoderKL(
            latent_channels=4, norm_num_groups=4, block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
        )  # fmt: skip
        network = attngen.SiTTransformer2DModel(
            sample_size=8, in_channels=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=1
        )
    decoder.save_pretrained(tmp_path / "vae")
    source = {"source": str(tmp_path / "vae")}
    data = types.SimpleNamespace(vae=source, id2label={0: "cat"})
    described = {**describe_pipeline(network, make_objective("velocity"), data), "id2label": {0: "cat"}}
    pipe = runs.build_pipeline(json.loads(json.dumps(described)), network.state_dict(), torch.float32)
    drawn = pipe([0], num_inference_steps=1, output_type="np").images
    assert drawn.shape == (1, 8, 8, 3)
    export_pipeline(network, make_objective("velocity"), data, tmp_path / "pipeline")
    for part in ("transformer", "vae"):
        tensors = load_file(tmp_path / "pipeline" / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
