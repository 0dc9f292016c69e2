"""calibrate: what it measures, fits and chooses, what it promises, and that it leaves everything as it was."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

import attngen
from attngen import (
    AgentAttention,
    DownsampledKV,
    LinearAttention,
    Plan,
    SiTTransformer2DModel,
    SoftmaxAttention,
    TileAttention,
    TokenMerging,
)
from attngen.calibration import DEFAULT_CANDIDATES, Measurements, calibrate
from attngen.calibration.stages import choose_calls, stage_starts
from tests.builders.hosts import snapshot
from tests.builders.programs import build_sit

pytestmark = [
    pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning"),
    pytest.mark.usefixtures("global_rng_untouched"),
]
CANDIDATES = (AgentAttention(4), AgentAttention(16, correction="nystrom"), DownsampledKV(2))
CALL = {"class_labels": [0, 1], "num_inference_steps": 4, "guidance_scale": 1.0}
FAST = {"candidates": CANDIDATES, "num_stages": 2, "cost": "flops", **CALL}


def make_pipe():
    pipe = build_sit(attention="softmax")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=0):
    return pipe(**CALL, generator=torch.Generator().manual_seed(seed), output_type="latent").images


def error_of(pipe, plan, exact, seed=0):
    """Relative error of the final latents, found without calibrate's help."""
    handle = attngen.apply(pipe, plan)
    got = draw(pipe, seed)
    handle.remove()
    return float((got - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def fast():
    """A pipeline and three plans: the cheapest, one of a third of its error, and one of a speed-up."""
    pipe = make_pipe()
    loose = calibrate(pipe, max_error=1e6, **FAST)
    bounded = calibrate(pipe, max_error=loose.measurements.error / 3, **FAST)
    return pipe, {"loose": loose, "max_error": bounded, "speedup": calibrate(pipe, speedup=1.4, **FAST)}


# What it promises


def test_the_error_holds_as_measured(fast):
    pipe, plans = fast
    plan, exact = plans["max_error"], draw(pipe)
    measured = plan.measurements.error
    assert 0 < measured <= plans["loose"].measurements.error / 3
    assert plan.measurements.bound == {"max_error": plans["loose"].measurements.error / 3}
    assert error_of(pipe, plan, exact) == pytest.approx(measured, rel=1e-5)
    assert plan.measurements.speedup > 1.02


def test_a_looser_bound_is_cheaper(fast):
    _, plans = fast
    loose = plans["loose"].measurements
    assert loose.speedup > plans["max_error"].measurements.speedup
    cheapest = [min(trial.cost for trial in cell.trials) for layer in loose.layers for cell in layer.cells]
    taken = [cell.taken.cost for layer in loose.layers for cell in layer.cells]
    assert taken == cheapest


def test_a_bound_below_every_method_gives_exact_attention(fast):
    pipe, _ = fast
    plan = calibrate(pipe, max_error=1e-12, **FAST)
    assert plan.measurements.error == 0 and plan.measurements.speedup == 1
    assert all(not stage.layers for stage in plan.stages)


def test_the_speedup_holds(fast):
    pipe, plans = fast
    plan = plans["speedup"]
    found = plan.measurements
    exact = planned = 0.0
    for layer in found.layers:
        for cell, calls in zip(layer.cells, found.calls, strict=True):
            exact, planned = exact + calls * cell.trials[0].cost, planned + calls * cell.taken.cost
    assert found.speedup == pytest.approx(exact / planned) and found.speedup >= 1.4
    assert error_of(pipe, plan, draw(pipe)) == pytest.approx(found.error, rel=1e-5)
    # The operations are those that the patch itself reports.
    handle = attngen.apply(pipe, plan)
    layers = {layer.name: layer for layer in handle.report((8, 8)).patched}
    handle.remove()
    for layer in found.layers:
        for i, cell in enumerate(layer.cells):
            assert cell.taken.method == plan.stages[i].method_for(layer.name)
            assert cell.taken.cost == layers[layer.name].stages[i].flops


def test_an_unreachable_speedup_names_the_best(fast):
    pipe, _ = fast
    message = r"no plan makes attention 50 times cheaper; .* reach is (\d+\.\d\d)"
    with pytest.raises(ValueError, match=message) as refused:
        calibrate(pipe, speedup=50, **FAST)
    best = float(str(refused.value).rsplit(" ", 1)[1])
    assert calibrate(pipe, speedup=best - 0.01, **FAST).measurements.speedup >= best - 0.01


def test_two_calibrations_are_equal(fast):
    pipe, plans = fast
    again = calibrate(make_pipe(), speedup=1.4, **FAST)
    assert again == plans["speedup"]
    assert again.measurements == plans["speedup"].measurements


def test_more_exact_than_the_same_methods_as_given(fast):
    """At the cost of its plan no single candidate in all layers is as exact."""
    pipe, _ = fast
    exact = draw(pipe)
    for candidate in CANDIDATES:
        handle = attngen.apply(pipe, candidate)
        report = handle.report((8, 8))
        handle.remove()
        ratio = sum(x.flops_exact for x in report.patched) / sum(x.stages[0].flops for x in report.patched)
        found = calibrate(pipe, speedup=ratio, **FAST).measurements
        assert found.speedup >= ratio
        assert found.error < error_of(pipe, Plan.of(candidate), exact)


# What it measures


def test_errors_of_layers_are_those_of_their_outputs(fast):
    """The first layer's inputs are the same with a plan as without, so its output can be compared."""
    pipe, plans = fast
    layer = plans["speedup"].measurements.layers[0]
    attn = pipe.transformer.get_submodule(layer.name)
    outputs = []
    hook = attn.register_forward_hook(lambda module, args, out: outputs.append(out))
    draw(pipe)
    chosen = choose_calls([1.0, 0.75, 0.5, 0.25], plans["speedup"].measurements.starts)
    exact = [outputs[i] for i in sorted(chosen)]
    for trial in layer.cells[0].trials[1:]:
        outputs.clear()
        handle = attngen.apply(pipe, trial.method)
        pipe(**{**CALL, "num_inference_steps": 4}, generator=torch.Generator().manual_seed(0), output_type="latent")
        handle.remove()
        got = float((outputs[0] - exact[0]).norm() / exact[0].norm())  # the first call: nothing differs before it
        assert trial.error == pytest.approx(got, rel=0.5)
        assert trial.error_as_given is None or trial.error <= trial.error_as_given * (1 + 1e-9)
    hook.remove()


def test_one_call_gives_one_layers_error_exactly():
    pipe = make_pipe()
    call = {**CALL, "num_inference_steps": 1}
    found = calibrate(pipe, speedup=1.1, candidates=CANDIDATES, num_stages=1, cost="flops", **call).measurements
    layer = found.layers[0]
    outputs = []
    pipe.transformer.get_submodule(layer.name).register_forward_hook(lambda module, args, out: outputs.append(out))
    for trial in layer.cells[0].trials:
        handle = attngen.apply(pipe, trial.method)
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        handle.remove()
    errors = [float((out - outputs[0]).norm() / outputs[0].norm()) for out in outputs]
    assert errors == pytest.approx([trial.error for trial in layer.cells[0].trials], rel=1e-3, abs=1e-6)
    assert len(errors) > 2


@pytest.mark.parametrize("most", [8, 1])
def test_gains_of_tiles_are_fitted_to_each_head(most, monkeypatch):
    """With the fitted gains a layer's error is the one that was predicted, and no larger than without."""
    monkeypatch.setattr("attngen.calibration.candidates.MAX_HEADS", most)
    pipe = make_pipe()
    call = {**CALL, "num_inference_steps": 1}
    tiles = TileAttention(tile=4, key_tile=4, density=0.25)
    found = calibrate(pipe, max_error=1e6, candidates=[tiles], num_stages=1, cost="flops", **call).measurements
    layer = found.layers[0]
    outputs = []
    pipe.transformer.get_submodule(layer.name).register_forward_hook(lambda module, args, out: outputs.append(out))
    exact, plain, gained = layer.cells[0].trials
    assert plain.method == tiles or gained.method == tiles
    plain, gained = sorted((plain, gained), key=lambda trial: -trial.error)
    assert plain.method == tiles and gained.error < gained.error_as_given == plain.error
    assert len(gained.method.head_gains) == (2 if most == 8 else 0) and (gained.method.gain > 0) == (most == 1)
    for trial in (exact, plain, gained):
        handle = attngen.apply(pipe, trial.method)
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        handle.remove()
    errors = [float((out - outputs[0]).norm() / outputs[0].norm()) for out in outputs]
    assert errors == pytest.approx([0, plain.error, gained.error], rel=1e-3, abs=1e-6)
    assert Plan.from_json(Plan.of(gained.method).to_json()) == Plan.of(gained.method)


def test_measured_time_is_a_cost_too():
    found = calibrate(make_pipe(), max_error=0.5, candidates=[DownsampledKV(4)], num_stages=1, **CALL).measurements
    assert found.cost == "time"
    for layer in found.layers:
        assert all(0 < trial.cost < 1 for trial in layer.cells[0].trials)


# What it leaves behind


def test_everything_is_as_it_was():
    pipe = make_pipe()
    exact, before, attributes = draw(pipe), snapshot(pipe.transformer), dict(vars(pipe))
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    calibrate(pipe, speedup=1.2, generator=generator, **FAST)
    assert torch.equal(generator.get_state(), state)
    assert snapshot(pipe.transformer) == before and vars(pipe) == attributes
    assert torch.equal(draw(pipe), exact)


@pytest.mark.parametrize("fails_at", [0, 2, 6, 9, 21])
def test_everything_is_as_it_was_after_an_exception(fails_at):
    pipe = make_pipe()
    exact, before, attributes = draw(pipe), snapshot(pipe.transformer), dict(vars(pipe))
    calls = itertools.count()

    def fail(module, args):
        if next(calls) == fails_at:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, max_error=0.01, **FAST)
    hook.remove()
    assert snapshot(pipe.transformer) == before and vars(pipe) == attributes
    assert torch.equal(draw(pipe), exact)


def test_a_patched_pipeline_is_refused_and_stays_patched():
    pipe = make_pipe()
    handle = attngen.apply(pipe, AgentAttention(9))
    patched, before = draw(pipe), snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"the transformer is patched.*attngen.remove\(pipe\)"):
        calibrate(pipe, speedup=1.4, **FAST)
    assert handle.is_applied and snapshot(pipe.transformer) == before
    assert torch.equal(draw(pipe), patched)


# Its data


def test_a_plan_file_holds_its_measurements(fast, tmp_path):
    _, plans = fast
    plan = plans["speedup"]
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert (
        again == plan and again.measurements == plan.measurements and [*tmp_path.iterdir()] == [tmp_path / "plan.json"]
    )
    assert Measurements.from_dict(json.loads(json.dumps(plan.measurements.to_dict()))) == plan.measurements
    assert "relative error" in str(again.measurements) and again.measurements.layers[0].name in str(again.measurements)
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["measurements"]["layers"][0]["cells"]
    with pytest.raises(ValueError, match="these measurements are damaged: KeyError"):
        Plan.from_dict(content)


def test_trials_that_others_beat_are_left_out(fast):
    _, plans = fast
    for layer in plans["loose"].measurements.layers:
        for cell in layer.cells:
            assert cell.trials[0].error == 0 and cell.taken in cell.trials
            for trial in cell.trials[1:]:
                beaten = [t for t in cell.trials if t.error <= trial.error and t.cost <= trial.cost and t != trial]
                assert not beaten or trial == cell.taken


def test_a_plan_is_for_its_model(fast):
    pipe, plans = fast
    model = plans["loose"].model
    assert model.model_class == "SiTTransformer2DModel" and len(model.config_hash) == 64
    with torch.random.fork_rng():
        other = SiTTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": 1})
    with pytest.raises(ValueError, match="the plan was found for a SiTTransformer2DModel of another configuration"):
        attngen.apply(other, plans["loose"])
    attngen.apply(other, dataclasses.replace(plans["loose"], model=None)).remove()


def test_the_heat_map_is_a_picture(fast, tmp_path, monkeypatch):
    from PIL import Image

    _, plans = fast
    plans["speedup"].measurements.plot(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    with pytest.raises(ValueError, match="map.jpg"):
        plans["speedup"].measurements.plot(tmp_path / "map.jpg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'attngen\[plot\]'"):
        plans["speedup"].measurements.plot(tmp_path / "other.png")


# What it refuses, before any work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs max_error=... or speedup=..., or both"),
        ({"max_error": 0}, "max_error must be a finite number above 0, got 0"),
        ({"speedup": 1}, "speedup must be a finite number above 1, got 1"),
        ({"speedup": float("nan")}, "got nan"),
        ({"speedup": 2, "num_stages": 0}, "num_stages"),
        ({"speedup": 2, "num_stages": 9}, "num_stages must be a whole number from 1 to 8, got 9"),
        ({"speedup": 2, "seed": -1}, "seed"),
        ({"speedup": 2, "cost": "joules"}, "'joules'.*time, flops"),
        ({"speedup": 2, "candidates": []}, "no method besides exact attention"),
        ({"speedup": 2, "candidates": [SoftmaxAttention()]}, "no method besides exact attention"),
        ({"speedup": 2, "candidates": "agent"}, "sequence of attention methods"),
        ({"speedup": 2, "candidates": ["agent"]}, "AgentAttention.*'agent'"),
        ({"speedup": 2, "candidates": [TokenMerging(random=True)]}, "random=False"),
        ({"speedup": 2, "prompt": "a cat"}, "takes no 'prompt'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    pipe = make_pipe()
    pipe.transformer.forward = None  # whoever calls the network now fails
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, **{"class_labels": [0], **options})


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="needs a pipeline, got SiTTransformer2DModel; wrap the model first"):
        calibrate(make_pipe().transformer, speedup=2)


def test_a_model_without_plain_attention_is_refused():
    with pytest.raises(ValueError, match="no self-attention layer that can be patched: its processor .*Mediator"):
        calibrate(build_sit(attention="mediator"), speedup=2, **CALL)


def test_more_stages_than_steps_are_refused():
    with pytest.raises(ValueError, match="5 stages need as many steps, but this call of the pipeline takes 4"):
        calibrate(make_pipe(), speedup=2, num_stages=5, **CALL)


def test_stages_lie_between_steps():
    times = [1.0, 0.75, 0.5, 0.25]
    assert stage_starts(times, 2) == (1.0, 0.625)
    assert stage_starts([1.0, *times, *times], 4) == (1.0, 0.875, 0.625, 0.375) == stage_starts(times, None)
    assert (
        len(stage_starts([i / 8 for i in range(8)], None)) == 8
        and len(stage_starts([i / 9 for i in range(9)], None)) == 3
    )
    assert choose_calls(times, (1.0, 0.625)) == {0: False, 1: True, 2: False, 3: True}


def test_the_usual_candidates():
    kinds = {candidate.kind for candidate in DEFAULT_CANDIDATES}
    assert kinds == {"agent", "downsampled-kv", "focal", "tiles", "token-merging"}
    assert LinearAttention not in map(type, DEFAULT_CANDIDATES)
