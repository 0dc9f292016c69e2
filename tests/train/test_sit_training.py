"""train.sit: a run is a function of its configuration, stopped or not, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import sit
from train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_json
from train.presets import PRESETS, TrainingConfig
from train.seeds import generator_for, sample_order

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str) -> int:
    return sit.main(["--preset", "emoji-tiny", "--out", str(out), "--cpu", "--sample-every", "0", *options])


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    tensors, _ = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for stem in a:
        assert a[stem].keys() == b[stem].keys()
        assert all(torch.equal(a[stem][name], b[stem][name]) for name in a[stem]), stem


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_a_whole_one(tmp_path, optimizer, global_rng_untouched):
    options = ("--steps", "6", "--optimizer", optimizer)
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--max-minutes", "0") == 0
    while list_checkpoints(tmp_path / "parts" / "checkpoints")[-1].name != "step-00000006":
        assert run(tmp_path / "parts", *options, "--max-minutes", "0", "--resume") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in log] == [(r["step"], r["loss"]) for r in whole]


def test_a_run_ends_with_pictures_and_a_pipeline(tmp_path):
    import attngen

    assert run(tmp_path, "--steps", "2") == 0
    assert (tmp_path / "samples" / "step-00000002.png").stat().st_size > 0
    pipe = attngen.SiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.id2label == {0: "face", 1: "heart"} and pipe.transformer.config.attention == "mediator"
    averaged = weights(tmp_path)["ema"]
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value.float(), averaged[name], atol=1e-3, rtol=1e-3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["steps"] == 2 and config["id2label"] == {"0": "face", "1": "heart"}


def test_the_averaged_weights_follow_their_formula(tmp_path):
    """ema ← d · ema + (1 - d) · weights, d = min(decay, (1 + t) / (10 + t)) from the second step on."""
    options = ("--steps", "6", "--max-minutes", "0")
    run(tmp_path, *options)
    first = weights(tmp_path)
    run(tmp_path, *options, "--resume")
    second = weights(tmp_path)
    for name, averaged in second["ema"].items():
        assert torch.equal(first["ema"][name], first["model"][name])
        want = 2 / 11 * first["ema"][name] + 9 / 11 * second["model"][name]
        torch.testing.assert_close(averaged, want, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(second["ema"][name], second["model"][name]) for name in second["ema"])


def test_sigterm_saves_and_exits_with_zero(tmp_path):
    command = [sys.executable, "-m", "train.sit", "--preset", "emoji-tiny", "--out", str(tmp_path), "--steps", "100000"]
    options = ["--cpu", "--save-every", "0", "--sample-every", "0", "--threads", "1"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume goes on" in errors
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_a_run_is_not_overwritten_and_another_model_not_resumed(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1", "--max-minutes", "0") == 0
    assert run(tmp_path, "--steps", "1") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--resume", "--num-layers", "3") == 2
    assert "num_layers = 2, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option,message",
    [
        (("--attention", "sofmax"), "sofmax"),
        (("--patch-size", "5"), "patches of 5"),
        (("--mediator-counts", "99"), "1 to 16"),
        (("--classes", "dragonfly"), "dragonfly"),
        (("--batch-size", "0"), "batch_size"),
        (("--balance", "2"), "balance"),
    ],
)
def test_wrong_options_end_before_work(tmp_path, capsys, option, message):
    try:
        code = run(tmp_path / "run", *option)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys, monkeypatch):
    step = sit.Run.batch

    def poisoned(self, number):
        clean, *rest = step(self, number)
        return (clean * (float("nan") if number == 2 else 1), *rest)

    monkeypatch.setattr(sit.Run, "batch", poisoned)
    assert run(tmp_path, "--steps", "5", "--save-every", "1") == 2
    assert "step 2" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path)["model"].values())


def test_the_learning_rate_rises_holds_and_falls():
    config = TrainingConfig(steps=100, warmup_steps=10, cooldown=0.3)
    factors = [sit.learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:71] == [1.0] * 62
    assert factors[99] == pytest.approx(1 / 30) and all(a > b for a, b in zip(factors[71:], factors[72:], strict=False))


def test_the_order_of_samples():
    equal = torch.ones(10)
    stream = sample_order(3, equal, 0, 40)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in stream.split(10))
    pieces = torch.cat([sample_order(3, equal, start, 4) for start in range(0, 40, 4)])
    assert torch.equal(pieces, stream) and not torch.equal(sample_order(4, equal, 0, 40), stream)
    skewed = torch.tensor([1.0, 3.0])
    assert sample_order(0, skewed, 0, 4000).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(sample_order(0, skewed, 17, 9), sample_order(0, skewed, 0, 30)[17:26])


def test_generators_depend_on_every_part_of_the_key(global_rng_untouched):
    draws = {
        torch.rand((), generator=generator_for(*key)).item() for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]
    }
    assert len(draws) == 4


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    tensors = {"model": {"w": torch.arange(3.0)}}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in tmp_path.rglob("*.*") if file.is_file())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, 4, tensors, {}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="step-00000003 is damaged"):
        load_checkpoint(tmp_path / "step-00000003")
    (tmp_path / "step-00000009").mkdir()  # torn: no marker
    assert list_checkpoints(tmp_path)[-1].name == "step-00000003"
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "step-00000009")


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": "ü"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_presets_are_valid_and_the_shipped_model_fits(tmp_path):
    from train.emoji import EmojiDataset

    for config in PRESETS.values():
        data = EmojiDataset("train", image_size=config.image_size, classes=config.classes or None)
        with torch.device("meta"):
            model = sit.build_model(config, data)
        assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 25e6


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sit.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path / "run") == 2
    assert "attngen[train]" in capsys.readouterr().err


def test_help_is_quick_and_needs_no_torch():
    probe = "import sys; from train.sit import parse_arguments; parse_arguments([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True)


def test_the_loss_falls(tmp_path):
    assert run(tmp_path, "--steps", "60", "--save-every", "0", "--max-minutes", "5", "--sample-steps", "1") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_saved_tensors_are_safetensors_only(tmp_path):
    assert run(tmp_path, "--steps", "1", "--max-minutes", "0") == 0
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png"}
    assert load_file(next(tmp_path.rglob("ema.safetensors")))
