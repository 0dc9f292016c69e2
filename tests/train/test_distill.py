"""train.distill: learned layers come nearer to the model's own attention, and a run loses nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attngen
from attngen import LearnedLayers, LearnedLinear, LearnedMediators
from attngen.hosts.families import denoisers_of
from tests.builders.hosts import TEXT, fresh, normal, randomised, snapshot
from train import distill
from train.distillation import pair as distill_pair
from train.distillation import run as distill_run
from train.distillation.inputs import Call, Drawing, NoisedData, OwnTrajectories, open_inputs
from train.loop.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def sit(**config):
    """A softmax SiT of pixels with weights that make every layer count."""
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 3,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_classes": 2,
        "learn_sigma": False,
        **config,
    }
    with torch.random.fork_rng():
        return randomised(attngen.SiTTransformer2DModel(**settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipe")
    scheduler = attngen.InterpolantScheduler(sampler="ode")
    attngen.SiTPipeline(sit(), scheduler, id2label={0: "face", 1: "heart"}).save_pretrained(path)
    return path


def run(folder: Path, out: Path, *options: str) -> int:
    given = ["--model", str(folder), "--out", str(out), "--cpu", "--method", "mediator:4", "--batch-size", "2"]
    return distill.main([*given, "--steps", "4", "--measure", "2", "--sample-steps", "3", *options])


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out: Path) -> list[tuple]:
    lines = (out.with_suffix(".run") / "log.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["layers"], r["prediction"]) for r in map(json.loads, lines)]


# What it learns


class Calls:
    """Calls of a fixed kind: a SiT on noise, at drawn times."""

    def __init__(self, channels, side, classes):
        self.shape, self.classes = (4, channels, side, side), classes

    def _call(self, seed):
        labels = torch.arange(4) % self.classes
        times = torch.linspace(0.1, 0.9, 4)
        return Call((normal(*self.shape, seed=seed), times, labels), {})

    def call(self, number):
        return self._call(1000 + number)

    def held_out(self, count):
        return [self._call(number) for number in range(count)]


def arguments(out, *options):
    given = ["--model", "x", "--out", str(out), "--cpu", "--batch-size", "4", "--measure", "4"]
    return distill.parse_arguments([*given, *options])


def learn(model, method, inputs, out, *options):
    """The errors before and after, as the program writes them."""
    model.requires_grad_(False)
    layers = LearnedLayers.create(model, method)
    with attngen.apply(model, layers) as patch:
        assert distill_run.Run(arguments(out, *options), model, patch, layers, inputs).run(None) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    return content["before"], content["after"]


def test_errors_are_those_of_the_layers_and_of_the_prediction():
    """By hooks of our own: the student's layers are given the exact layers' inputs."""
    model, exact = fresh("sd15"), fresh("sd15")
    layers = LearnedLayers.create(model, LearnedMediators(4))
    calls = [
        Call((normal(2, 4, 16, 16, seed=s), 300 + s), {"encoder_hidden_states": normal(2, 5, TEXT)}) for s in (1, 2)
    ]
    errors, sizes = {}, {}

    def add(name, got, want):
        errors[name] = errors.get(name, 0) + float((got - want).square().sum())
        sizes[name] = sizes.get(name, 0) + float(want.square().sum())

    with torch.no_grad(), attngen.apply(model, layers) as patch:
        got = distill_pair.measure(distill_pair.Pair(model, patch), calls)
        inputs, outputs, forced = {}, {}, {}
        for call in calls:
            handles = []
            for name in layers.sizes:

                def keep(module, args, kwargs, out, name=name):
                    inputs[name], outputs[name] = args[0], out

                def force(module, args, kwargs, name=name):
                    return (inputs[name], *args[1:]), kwargs

                def kept(module, args, kwargs, out, name=name):
                    forced[name] = out

                handles += [
                    exact.get_submodule(name).register_forward_hook(keep, with_kwargs=True),
                    model.get_submodule(name).register_forward_pre_hook(force, with_kwargs=True),
                    model.get_submodule(name).register_forward_hook(kept, with_kwargs=True),
                ]
            prediction = exact(*call.args, **call.kwargs).sample
            model(*call.args, **call.kwargs)
            for handle in handles:
                handle.remove()
            for name in layers.sizes:
                add(name, forced[name], outputs[name])
            add("prediction", model(*call.args, **call.kwargs).sample, prediction)
    assert list(got) == [*layers.sizes, "prediction"]
    for name, value in got.items():
        assert value == pytest.approx((errors[name] / sizes[name]) ** 0.5, rel=1e-4), name
        assert 0.05 < value < 2


@pytest.mark.parametrize("method", [LearnedMediators(4), LearnedMediators(4, convolution="input"), LearnedLinear()])
def test_errors_fall(tmp_path, method):
    model = sit()
    clean = snapshot(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = tmp_path / "out.safetensors"
    before, after = learn(model, method, Calls(3, 16, 2), out, "--steps", "60")
    assert before.keys() == after.keys() == {"transformer_blocks.0.attn", "transformer_blocks.1.attn", "prediction"}
    assert all(after[name] < 0.9 * before[name] for name in before), (before, after)
    assert snapshot(model) == clean
    assert_same(model.state_dict(), state)
    with attngen.apply(model, out) as patch:
        got = distill_pair.measure(distill_pair.Pair(model, patch), Calls(3, 16, 2).held_out(4))
    assert got == pytest.approx(after, rel=1e-3)


def test_errors_fall_to_a_third(tmp_path):
    """Attention that is not sharp can be learned by linear attention; in seconds here."""
    model = sit()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn.to_q.weight.mul_(0.35)
            block.attn.to_k.weight.mul_(0.35)
    before, after = learn(model, LearnedLinear(), Calls(3, 16, 2), tmp_path / "out.safetensors", "--steps", "120")
    assert all(before[name] > 3 * after[name] for name in before), (before, after)


def test_projections_are_learned_when_asked(tmp_path):
    model, out = sit(), tmp_path / "out.safetensors"
    method = LearnedMediators(4, own_projections=True)
    learn(model, method, Calls(3, 16, 2), out, "--steps", "5", "--projection-rate", "1e-3")
    layers = LearnedLayers.load(out)
    name = "transformer_blocks.0.attn"
    attn = model.get_submodule(name)
    for part, module in {"to_q": attn.to_q, "to_out": attn.to_out[0]}.items():
        moved = (layers.tensors[name][f"projections.{part}.weight"] - module.weight).abs().max()
        assert 1e-4 < moved < 1e-2


def test_the_loss_is_the_mean_over_layers_and_the_weighted_prediction(tmp_path):
    model = sit().requires_grad_(False)
    layers, inputs = LearnedLayers.create(model, LearnedMediators(4)), Calls(3, 16, 2)
    options = arguments(tmp_path / "out.safetensors", "--prediction-weight", "0.25", "--accumulate", "2")
    with attngen.apply(model, layers) as patch:
        pair = distill_pair.Pair(model, patch)
        with torch.no_grad():
            squared = [{n: float(e / s) for n, e, s in pair.squared_errors(inputs.call(6 + i))} for i in range(2)]
        step = distill_run.Run(options, model, patch, layers, inputs)
        step.folder.mkdir()
        got = step.step(3)
    of_layers = [sum(v for n, v in one.items() if n != "prediction") / 2 for one in squared]
    assert got["layers"] == pytest.approx(sum(of_layers) / 2, rel=1e-4)
    assert got["prediction"] == pytest.approx(sum(one["prediction"] for one in squared) / 2, rel=1e-4)
    assert got["loss"] == pytest.approx(got["layers"] + 0.25 * got["prediction"], rel=1e-6)


def test_accumulated_gradients_are_those_of_the_mean(tmp_path, monkeypatch):
    """One step of two calls has the mean of the gradients of two steps of one, and of the weighted loss."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.ones(()))
    seen = {}
    for name, steps, options in (("one", (0, 1), ()), ("two", (0,), ("--accumulate", "2")), ("less", (0,), ())):
        model = sit().requires_grad_(False)
        layers = LearnedLayers.create(model, LearnedMediators(4))
        weight = "0.25" if name == "less" else "1"
        options = arguments(tmp_path / f"{name}.safetensors", "--prediction-weight", weight, *options)
        with attngen.apply(model, layers) as patch:
            for step in steps:
                run = distill_run.Run(options, model, patch, layers, Calls(3, 16, 2))
                parameters = [p for core in patch.learned.values() for p in core.parameters()]
                grads = []
                monkeypatch.setattr(run.optimizer, "step", lambda p=parameters, g=grads: g.extend(t.grad for t in p))
                run.step(step)
                seen[name, step] = torch.cat([g.flatten() for g in grads])
    mean = (seen["one", 0] + seen["one", 1]) / 2
    assert mean.norm() > 0.01
    assert (seen["two", 0] - mean).norm() <= 1e-4 * mean.norm()
    assert (seen["less", 0] - seen["one", 0]).norm() > 0.02 * mean.norm()


def test_learning_rates_by_kind_of_weight(tmp_path):
    """Matrices that read many channels learn more slowly, projections at their own rate."""
    model = sit().requires_grad_(False)
    layers = LearnedLayers.create(model, LearnedLinear("elu", "input", reduction=1, own_projections=True))
    options = arguments(tmp_path / "out.safetensors", "--learning-rate", "0.5", "--projection-rate", "0.25")
    with attngen.apply(model, layers) as patch:
        run = distill_run.Run(options, model, patch, layers, Calls(3, 16, 2))
        core = next(iter(patch.learned.values()))
        rates = {id(p): group["rate"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates[id(core.projections["to_q"].weight)] == 0.25
    assert rates[id(core.dwc.bias)] == rates[id(core.query_map[1].weight)] == 0.5
    assert rates[id(core.query_map[0].weight)] == 0.5 * 16 / 32
    assert len(rates) == sum(len(list(c.parameters())) for c in patch.learned.values())


def test_layers_learn_apart_without_the_prediction(tmp_path):
    """With the prediction's weight at 0, a layer's gradient does not depend on what the others are."""
    model = sit().requires_grad_(False)
    layers = LearnedLayers.create(model, LearnedMediators(4))
    grads = []
    for spoiled in (False, True):
        with attngen.apply(model, layers) as patch:
            first, second = patch.learned.values()
            if spoiled:
                torch.nn.init.constant_(first.log_broadcast, -3.0)
            pair = distill_pair.Pair(model, patch)
            second.requires_grad_(True)
            for name, error, _ in pair.squared_errors(Calls(3, 16, 2).call(0)):
                if name.startswith("transformer_blocks.1"):
                    error.backward()
            grads.append([p.grad.clone() for p in second.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# The program


def test_a_run_from_nothing_to_a_file_that_applies(tmp_path, folder, capsys, global_rng_untouched):
    out = tmp_path / "m4.safetensors"
    assert run(folder, out) == 0
    printed = capsys.readouterr().out
    assert "transformer_blocks.1.attn" in printed and "prediction" in printed and str(out) in printed
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["before"].keys() == content["after"].keys() and content["steps"] == 4
    assert [step for step, *_ in log_of(out)] == [1, 2, 3, 4]
    pipe = attngen.SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe([0, 1], num_inference_steps=2, generator=generator, output_type="pt").images

    exact = draw()
    with attngen.apply(pipe, out) as handle:
        assert not torch.equal(draw(), exact)
        assert {layer.stages[0].method for layer in handle.report().patched} == {"learned-mediator"}
    assert torch.equal(draw(), exact)
    with safe_open(out, "pt") as file:
        note = json.loads(file.metadata()["attngen"])["note"]
    assert note["errors"] == content["after"] and note["data"] == "self"


@pytest.mark.parametrize("data", ["self", "emoji"])
def test_a_resumed_run_equals_a_whole_one(tmp_path, folder, data):
    options = ("--data", data, "--steps", "5", "--accumulate", "2")
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert run(folder, whole, *options) == 0
    assert run(folder, parts, *options, "--max-minutes", "0") == 0
    assert not parts.exists()
    for _ in range(10):
        if parts.exists():
            break
        assert run(folder, parts, *options, "--max-minutes", "0", "--resume") == 0
    assert_same(weights(whole), weights(parts))
    assert log_of(whole) == log_of(parts)
    errors = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, parts)]
    assert errors[0]["before"] == errors[1]["before"] and errors[0]["after"] == errors[1]["after"]


def test_a_killed_run_repeats_what_was_not_saved(tmp_path, folder):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert run(folder, whole) == 0
    assert run(folder, killed, "--max-minutes", "0") == 0
    log = killed.with_suffix(".run") / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "loss": 9.0, "layers": 9.0, "prediction": 9.0}\n{"step": 3, "lo')
    assert run(folder, killed, "--resume") == 0
    assert log_of(whole) == log_of(killed)


def test_seeds_and_batches_count(tmp_path, folder):
    outs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for out, options in zip(outs, [(), (), ("--seed", "1")], strict=True):
        assert run(folder, out, "--steps", "2", *options) == 0
    assert_same(weights(outs[0]), weights(outs[1]))
    assert any(not torch.equal(weights(outs[0])[n], t) for n, t in weights(outs[2]).items())


def test_mixed_precision_and_checkpointing(tmp_path, folder):
    plain, mixed = tmp_path / "plain.safetensors", tmp_path / "mixed.safetensors"
    assert run(folder, plain) == 0
    assert run(folder, mixed, "--mixed-precision", "bf16", "--gradient-checkpointing") == 0
    assert all(tensor.dtype == torch.float32 for tensor in weights(mixed).values())
    first, second = log_of(plain)[0], log_of(mixed)[0]
    assert first != second and first[1] == pytest.approx(second[1], rel=0.1)
    again = tmp_path / "again.safetensors"
    assert run(folder, again, "--gradient-checkpointing") == 0
    assert log_of(again) == log_of(plain)


def test_a_run_is_not_overwritten_and_other_settings_not_resumed(tmp_path, folder, capsys):
    out = tmp_path / "out.safetensors"
    assert run(folder, out, "--max-minutes", "0") == 0
    assert run(folder, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(folder, out, "--resume", "--learning-rate", "0.5") == 2
    assert "learning_rate = 0.03, not 0.5" in capsys.readouterr().err
    assert run(folder, out, "--resume", "--method", "linear") == 2
    assert "was made with method" in capsys.readouterr().err


def test_sigterm_saves_and_exits_with_zero(tmp_path, folder):
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "train.distill", "--model", str(folder), "--out", str(out), "--steps", "100000"]
    options = ["--method", "mediator:4", "--cpu", "--threads", "1", "--batch-size", "1", "--measure", "1"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
    log = out.with_suffix(".run") / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped after step" in errors and "--resume" in errors
    assert len(list_checkpoints(out.with_suffix(".run") / "checkpoints")) == 1 and not out.exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_stops_with_the_last_good_weights(tmp_path, folder, capsys, monkeypatch, where):
    original = distill_pair.Pair.squared_errors
    count = [0]

    def poisoned(self, call):
        count[0] += torch.is_grad_enabled()
        for name, error, size in original(self, call):
            if count[0] == 3 and name == "prediction":
                error = error * (float("nan") if where == "loss" else 1)
                if where == "gradient":
                    error.register_hook(lambda grad: grad * float("inf"))
            yield name, error, size

    monkeypatch.setattr(distill_pair.Pair, "squared_errors", poisoned)
    out = tmp_path / "out.safetensors"
    assert run(folder, out, "--steps", "6") == 2
    message = capsys.readouterr().err
    assert "in step 3" in message and "checkpoints" in message and not out.exists()
    (checkpoint,) = list_checkpoints(out.with_suffix(".run") / "checkpoints")
    tensors, state = load_checkpoint(checkpoint)
    assert state["step"] == 2 and all(t.isfinite().all() for t in tensors["layers"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "magic"), "unknown method 'magic'; known: mediator:COUNT, linear, linfusion"),
        (("--method", "linear:4"), "unknown method 'linear:4'"),
        (("--method", "mediator:many"), "num_mediators cannot be 'many'; it is a int"),
        (("--method", "mediator:4,wings=2"), "mediator has no option 'wings'"),
        (("--method", "linear,convolution=perhaps"), "convolution cannot be 'perhaps'"),
        (("--method", "mediator:0"), "num_mediators must be a whole number >= 1"),
        (("--method", "mediator:64"), "no layer of image tokens alone that learned-mediator would change"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--guidance-scale", "nan"), "--guidance-scale must be a finite number >= 0, got nan"),
        (("--max-minutes", "-1"), "--max-minutes must be a finite number >= 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--size", "0", "8"), "--size must be at least 1, got 0 8"),
        (("--learning-rate", "nan"), "--learning-rate must be a finite number"),
        (("--prompts", "nowhere.txt"), "cannot read the prompts in nowhere.txt"),
        (("--data", "nowhere"), "nowhere"),
        (("--model", "nowhere/else"), "cannot get nowhere/else from the Hugging Face hub"),
    ],
)
def test_wrong_options_end_before_work(tmp_path, folder, capsys, options, message):
    out = tmp_path / "out.safetensors"
    try:
        code = run(folder, out, *options)
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not out.exists() and not out.with_suffix(".run").exists()
    with contextlib.suppress(SystemExit):
        assert run(folder, tmp_path / "out.bin") == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_methods_by_name():
    assert distill.parse_method("mediator", False) == LearnedMediators(16)
    own = LearnedMediators(9, "input", own_projections=True)
    assert distill.parse_method("mediator:9,convolution=input", True) == own
    linear = LearnedLinear(convolution=False, eps=0.01)
    assert distill.parse_method("linear,convolution=false,eps=0.01", False) == linear
    linfusion = LearnedLinear("elu", "input", 16, convolution=False)
    assert distill.parse_method("linfusion,reduction=16", False) == linfusion


def test_a_bare_sit_and_other_bare_models(tmp_path, capsys):
    sit().save_pretrained(tmp_path / "sit")
    assert run(tmp_path / "sit", tmp_path / "sit.safetensors", "--steps", "1") == 0
    fresh("sd15").save_pretrained(tmp_path / "unet")
    assert run(tmp_path / "unet", tmp_path / "unet.safetensors") == 2
    assert "holds UNet2DConditionModel, not a pipeline" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "x.safetensors") == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert run(tmp_path / "run", tmp_path / "x.safetensors") == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


# Inputs


def drawing_of(folder, **options):
    pipe = attngen.SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return Drawing(pipe, pipe.transformer, None, **{"batch_size": 2, "seed": 0, "steps": 4, **options})


def same(a: Call, b: Call) -> bool:
    flat = [[t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor)] for call in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


def test_own_trajectories_are_the_calls_of_the_exact_model(folder):
    drawing = drawing_of(folder, guidance_scale=2.0)
    patch = attngen.apply(drawing.pipe, LearnedLayers.create(drawing.model, LearnedMediators(4)))
    inputs = OwnTrajectories(drawing, patch.paused)
    calls = [inputs.call(i) for i in range(8)]
    again = OwnTrajectories(drawing, patch.paused)
    assert same(again.call(5), calls[5]) and same(again.call(2), calls[2])
    assert not any(same(calls[i], calls[j]) for i in range(8) for j in range(i))
    assert all("attngen" not in (call.kwargs.get("attention_kwargs") or {}) for call in calls)
    patch.remove()
    unpatched = OwnTrajectories(drawing, patch.paused)
    assert all(same(call, unpatched.call(i)) for i, call in enumerate(calls))
    held_out = inputs.held_out(3)
    assert len(held_out) == 3 and not any(same(a, b) for a in held_out for b in calls)
    times = sorted(float(call.args[1].flatten()[0]) if len(call.args) > 1 else 0.0 for call in calls[:4])
    assert len(set(times)) == 4 or all("timestep" in call.kwargs for call in calls)
    assert not drawing.model._forward_pre_hooks  # nothing is left


def test_classes_from_a_file(folder, tmp_path, capsys):
    pipe = attngen.SiTPipeline.from_pretrained(folder)
    assert distill.choices(pipe, ("heart", "0", "heart")) == [1, 0, 1]
    assert distill.choices(pipe, None) is None
    drawing = Drawing(pipe, pipe.transformer, [1], 3, 0)
    assert drawing.conditions(0) == [1, 1, 1]
    assert set(Drawing(pipe, pipe.transformer, None, 30, 0).conditions(0)) == {0, 1}
    (tmp_path / "classes.txt").write_text("dragon\n")
    assert run(folder, tmp_path / "out.safetensors", "--prompts", str(tmp_path / "classes.txt")) == 2
    assert "dragon" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("\n")
    assert run(folder, tmp_path / "out.safetensors", "--prompts", str(tmp_path / "classes.txt")) == 2
    assert "has no prompts" in capsys.readouterr().err


def test_noised_data_has_the_models_clock_and_labels(folder):
    drawing = drawing_of(folder, batch_size=64)
    inputs = open_inputs("emoji", drawing, contextlib.nullcontext)
    assert isinstance(inputs, NoisedData)
    call = inputs.call(0)
    from attngen.hosts.families import slots

    noisy, times, labels = (
        slots(drawing.model)[name].get(*call) for name in ("hidden_states", "timestep", "class_labels")
    )
    assert noisy.shape == (64, 3, 16, 16) and times.shape == (64,) and labels.shape == (64,)
    assert 0 <= times.min() and times.max() <= 1 and times.std() > 0.2
    assert set(labels.tolist()) == {0, 1, 2} and 0 < (labels == 2).float().mean() < 0.3
    # 0 is noise, 1 is data: near noise the pictures spread as noise does, and pictures are mostly one plain colour
    rough = (noisy[:, :, :, 1:] - noisy[:, :, :, :-1]).square().mean((1, 2, 3))
    assert rough[times < 0.3].mean() > 2 * rough[times > 0.7].mean()
    assert same(inputs.call(3), inputs.call(3)) and not same(inputs.call(3), inputs.call(4))
    assert not same(inputs.held_out(1)[0], call)


def test_labels_of_the_data_become_the_models(folder):
    class Data:
        channels = 3

        def __len__(self):
            return 64

        def batch(self, indices, generator):
            return torch.zeros(len(indices), 3, 16, 16), indices % 2

    drawing = drawing_of(folder, batch_size=64)
    from attngen.hosts.families import slots
    from pipelines.cli.seeds import sample_order

    place = slots(drawing.model)["class_labels"]
    labels = place.get(*NoisedData(drawing, Data(), {0: 1, 1: 0}).call(0))
    wanted = 1 - sample_order(0, torch.ones(64), 0, 64) % 2
    kept = labels != 2
    assert 32 < kept.sum() < 64 and torch.equal(labels[kept], wanted[kept])


def test_recorded_latents_are_copies():
    """Samplers may work in place."""
    model, seen = sit(), []

    class InPlace:
        def __call__(self, class_labels, num_inference_steps, generator):
            latents = torch.randn(1, 3, 16, 16, generator=generator)
            for step in range(num_inference_steps):
                seen.append(latents.clone())
                model(latents, step / num_inference_steps, torch.tensor(class_labels))
                latents.mul_(0.5)

    calls = Drawing(InPlace(), model, None, 1, 0, steps=3).record([1], "key")
    assert [call.args[0].equal(latents) for call, latents in zip(calls, seen, strict=True)] == [True] * 3


def test_labels_go_by_name(folder):
    class Data:
        channels, num_classes, id2label = 3, 2, {0: "heart", 1: "face"}

    assert distill_labels(Data(), {"face": 0, "heart": 1}, 2) == {0: 1, 1: 0}
    assert distill_labels(Data(), {}, 2) == {0: 0, 1: 1}
    with pytest.raises(ValueError, match="class 'heart' of the data is unknown"):
        distill_labels(Data(), {"face": 0}, 2)
    with pytest.raises(ValueError, match="class 'heart' of the data is unknown"):
        distill_labels(Data(), {}, 3)


def distill_labels(*arguments):
    from train.distillation.inputs import _labels

    return _labels(*arguments)


def test_data_that_do_not_fit_are_refused(folder):
    class Data:
        channels, num_classes, id2label = 4, 2, {0: "face", 1: "heart"}

    with pytest.raises(ValueError, match="4 channels and the model 3"):
        NoisedData(drawing_of(folder), Data(), {0: 0, 1: 1})


# Other pipelines


@pytest.fixture
def stable(tmp_path):
    """A tiny Stable Diffusion, with its 16 x 16 latents."""
    from tests.builders.programs import build_sd

    pipe = build_sd()
    pipe.save_pretrained(tmp_path / "stable")
    return tmp_path / "stable"


def test_stable_diffusion_by_its_own_sampling(tmp_path, stable):
    out = tmp_path / "sd.safetensors"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n a dog \n")
    options = ("--method", "linear", "--prompts", str(prompts), "--steps", "3", "--size", "32", "32")
    assert run(stable, out, *options) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert any("attn1" in name for name in content["after"]) and content["after"]["prediction"] > 0
    pipe = distill.load_pipeline(str(stable), cpu=True)
    with attngen.apply(pipe, out) as handle:
        assert handle.report().learned_weights > 0


def dit_pipeline():
    import diffusers

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1
    )
    return diffusers.DiTPipeline(fresh("dit"), vae, diffusers.DDIMScheduler())


def class_unet():
    import diffusers

    with torch.random.fork_rng():
        unet = randomised(
            diffusers.UNet2DConditionModel(
                sample_size=16,
                in_channels=3,
                out_channels=3,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 16),
                layers_per_block=1,
                cross_attention_dim=3,
                num_class_embeds=3,
                attention_head_dim=2,
                norm_num_groups=8,
            )
        )
    names = {0: "face", 1: "heart"}
    return attngen.UNetClassPipeline(unet, diffusers.FlowMatchEulerDiscreteScheduler(), names)


def text_pipeline():
    from tests.builders.programs import build_sd

    return build_sd()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sit", ("--data", "emoji")),
        ("dit", ()),
        ("unet", ("--data", "emoji")),
        ("unet", ("--method", "linear")),
        ("text", ("--method", "linfusion", "--size", "32", "32")),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_what_is_learned_loads_onto_the_original_model(tmp_path, folder, kind, options):
    """On a pipeline loaded anew the file gives the errors that the program measured, layer by layer and at the end."""
    place, out = folder if kind == "sit" else tmp_path / "pipe", tmp_path / "out.safetensors"
    builders = {"dit": dit_pipeline, "unet": class_unet, "text": text_pipeline}
    if kind in builders:
        builders[kind]().save_pretrained(place)
    assert run(place, out, "--steps", "3", *options) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert all(0 < error < math.inf for error in content["after"].values()) and len(content["after"]) > 1

    pipe = distill.load_pipeline(str(place), cpu=True)
    pipe.set_progress_bar_config(disable=True)
    name, model = next(iter(denoisers_of(pipe).items()))
    size = (32, 32) if kind == "text" else None
    drawing = Drawing(pipe, model, distill.choices(pipe, None), 2, 0, steps=3, size=size)
    with attngen.apply(pipe, out) as patch:
        assert {layer.stages[0].method[:8] for layer in patch.report().patched} == {"learned-"}
    with attngen.apply(model, out) as patch:
        pair = distill_pair.Pair(model, patch)
        inputs = open_inputs(content["data"], drawing, patch.paused)
        assert distill_pair.measure(pair, inputs.held_out(2)) == pytest.approx(content["after"], rel=1e-4)


def test_noised_data_of_a_class_unet(tmp_path):
    """UNetClassPipeline's own clock, labels and one-hot tokens; dropped classes are the null class in both."""
    pipe = class_unet()
    pipe.set_progress_bar_config(disable=True)
    inputs = open_inputs("emoji", Drawing(pipe, pipe.unet, None, 32, 0), contextlib.nullcontext)
    call = inputs.call(0)
    noisy, times = call.args if len(call.args) == 2 else (call.args[0], call.kwargs["timestep"])
    labels = call.kwargs["class_labels"]
    assert noisy.shape == (32, 3, 16, 16) and ((times > 0) & (times < 1000)).all()
    assert set(labels.tolist()) == {0, 1, 2} and 0 < (labels == 2).sum() < 12
    assert torch.equal(call.kwargs["encoder_hidden_states"][:, 0].argmax(dim=1), labels)
    assert noisy[times.argmin()].abs().max() < 1.8 < noisy[times.argmax()].abs().max()


def test_noised_latents_for_stable_diffusion(stable):
    """Diffusers' own noise: the scheduler's level at the drawn step, and a share of empty prompts."""
    pipe = distill.load_pipeline(str(stable), cpu=True)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size

    class Latents:
        channels, num_classes, id2label = 4, 1, {0: "all"}

        def __len__(self):
            return 8

        def batch(self, indices, generator, **kwargs):
            return torch.zeros(len(indices), 4, side, side), torch.zeros(len(indices), dtype=torch.long)

    drawing = Drawing(pipe, pipe.unet, ("a cat", "a dog"), 4, 0)
    call = NoisedData(drawing, Latents(), {}).call(0)
    from attngen.hosts.families import slots

    noisy, steps = (slots(pipe.unet)[name].get(*call) for name in ("sample", "timestep"))
    levels = (1 - pipe.scheduler.alphas_cumprod[steps]).sqrt()
    spread = noisy.flatten(1).std(dim=1)
    assert steps.shape == (4,) and torch.allclose(spread, levels, rtol=0.25)
    assert call.kwargs["encoder_hidden_states"].shape[0] == 4
