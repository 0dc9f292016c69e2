"""The engine on tiny models: what it draws, compares and calibrates."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import attngen
from pipelines.cli import UserError
from pipelines.engine.comparison import Comparison
from pipelines.engine.recall import recall
from pipelines.engine.results import Progress, Result, save
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.engine.shipped import shipped_models
from pipelines.methods.uses import Use, parse_use
from tests.pipelines.engines import drawn, last, pixels

pytestmark = pytest.mark.usefixtures("unmeasured")


# Drawing


def test_picture_is_that_of_the_pipeline_itself(engine, softmax):
    pipe = engine.models.get(softmax).pipe
    (wanted,) = pipe(
        "heart", num_inference_steps=3, guidance_scale=2.0, generator=[torch.Generator().manual_seed(5)]
    ).images
    found = drawn(engine, softmax, prompt="heart", seed=5)
    assert np.array_equal(pixels(found), np.asarray(wanted))
    assert (found.settings.width, found.settings.height, found.settings.guidance_scale) == (16, 16, 2.0)


def test_same_seed_same_picture_whatever_is_drawn_with_it(engine, mediator, global_rng_untouched):
    three = drawn(engine, mediator, seed=3, images=3)
    assert [s["seed"] for s in three.file_settings] == [3, 4, 5]
    alone = drawn(engine, mediator, seed=5)
    assert np.array_equal(pixels(three, 2), pixels(alone))
    assert not np.array_equal(pixels(three, 1), pixels(alone))


def test_a_new_seed_each_time(engine, mediator):
    seeds = {drawn(engine, mediator, seed=None).settings.seed for _ in range(3)}
    assert len(seeds) == 3


def test_progress_counts_the_samplers_steps(engine, mediator):
    steps = Settings(prompt="face", model=mediator, steps=4, images=2, sampler="ode heun")
    events = [event for event in engine.generate(steps) if isinstance(event, Progress) and event.what == "drawing"]
    told = [(event.picture, event.done) for event in events]
    assert told == sorted(told) and {done for _, done in told} == set(range(5))
    assert {event.total for event in events} == {4} and events[-1].share == 1
    assert all(event.seconds_left >= 0 for event in events if event.done)
    assert any(event.preview is not None and max(event.preview.size) >= 200 for event in events)


def test_numbers_of_a_result(engine, softmax):
    found = last(engine.generate(Settings(prompt="1", model=softmax, steps=4), count_flops=True))
    assert found.settings.prompt == "heart"
    assert found.seconds > 0 and found.steps == 4 and found.peak_bytes > 2**20
    assert json.loads(json.dumps(found.to_dict()))["layers"] is None
    model = engine.models.get(softmax).pipe.transformer
    tokens, width = 64, 32
    # Both halves of guidance, 4 calls: the blocks' matrices alone (projections, MLP, attention) are a lower bound.
    least = 4 * 2 * len(model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks)
    least *= 2 * tokens * width * width * 12 + 4 * tokens**2 * width
    assert least < found.flops < 2 * least


def test_method_is_on_while_drawing_and_off_after(engine, softmax):
    before = drawn(engine, softmax)
    agents = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
    assert agents.report is not None and agents.to_dict()["layers"]["changed"] == 2
    assert "2 of 2 attention layers" in agents.summary()
    assert not np.array_equal(pixels(agents), pixels(before))
    assert np.array_equal(pixels(drawn(engine, softmax)), pixels(before))
    pipe = engine.models.get(softmax).pipe
    with attngen.apply(pipe, attngen.AgentAttention(num_agents=4)):
        (wanted,) = pipe(
            "face", num_inference_steps=3, guidance_scale=2.0, generator=[torch.Generator().manual_seed(0)]
        ).images
    assert np.array_equal(pixels(agents), np.asarray(wanted))


def test_a_method_that_changes_nothing_says_so(engine, softmax):
    found = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 10_000})
    assert "changed 0 of 2 attention layers" in found.summary()


def test_every_preset_can_be_drawn_with(engine, texts):
    for name in attngen.PRESETS:
        found = drawn(engine, texts, prompt="a fox", method=name, steps=2)
        assert found.report is not None, name


def test_mediators_by_time_and_by_change(engine, mediator):
    plain = drawn(engine, mediator, steps=6)
    few = drawn(engine, mediator, steps=6, method="mediators", options={"mediators": "1:1,0.5:2"})
    change = drawn(
        engine, mediator, steps=6, method="mediators", options={"mediators": "1:1,0.5:2", "follow": "change"}
    )
    assert not np.array_equal(pixels(plain), pixels(few)) and change.settings.options["follow"] == "change"
    counted = last(
        engine.compare(Settings(prompt="face", model=mediator, steps=2), [Use(), Use("mediators", {"mediators": "1"})])
    )
    assert counted.rows[1].flops_ratio > 1


def test_a_plan_is_drawn_with_and_written_into_the_file(engine, softmax, tmp_path):
    plan = attngen.Plan.of(attngen.AgentAttention(num_agents=4))
    found = drawn(engine, softmax, method="plan", options={"plan": plan.to_json()})
    same = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
    assert np.array_equal(pixels(found), pixels(same))
    (file,) = save(found, tmp_path).files
    assert attngen.Plan.from_dict(recall(file, engine.models).settings.options["plan"]) == plan


def test_sampler_is_chosen_for_one_picture(engine, mediator):
    own = engine.models.get(mediator).pipe.scheduler
    heun = drawn(engine, mediator, sampler="ode heun")
    assert engine.models.get(mediator).pipe.scheduler is own
    assert heun.file_settings[0]["sampler"] == "ode heun"
    assert not np.array_equal(pixels(heun), pixels(drawn(engine, mediator)))


def test_schedulers_keep_nothing_from_the_picture_before(engine, texts):
    wanted = drawn(engine, texts, prompt="a fox", sampler="PNDMScheduler", steps=4)
    drawn(engine, texts, prompt="a cat", sampler="PNDMScheduler", steps=5)
    again = drawn(engine, texts, prompt="a fox", sampler="PNDMScheduler", steps=4)
    assert np.array_equal(pixels(wanted), pixels(again))


def test_texts_with_preview_and_negative_prompt(engine, texts):
    settings = Settings(prompt="a fox", negative_prompt="a cat", model=texts, steps=3, seed=1)
    events = list(engine.generate(settings))
    assert any(isinstance(event, Progress) and event.preview is not None for event in events)
    without = drawn(engine, texts, prompt="a fox", seed=1)
    assert not np.array_equal(pixels(events[-1]), pixels(without))


# Comparing


def test_comparison(engine, softmax, tmp_path):
    uses = [Use(), parse_use("agent 4 min_tokens=0"), Use("softmax")]
    found = last(engine.compare(Settings(prompt="face", model=softmax, steps=3, images=2, seed=4), uses))
    assert isinstance(found, Comparison)
    assert [row.label for row in found.rows] == ["unchanged", "agent 4 min_tokens 0", "softmax"]
    first, agent, exact = found.rows
    assert (first.error, first.speedup, first.flops_ratio) == (0, 1, 1) and math.isinf(exact.psnr)
    assert agent.error > 0 and agent.flops_ratio > 1 and agent.psnr < 100
    assert np.array_equal(pixels(first.result, 1), pixels(drawn(engine, softmax, seed=5)))
    apart = np.abs(pixels(first.result).astype(int) - pixels(agent.result).astype(int))
    assert np.array_equal(np.asarray(found.difference(1)), np.clip(apart * 4, 0, 255))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert "2 warm-up steps" in data["warm_up"] and len(found.table()[1]) == 9


def test_a_comparison_checks_all_methods_first(engine, softmax):
    with pytest.raises(UserError, match="two methods"):
        last(engine.compare(Settings(prompt="face", model=softmax), [Use()]))
    with pytest.raises(UserError, match="mediators"):
        last(engine.compare(Settings(prompt="face", model=softmax), [Use(), Use("mediators")]))


def test_flops_follow_the_stages_of_a_plan(engine, softmax):
    def flops(agents):
        settings = Settings(
            prompt="face", model=softmax, steps=4, method="agent", options={"num_agents": agents, "min_tokens": 0}
        )
        return last(engine.generate(settings, count_flops=True)).flops

    exact = last(engine.generate(Settings(prompt="face", model=softmax, steps=4), count_flops=True)).flops
    whole, half = flops("4"), flops("1:4,0.5:0")
    assert whole < half < exact
    assert half == pytest.approx((whole + exact) / 2, rel=0.26)


# Calibrating


def test_calibration_is_refused_for_a_model_that_cannot_be_patched(engine, mediator):
    with pytest.raises(UserError, match="cannot be calibrated"):
        list(engine.calibrate(Settings(prompt="face", model=mediator, steps=2), max_error=0.1))
    with pytest.raises(UserError, match="either"):
        list(engine.calibrate(Settings(prompt="face", model=mediator, steps=2)))


def test_calibration_gives_a_plan_that_can_be_drawn_with(engine, softmax):
    events = list(engine.calibrate(Settings(prompt="face", model=softmax, steps=3), max_error=0.5, num_stages=1))
    assert any("network call" in str(event) for event in events)
    found = drawn(engine, softmax, method="plan", options={"plan": events[-1].to_json()})
    assert found.report is not None


def test_shipped_model_comes_first():
    assert next(iter(shipped_models())) == "emoji" and Engine().default_model == "emoji"


def test_result_is_a_whole(engine, mediator):
    result = drawn(engine, mediator)
    assert isinstance(result, Result)
    assert dataclasses.replace(result, files=[]) == result
