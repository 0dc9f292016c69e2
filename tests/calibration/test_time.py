"""Calibration for seconds, by a clock that counts what the network computes: the same numbers on every machine."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import attngen
from attngen import AgentAttention, DownsampledKV, Plan
from attngen.calibration import Progress, calibrate
from attngen.calibration.session import MAX_RUNS, ROUNDS
from attngen.hosts.spec import spec_of
from attngen.layers.call import CHANNEL_KEY
from tests.builders.programs import build_sit

pytestmark = [
    pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning"),
    pytest.mark.usefixtures("global_rng_untouched"),
]
AGENT, KEYS = AgentAttention(4), DownsampledKV(2)
CALL = {"class_labels": [0, 1], "num_inference_steps": 3, "guidance_scale": 1.0}
REST = 6.0
"""Seconds of a network call outside of attention layers."""


class Ticks:
    """A pipeline and its clock: layers take seconds by their method, and the rest of a network call `REST`.

    `overhead` is added where a plan runs, and not where a single layer is measured.
    """

    def __init__(self, seconds=None, overhead=0.0):
        self.pipe = build_sit(attention="softmax")
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds, self.overhead = (
            {"softmax": 10.0, "agent": 2.0, "downsampled-kv": 5.0, **(seconds or {})},
            overhead,
        )
        self.now, self.network_calls = 0.0, 0
        self.layers = [module for module in self.pipe.transformer.modules() if hasattr(module, "to_q")]
        self.pipe.transformer.register_forward_pre_hook(self._call)
        for layer in self.layers:
            layer.forward = self._timed(layer, layer.forward)

    def _call(self, model, args):
        self.network_calls += 1
        self.now += REST

    def _timed(self, layer, forward):
        def timed(*args, **kwargs):
            call, kind = kwargs.get(CHANNEL_KEY), "softmax"
            if call is not None:
                kind = (call.method or spec_of(layer).methods[int(call.stage)]).kind
                self.now += self.overhead if kind != "softmax" and call.method is None else 0.0
            self.now += self.seconds[kind]
            return forward(*args, **kwargs)

        return timed

    def clock(self):
        return self.now

    def calibrate(self, **options):
        given = {"candidates": (AGENT, KEYS), "num_stages": 1, "clock": self.clock, **CALL, **options}
        return calibrate(self.pipe, **given)

    def run(self, plan=None):
        """Latents and seconds of one run."""
        handle = None if plan is None else attngen.apply(self.pipe, plan)
        before = self.now
        latents = self.pipe(**CALL, generator=torch.Generator().manual_seed(0), output_type="latent").images
        seconds = self.now - before
        if handle is not None:
            handle.remove()
        return latents, seconds


@pytest.fixture(scope="module")
def loose():
    ticks = Ticks()
    return ticks, ticks.calibrate(max_error=1e6)


def test_the_seconds_are_those_of_whole_runs_in_turn(loose):
    ticks, plan = loose
    found, layers = plan.measurements, len(ticks.layers)
    assert found.cost == "time" and len(found.rounds) == ROUNDS
    exact, seconds = ticks.run()[1], ticks.run(plan)[1]
    assert (
        (found.seconds_exact, found.seconds) == (exact, seconds) == (3 * (REST + 10 * layers), 3 * (REST + 2 * layers))
    )
    assert found.speedup == pytest.approx(exact / seconds) and found.attention_speedup == pytest.approx(5)
    assert all(method.kind == "agent" for stage in plan.stages for method in stage.layers.values())
    assert f"{exact:.2f} s exact, {seconds:.2f} s with the plan: {exact / seconds:.2f} times as fast" in str(found)


def test_the_error_is_within_the_bound_and_measured(loose):
    ticks, cheap = loose
    plan = ticks.calibrate(max_error=cheap.measurements.error / 3)
    exact, got = ticks.run()[0], ticks.run(plan)[0]
    error = float((got - exact).norm() / exact.norm())
    assert plan.measurements.error == pytest.approx(error, rel=1e-5) and 0 < error <= cheap.measurements.error / 3
    assert 1 < plan.measurements.speedup < cheap.measurements.speedup


@pytest.mark.parametrize("speedup", [1.3, 1.8, 2.5])
def test_speedup_is_of_the_whole_pipeline(loose, speedup):
    ticks, cheap = loose
    plan = ticks.calibrate(speedup=speedup)
    found = plan.measurements
    assert speedup <= ticks.run()[1] / ticks.run(plan)[1] == pytest.approx(found.speedup)
    assert found.bound == {"speedup": speedup} and found.error <= cheap.measurements.error
    # No other choice of methods that is as fast is predicted to be as exact.
    errors = []
    for trials in itertools.product(*(layer.cells[0].trials for layer in found.layers)):
        seconds = REST + sum(trial.cost for trial in trials)
        if found.seconds_exact / (3 * seconds) >= speedup:
            squares = ((c.cells[0].influence * t.error) ** 2 for c, t in zip(found.layers, trials, strict=True))
            errors.append(sum(squares) ** 0.5)
    assert found.predicted_error == pytest.approx(min(errors))


def test_a_speedup_that_nothing_reaches_names_the_fastest(loose):
    ticks, cheap = loose
    best = cheap.measurements.speedup
    with pytest.raises(ValueError, match=rf"whole pipeline 9 times as fast; the fastest that was run .* {best:.2f}"):
        ticks.calibrate(speedup=9)


def test_both_bounds_hold_or_are_refused(loose):
    ticks, cheap = loose
    plan = ticks.calibrate(speedup=1.3, max_error=cheap.measurements.error)
    assert plan.measurements.speedup >= 1.3 and plan.measurements.error <= cheap.measurements.error
    assert set(plan.measurements.bound) == {"max_error", "speedup"}
    with pytest.raises(ValueError, match=r"no plan is 1.3 times as fast within max_error=1e-06; .* error of 0\.\d+"):
        ticks.calibrate(speedup=1.3, max_error=1e-6)


@pytest.mark.parametrize(
    ("slow", "reason"),
    [
        ({"seconds": {"agent": 11.0, "downsampled-kv": 10.0}}, "no plan within max_error=1e\\+06 was found"),
        ({"overhead": 10.0, "seconds": {"agent": 0.5}}, "runs at 0.96 times the speed of exact attention"),
    ],
)
def test_what_is_not_faster_is_exact_and_says_why(slow, reason):
    """Layers that are slower one by one, and a plan whose layers look faster than its runs are."""
    ticks = Ticks(**slow)
    with pytest.warns(attngen.AttnGenWarning, match=f"exact attention everywhere: .*{reason}"):
        plan = ticks.calibrate(max_error=1e6)
    found = plan.measurements
    assert not any(stage.layers for stage in plan.stages)
    assert (found.error, found.speedup, found.rounds) == (0.0, 1.0, ())
    assert found.why_exact in str(found) and Plan.from_json(plan.to_json()).measurements == found


@pytest.mark.parametrize("options", [{"max_error": 0.02, "num_stages": 3}, {"speedup": 1.3, "num_stages": 3}])
def test_a_calibration_takes_at_most_30_runs(options):
    ticks = Ticks()
    plan = ticks.calibrate(**options)
    assert ticks.network_calls / CALL["num_inference_steps"] <= MAX_RUNS == 30
    assert plan.measurements.settings["runs"] == pytest.approx(ticks.network_calls / 3, abs=0.01)


def test_few_steps_have_a_stage_each():
    plan = Ticks().calibrate(max_error=0.5, num_stages=None)
    assert plan.measurements.calls == (1, 1, 1)
    assert plan.starts == pytest.approx((1.0, 5 / 6, 1 / 2))


def test_progress_has_a_share_that_grows_and_time_left():
    seen = []
    Ticks().calibrate(max_error=0.5, progress=seen.append)
    assert list(dict.fromkeys(p.phase for p in seen)) == ["measuring layers", "measuring stages", "checking plans"]
    assert all(0 <= p.share <= 1 and p.seconds_left >= 0 for p in seen)
    assert str(Progress("measuring layers", 0.5, 130.2)) == "measuring layers, 2 min 10 s left"


# Interrupted, and asked again


def test_an_interrupted_calibration_goes_on_from_its_file(tmp_path):
    whole, file = Ticks().calibrate(max_error=0.03, num_stages=3), tmp_path / "calibration.json"
    for fails_at in (4, 5, 12, 24):  # in the second run, after it, in plans of stages, in a timing
        ticks = Ticks()

        def fail(model, args, ticks=ticks, fails_at=fails_at):
            if ticks.network_calls >= fails_at:
                raise KeyboardInterrupt

        hook = ticks.pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            ticks.calibrate(max_error=0.03, num_stages=3, resume=file)
        hook.remove()
    last = Ticks()
    plan = last.calibrate(max_error=0.03, num_stages=3, resume=file)
    assert plan == whole and plan.measurements.layers == whole.measurements.layers
    assert plan.measurements.error == whole.measurements.error
    assert last.network_calls < 3 * whole.measurements.settings["runs"] - 3


def test_another_bound_is_found_without_measuring_again(tmp_path):
    ticks, file = Ticks(), tmp_path / "calibration.json"
    ticks.calibrate(max_error=0.05, resume=file)
    before = ticks.network_calls
    other = ticks.calibrate(max_error=0.02, resume=file)
    assert ticks.network_calls - before <= 3 * (1 + 4 + 2 * ROUNDS)
    assert other == Ticks().calibrate(max_error=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 4}, "another calibration: its num_inference_steps is '3', not '4'; delete it"),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"candidates": [AGENT]}, "its candidates is"),
    ],
)
def test_a_file_of_another_calibration_is_refused(tmp_path, change, message):
    ticks, file = Ticks(), tmp_path / "calibration.json"
    ticks.calibrate(max_error=0.5, resume=file)
    with pytest.raises(ValueError, match=message):
        ticks.calibrate(max_error=0.5, resume=file, **change)
    with torch.no_grad():
        ticks.pipe.transformer.proj_out.weight.mul_(1.1)
    with pytest.raises(ValueError, match="the exact result differs; delete it"):
        ticks.calibrate(max_error=0.5, resume=file)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "attngen-plan"}'])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="calibration.json"):
        Ticks().calibrate(max_error=0.5, resume=file)
    damaged = {"format": "attngen-calibration", "version": 1}
    file.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=r"calibration.json is damaged: KeyError.*delete it"):
        Ticks().calibrate(max_error=0.5, resume=file)
