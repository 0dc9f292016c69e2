"""train.sit: a run is a function of its configuration, stopped or not, and loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from pipelines.cli.seeds import generator_for, sample_order
from train import sit
from train.data.open import open_data
from train.loop import distance as evaluate
from train.loop.averages import PowerAverage, Profile, combination, gamma_of
from train.loop.build import build_model
from train.loop.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_json
from train.loop.run import Run, learning_rate_factor
from train.recipe.config import TrainingConfig, describe_fields
from train.recipe.objectives import make_objective
from train.recipe.presets import PRESETS

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process runs many trainings here
    fixed = ("--preset", "emoji-tiny", "--out", str(out), "--cpu", "--sample-every", "0", "--trackers", "none")
    return sit.main([*fixed, *options])


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
    assert process.returncode == 0 and "stopped after step" in errors and "--resume" in errors
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_a_run_is_not_overwritten_and_another_model_not_resumed(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1", "--max-minutes", "0") == 0
    assert run(tmp_path, "--steps", "1") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--resume", "--num-layers", "3") == 2
    assert "num_layers = 2, not 3" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys, monkeypatch):
    draw = Run.draw

    def poisoned(self, batch):
        draws = draw(self, batch)
        return draws._replace(noise=draws.noise * (float("nan") if batch.step == 2 else 1))

    monkeypatch.setattr(Run, "draw", poisoned)
    assert run(tmp_path, "--steps", "5", "--save-every", "1") == 2
    said = capsys.readouterr().err
    assert "the loss is nan in step 3" in said and "step-00000002" in said and "begin with: " in said
    note = json.loads((tmp_path / "bad-batch.json").read_text())
    assert (note["step"], note["reason"], len(note["pictures"])) == (3, "the loss is nan", 8)
    emoji = open_data("emoji", image_size=16, classes=("face", "heart"))
    assert note["indices"] == sample_order(0, torch.ones(len(emoji)), 2 * 8, 8).tolist()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path)["model"].values())


def test_the_learning_rate_rises_holds_and_falls():
    config = TrainingConfig(steps=100, warmup_steps=10, cooldown=0.3)
    factors = [learning_rate_factor(step, config) for step in range(100)]
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


def test_building_seeds_no_gpu(monkeypatch, global_rng_untouched):
    """torch.manual_seed would seed every GPU, and nothing restores their generators."""
    from train.autoencoder.config import VaeConfig
    from train.autoencoder.model import build_vae
    from train.recipe.unet import build_unet

    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    data = types.SimpleNamespace(sample_size=16, channels=3, num_classes=2)
    config = PRESETS["emoji-tiny"]
    objective = make_objective("velocity")
    models = [build_model(dataclasses.replace(config, seed=seed), data, objective) for seed in (1, 1, 2)]
    first, again, other = ([p.flatten()[0].item() for p in model.parameters()] for model in models)
    assert first == again != other
    build_unet(dataclasses.replace(PRESETS["emoji-unet"], image_size=16), data)
    build_vae(VaeConfig(image_size=16, crop_size=8, channels=(4, 8, 8), latent_channels=2))
    assert not seeded


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
    for config in PRESETS.values():
        if config.data == "emoji":
            data = open_data("emoji", image_size=config.image_size, classes=config.classes)
            with torch.device("meta"):
                model = build_model(config, data, make_objective(config.objective))
            assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 25e6


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sit-s2-256", 33), ("dit-b4-512", 131), ("sit-xl2-256-mediators", 675), ("dit-l8-1024", 459)],
)
def test_the_published_recipes(name, millions):
    """Weights of table 1 of arXiv 2212.09748 (33, 130, 458 and 675 million), and the papers' settings."""
    config = PRESETS[name]
    data = types.SimpleNamespace(sample_size=config.image_size // 8, channels=4, num_classes=1000)
    objective = make_objective(config.objective)
    with torch.device("meta"):
        model = build_model(config, data, objective)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.04)
    assert (config.learning_rate, config.batch_size, config.steps, config.ema_decay) == (1e-4, 256, 400_000, 0.9999)
    assert config.class_dropout_prob == 0.1 and config.weight_decay == 0 and config.optimizer == "adamw"
    assert model.config["predicts_variance"] == name.startswith("dit") and model.config["learn_sigma"]


def test_names_are_those_of_the_objectives():
    from train.recipe import config, objectives

    assert config.OBJECTIVES == objectives.OBJECTIVES and config.TIME_SAMPLINGS == objectives.TIME_SAMPLINGS
    assert (None, *config.WEIGHTINGS) == objectives.WEIGHTINGS


def test_presets_are_listed_and_near_ones_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sit.main(["--list-presets"])
    assert stopped.value.code in (0, None) and "sit-xl2-256-mediators" in capsys.readouterr().out.splitlines()
    for argv, message in ((["--preset", "sit-xl-256"], "sit-xl2-256"), (["--preset", "sit-s2-256"], "--data")):
        with pytest.raises(SystemExit):
            sit.main(argv)
        assert message in capsys.readouterr().err


def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "16 tokens" in said and "GFLOP per image" in said and "20 steps" in said
    assert not (tmp_path / "run").exists()


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").open()]


def assert_equal_up_to_rounding(one: Path, other: Path) -> None:
    """The weights, by the norm of each tensor, and the losses."""
    theirs = weights(other)["model"]
    for name, value in weights(one)["model"].items():
        # Softmax does not see the bias of the keys: its gradient is rounding alone, which AdamW makes into full steps.
        if not name.endswith("to_k.bias"):
            assert (theirs[name] - value).norm() <= 1e-4 * value.norm(), name
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)


@pytest.mark.parametrize("options", [("--accumulate", "4"), ("--workers", "0")])
def test_parts_of_a_batch_and_readers_change_rounding_alone(tmp_path, options):
    plain = ("--steps", "6", "--max-grad-norm", "0", "--sample-steps", "1")
    for optimizer in ("adamw", "muon"):
        one, other = tmp_path / optimizer / "one", tmp_path / optimizer / "other"
        assert run(one, *plain, "--optimizer", optimizer) == 0
        assert run(other, *plain, "--optimizer", optimizer, *options) == 0
        if optimizer == "adamw":
            assert_equal_up_to_rounding(one, other)
        else:  # Muon orthogonalises in bfloat16, which rounds a small gradient into full steps: its losses alone agree
            assert losses(one) == pytest.approx(losses(other), abs=1e-4)


@pytest.mark.parametrize("count", [3, 16])
def test_a_batch_that_cannot_be_shared(tmp_path, capsys, count):
    assert run(tmp_path, "--accumulate", str(count)) == 2
    assert f"a multiple of {count}" in capsys.readouterr().err


def test_two_processes_equal_one(tmp_path):
    """By torchrun over gloo; `accelerate launch` sets the same variables."""
    common = ["--preset", "emoji-tiny", "--sample-every", "0", "--steps", "6", "--trackers", "none", "--cpu"]
    common += ["--max-grad-norm", "0", "--optimizer", "adamw", "--sample-steps", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "train.sit", *common, "--out", str(tmp_path / "two")]
    subprocess.run(command, cwd=ROOT, check=True, env=environment, timeout=300)
    assert sit.main([*common, "--out", str(tmp_path / "one")]) == 0
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_sharded_processes_stopped_and_resumed_equal_one(tmp_path):
    """FSDP2 over gloo, see `sharded_sit`; one process goes on from the sharded run's checkpoint."""
    common = ["--preset", "emoji-tiny", "--sample-every", "0", "--steps", "3", "--trackers", "none", "--cpu"]
    common += ["--optimizer", "adamw", "--sample-steps", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29714"]
    paths = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(Path(__file__).with_name("sharded_sit.py")), *common, "--out", str(tmp_path / "two")]
    for more in (["--max-minutes", "0"], ["--resume"]):
        subprocess.run([*command, *more], cwd=ROOT, check=True, env={**os.environ, **paths}, timeout=300)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sit.main([*common, "--out", str(tmp_path / "one")]) == 0
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "options",
    [
        ("--objective", "dit", "--time-sampling", "uniform"),
        ("--objective", "epsilon", "--path", "vp", "--weighting", "velocity"),
        ("--attention", "softmax"),
        ("--attention", "linear", "--feature-map", "focused"),
        ("--convolution", "input"),
        ("--mixed-precision", "bf16"),
        ("--gradient-checkpointing",),
        ("--mediator-starts", "1", "0.4"),
        ("--learn-sigma", "--no-flip"),
    ],
    ids=" ".join,
)
def test_every_kind_of_run_ends_with_a_pipeline(tmp_path, options):
    import attngen

    assert run(tmp_path, "--steps", "2", *options) == 0
    pipe = attngen.SiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("face", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 and 0 < r["mfu"] < 1 for r in log)
    assert all(0 <= r["waiting_share"] <= 1 and len(r["loss_by_noise"]) == 4 for r in log)


def test_a_compiled_run_with_changing_numbers_of_mediators(tmp_path):
    common = (
        "--steps",
        "4",
        "--num-layers",
        "1",
        "--sample-steps",
        "1",
        "--max-grad-norm",
        "0",
        "--optimizer",
        "adamw",
    )
    try:
        assert run(tmp_path / "compiled", *common, "--compile") == 0
    finally:
        torch.compiler.reset()
    assert run(tmp_path / "eager", *common) == 0
    pairs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("compiled", "eager")]
    compiled, eager = ([json.loads(line)["loss"] for line in lines] for lines in pairs)
    assert compiled == pytest.approx(eager, abs=1e-3)


def test_times_of_one_stage_are_distributed_as_without_stages():
    config = dataclasses.replace(PRESETS["emoji-tiny"], mediator_starts=(1.0, 0.4))
    drawn = Run(config, None, None, None, [], None, [], make_objective("velocity"), Path(), None)
    found, counts = [], []
    for step in range(4000):
        generator = generator_for(0, step)
        count, times = drawn._mediators(step, torch.rand(3, generator=generator), generator)
        levels = 1 - times
        assert (levels > 0.4).all() if count == 1 else (levels <= 0.4).all()
        found.append(times)
        counts.append(count)
    assert counts.count(1) / len(counts) == pytest.approx(0.6, abs=0.03)
    times = torch.cat(found).sort().values
    assert (times - torch.linspace(0, 1, len(times))).abs().max() < 0.04


def test_a_run_starts_from_another(tmp_path, capsys):
    assert run(tmp_path / "softmax", "--attention", "softmax", "--steps", "2") == 0
    assert (
        run(
            tmp_path / "warm",
            "--init-from",
            str(tmp_path / "softmax"),
            "--steps",
            "1",
            "--learning-rate",
            "0",
            "--muon-learning-rate",
            "0",
        )
        == 0
    )
    assert "mixer" in capsys.readouterr().err
    before, after = weights(tmp_path / "softmax")["ema"], weights(tmp_path / "warm")["model"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(after[name].any() for name in after if ".mixer." in name)
    assert run(tmp_path / "none", "--init-from", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, capsys, monkeypatch):
    from train.loop import run as module

    def append(path, record):
        if record["step"] > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "append_line", append)

    def full(folder, step, *rest):
        if step > 2:
            raise OSError(28, "No space left on device")
        return save_checkpoint(folder, step, *rest)

    monkeypatch.setattr(module, "save_checkpoint", full)
    assert run(tmp_path, "--steps", "4", "--save-every", "2", "--max-minutes", "5") == 1
    said = capsys.readouterr().err
    assert "the checkpoint of step 4 could not be written ([Errno 28] No space left on device)" in said
    assert "the checkpoint step-00000002 is kept" in said and said.count("log.jsonl could not be written") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def kill_and_resume(out: Path, steps: int, rounds: int, seed: int) -> int:
    """Run to the end, killed at random moments on the way; returns how often it was."""
    draw, kills = random.Random(seed), 0
    command = [sys.executable, "-m", "train.sit", "--preset", "emoji-tiny", "--out", str(out), "--cpu", "--resume"]
    command += [
        "--steps",
        str(steps),
        "--save-every",
        "1",
        "--sample-every",
        "0",
        "--trackers",
        "none",
        "--threads",
        "1",
    ]
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        if kills < rounds:
            found = len(list_checkpoints(out / "checkpoints"))
            before = time.monotonic()
            # Past the start, where nothing is written yet: killed at a random moment once there is a new checkpoint.
            while process.poll() is None and time.monotonic() - before < 60:
                if found == 0 and list_checkpoints(out / "checkpoints") or found and time.monotonic() - before > 4:
                    break
                time.sleep(0.01)
            time.sleep(draw.random() * 0.5)
            process.kill()
            process.wait()
            kills += 1
        elif process.wait(timeout=300) == 0:
            return kills


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_equals_a_whole_one(tmp_path, rounds):
    steps = 20 if rounds == 1 else 120
    whole = ["--steps", str(steps), "--save-every", "0", "--threads", "1"]
    assert run(tmp_path / "whole", *whole) == 0
    assert kill_and_resume(tmp_path / "killed", steps, rounds, seed=rounds) == rounds
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert len(list_checkpoints(tmp_path / "killed" / "checkpoints")) == 2


# Averages chosen afterwards


def test_averages_of_power_profiles(tmp_path):
    """A running average has its profile's weights, and widths that were not kept are made from those that were."""
    averages = [PowerAverage([torch.zeros(1, dtype=torch.float64)], std) for std in (0.05, 0.1)]
    kept, values = {}, {}
    steps = 400
    path = torch.sin(torch.arange(1, steps + 1) / 40)
    for step in range(1, steps + 1):
        for average in averages:
            average.update([path[step - 1 : step]], step)
            if step % 50 == 0:
                kept[Profile(step, average.gamma)] = average.shadow[0].item()
    for std in (0.05, 0.08, 0.1, 0.14):
        gamma = gamma_of(std)
        weights = torch.arange(1, steps + 1).double().pow(gamma)
        centre = (weights * torch.arange(1, steps + 1)).sum() / weights.sum() / steps
        assert centre == pytest.approx((gamma + 1) / (gamma + 2), rel=0.01)
        values[std] = float((weights * path).sum() / weights.sum())
        shares = combination(list(kept), Profile(steps, gamma))
        made = sum(share * value for share, value in zip(shares, kept.values(), strict=True))
        assert made == pytest.approx(values[std], abs=0.01)
    assert averages[0].shadow[0].item() == pytest.approx(values[0.05], abs=0.01)
    # The relative standard deviation of a profile with exponent g (eq. 126 of arXiv 2312.02696).
    assert all(
        (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5) == pytest.approx(s) for s in (0.05, 0.2) for g in [gamma_of(s)]
    )


def test_a_run_keeps_averages_and_makes_others(tmp_path, capsys):
    from train import export
    from train.loop import averages as ema

    options = ("--steps", "8", "--save-every", "2", "--ema-stds", "0.05", "0.1")
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--max-minutes", "0") == 0
    assert run(tmp_path / "parts", *options, "--resume") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert export.main([str(tmp_path / "whole"), "--weights", "std:0.08"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    import attngen

    assert attngen.SiTPipeline.from_pretrained(folder)("face", num_inference_steps=1).images
    step, made = ema.reconstruct(tmp_path / "whole", 0.1)
    assert step == 8
    for name, value in weights(tmp_path / "whole")["average_1"].items():
        torch.testing.assert_close(made[name], value, atol=1e-4, rtol=1e-3)
    assert run(tmp_path / "none", "--steps", "1") == 0
    assert export.main([str(tmp_path / "none"), "--weights", "std:0.1"]) == 2
    assert "--ema-stds" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"between 0 and 0\.288"):
        ema.gamma_of(0.4)


def test_curves_of_runs(tmp_path, capsys):
    from benchmarks.studies import plot

    for name in ("one", "two"):
        assert run(tmp_path / name, "--steps", "3") == 0
    with open(tmp_path / "two" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "FD-emoji[a] 4 mediators": 2.5}\n{"step": 4, "lo')
    out = tmp_path / "curves.png"
    assert plot.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]) == 0
    from PIL import Image

    assert Image.open(out).size[0] > 500
    assert plot.main([str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
    assert plot.smoothed([1.0, 3.0, 5.0, 7.0], 0.5) == [1.0, 2.0, 4.0, 6.0]


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sit.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path / "run") == 2
    assert "attngen[train]" in capsys.readouterr().err


def test_help_is_quick_and_needs_no_torch():
    probe = "import sys; from train.sit import parse_arguments; parse_arguments([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True)


def test_help_says_what_every_field_is():
    assert all(describe_fields().values())


def test_the_loss_falls(tmp_path):
    assert run(tmp_path, "--steps", "60", "--save-every", "0", "--max-minutes", "5", "--sample-steps", "1") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_saved_tensors_are_safetensors_only(tmp_path):
    assert run(tmp_path, "--steps", "1", "--max-minutes", "0") == 0
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png"}
    assert load_file(next(tmp_path.rglob("ema.safetensors")))


def test_the_distance_in_the_loop(tmp_path):
    options = ("--steps", "2", "--fd-every", "1", "--fd-pictures", "8", "--sample-steps", "2")
    with pytest.warns(UserWarning, match="8 images"):
        assert run(tmp_path, *options) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [line for line in log if any(key.startswith("FD-emoji") for key in line)]
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        names = [key for key in line if key.startswith("FD-emoji[")]
        assert [name.partition("] ")[2] for name in names] == ["1 mediators", "4 mediators"]
        assert all(line[name] > line["floor"] / 2 for name in names) and line["pictures"] == 8


def test_a_stop_ends_a_long_measurement_and_loses_nothing(tmp_path, monkeypatch, capsys):
    """Someone who asks to stop does not wait for a thousand pictures, and has a pipeline where training was over."""
    options = ("--steps", "3", "--fd-every", "1", "--fd-pictures", "8", "--sample-steps", "2")
    batches, drawn = evaluate._batches, []

    def signalled(*arguments):
        for batch in batches(*arguments):
            drawn.append(len(batch))
            signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    monkeypatch.setattr(evaluate, "_batches", signalled)
    assert run(tmp_path, *options) == 0
    assert drawn == [4] and "distance of step 1 was not measured because the run is stopping" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000002"  # one step more, which hears of it
    assert not (tmp_path / "pipeline").exists()

    assert run(tmp_path, *options, "--resume") == 0  # the measurement at the end is stopped too
    assert drawn == [4, 4] and (tmp_path / "pipeline" / "model_index.json").is_file()
    monkeypatch.setattr(evaluate, "_batches", batches)
    with pytest.warns(UserWarning, match="8 images"):
        assert run(tmp_path, *options, "--resume") == 0
    assert "FD-emoji" in (tmp_path / "log.jsonl").read_text().splitlines()[-1]
