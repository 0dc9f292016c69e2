"""The engine on tiny models: what it draws, refuses, stops, survives and compares."""

import dataclasses
import json
import math
import threading
import time

import numpy as np
import pytest
import torch

import attngen
from pipelines.cli import UserError
from pipelines.comparison import Comparison
from pipelines.engine import Engine
from pipelines.images import read_settings, save_png
from pipelines.method_catalogue import METHODS
from pipelines.methods import Use, parse_use
from pipelines.models import ModelStore, shipped_models
from pipelines.recall import parse_parameters, recall
from pipelines.results import Progress, Result, save
from pipelines.settings import Limits, Settings
from tests.pipelines.tiny_classes import save_sit

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(scope="module")
def mediator(tmp_path_factory):
    return save_sit(tmp_path_factory.mktemp("models") / "mediator")


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    return save_sit(tmp_path_factory.mktemp("models") / "softmax", "softmax")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.pipelines.tiny import build_sd

    folder = tmp_path_factory.mktemp("models") / "texts"
    build_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine():
    return Engine(ModelStore(), Limits(pixels=256 * 256, steps=100, images=8, characters=200))


def last(events):
    """The result; all progress before it is told of in order."""
    *progress, result = list(events)
    assert all(isinstance(event, Progress) for event in progress)
    return result


def pixels(result, k=0):
    return np.asarray(result.pictures[k])


def drawn(engine, model, **settings):
    given = {"prompt": "face", "model": model, "steps": 3, **settings}
    return last(engine.generate(Settings(**given), previews=False))


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
    agents = drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 0})
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
    found = drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 10_000})
    assert "changed 0 of 2 attention layers" in found.summary()


@pytest.mark.parametrize(
    ("name", "options", "same_as"),
    [
        ("agent", {}, "agent"),
        ("agentsd", {}, "agentsd"),
        ("tome", {}, "tome"),
        ("todo", {}, "todo"),
        ("linear", {}, "linear"),
    ],
)
def test_default_options_are_the_presets(name, options, same_as):
    info = METHODS[name]
    assert info.plan is not None
    assert info.plan(info.checked(options)) == attngen.METHODS[same_as]


def test_every_preset_can_be_drawn_with(engine, texts):
    assert set(attngen.METHODS) <= set(METHODS)
    for name in attngen.METHODS:
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
    same = drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 0})
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


# What is refused, before any work

BAD = [
    ({"prompt": "unicorn"}, "unicorn"),
    ({"prompt": ""}, "choose a class"),
    ({"prompt": "99"}, "99"),
    ({"prompt": "x" * 300}, "300"),
    ({"prompt": 1.5}, "1.5"),
    ({"negative_prompt": "a cat"}, "negative"),
    ({"method": "magic"}, "magic"),
    ({"method": "agent"}, "agent"),
    ({"method": "mediators", "options": {"mediators": "0"}}, "0"),
    ({"method": "mediators", "options": {"mediators": "1:4,2:16"}}, "1:4,2:16"),
    ({"method": "mediators", "options": {"mediators": "nan:4"}}, "nan"),
    ({"method": "mediators", "options": {"mediators": "99"}}, "99 is more than 64, the 8 x 8 tokens"),
    ({"method": "mediators", "options": {"mediators": "1:4,0.001:99"}}, "99 is more than 64"),
    ({"method": "mediators", "options": {"mediators": "17"}, "height": 8, "width": 8}, "17 is more than 16"),
    ({"method": "mediators", "options": {"number": 4}}, "number"),
    ({"method": "mediators", "options": {"follow": "wind"}}, "wind"),
    ({"method": "none", "options": {"agents": 4}}, "agents"),
    ({"sampler": "magic"}, "magic"),
    ({"steps": 0}, "steps"),
    ({"steps": 101}, "101"),
    ({"steps": math.nan}, "steps"),
    ({"steps": True}, "True"),
    ({"guidance_scale": math.nan}, "nan"),
    ({"guidance_scale": math.inf}, "inf"),
    ({"guidance_scale": -1}, "-1"),
    ({"guidance_scale": "2"}, "guidance_scale"),
    ({"height": 17, "width": 16}, "17"),
    ({"height": 0, "width": 16}, "height"),
    ({"height": -64, "width": 64}, "-64"),
    ({"height": 16}, "width"),
    ({"height": 512, "width": 512}, "512 x 512"),
    ({"seed": -1}, "-1"),
    ({"seed": 1.5}, "1.5"),
    ({"seed": 2**32}, str(2**32)),
    ({"images": 0}, "images"),
    ({"images": 9}, "9"),
    ({"model": "no such model"}, "no such model"),
    ({"model": ""}, "model"),
]


@pytest.mark.parametrize(("bad", "named"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_by_name_before_work(engine, mediator, bad, named):
    model = engine.models.get(mediator)
    calls = []
    hook = model.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(UserError, match=named.replace("(", r"\(").replace(".", r"\.")):
            drawn(**{"engine": engine, "model": mediator, **bad})
    finally:
        hook.remove()
    assert not calls


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agents": 0.5}, "0.5"),
        ({"agents": -1}, "-1"),
        ({"min_tokens": 1.5}, "1.5"),
        ({"shortcut": math.nan}, "nan"),
        ({"shortcut": 2}, "2"),
        ({"broadcast_exponent": "x"}, "x"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        Use("agent", options).checked()


def test_a_plan_that_is_none(engine, softmax):
    for text in ("", "{", '{"format": "other"}', None):
        with pytest.raises(UserError, match="plan"):
            drawn(engine, softmax, method="plan", options={"plan": text})


def test_a_store_offers_only_what_is_allowed(mediator, softmax):
    store = ModelStore(allowed=[mediator])
    with pytest.raises(UserError, match="not offered"):
        Engine(store).check(Settings(prompt="face", model=softmax))


def test_class_names_that_two_classes_share(engine, mediator):
    assert drawn(engine, mediator, prompt="2").settings.prompt == "crane, bird"
    with pytest.raises(UserError, match="several classes"):
        drawn(engine, mediator, prompt="crane")


# Stopping and faults


@pytest.fixture
def slow(engine, mediator):
    """A model whose every network call takes a while; the list counts them."""
    calls = []

    def wait(*_):
        calls.append(time.perf_counter())
        time.sleep(0.05)

    hook = engine.models.get(mediator).pipe.transformer.register_forward_pre_hook(wait)
    yield calls
    hook.remove()


def test_closing_stops_within_a_step_and_the_next_request_works(engine, mediator, slow):
    before = drawn(engine, mediator, seed=8)
    slow.clear()
    events = engine.generate(Settings(prompt="face", model=mediator, steps=100))
    for event in events:
        if isinstance(event, Progress) and event.done == 3:
            break
    events.close()
    calls = len(slow)
    assert calls <= 5
    time.sleep(0.2)
    assert len(slow) == calls
    assert not [thread for thread in threading.enumerate() if thread.name == "attngen-engine"]
    assert np.array_equal(pixels(drawn(engine, mediator, seed=8)), pixels(before))


def test_waiting_for_a_model_can_be_stopped(engine, mediator):
    with engine.models.get(mediator).lock:
        events = engine.generate(Settings(prompt="face", model=mediator, steps=2))
        told = [str(next(events)), str(next(events))]
        assert "waiting" in told[1]
        events.close()


def test_a_picture_of_nan_is_an_error_and_no_file(engine, softmax):
    model = engine.models.get(softmax).pipe.transformer
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        with pytest.raises(FloatingPointError, match="finite"):
            drawn(engine, softmax)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert np.isfinite(pixels(drawn(engine, softmax))).all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
@pytest.mark.parametrize("step", [0, 2])
def test_out_of_memory_says_what_to_do_and_the_next_request_works(engine, softmax, error, step):
    wanted = drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 0})
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == step + 1:
            raise error

    hook = engine.models.get(softmax).pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="smaller or fewer"):
        drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 0})
    hook.remove()
    again = drawn(engine, softmax, method="agent", options={"agents": 4, "min_tokens": 0})
    assert np.array_equal(pixels(again), pixels(wanted))


def test_out_of_memory_lets_go_of_models_and_tensors(softmax):
    import weakref

    engine = Engine(ModelStore())
    held = []

    def fail(module, args, kwargs):
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("out of memory")

    engine.models.get(softmax).pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(MemoryError):
        drawn(engine, softmax)
    assert held[0]() is None
    assert pixels(drawn(engine, softmax)).shape == (16, 16, 3)  # loaded anew, without the hook


def test_other_faults_are_not_hidden(engine, softmax):
    def fail(*_):
        raise KeyError("a fault of ours")

    hook = engine.models.get(softmax).pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        drawn(engine, softmax)
    hook.remove()
    drawn(engine, softmax)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_many_threads_draw_what_one_does(engine, texts, sampler):
    prompts = ["a fox", "a longer text of many more letters", "x"]
    wanted = {p: pixels(drawn(engine, texts, prompt=p, sampler=sampler)) for p in prompts}
    found = []

    def run(prompt):
        found.append((prompt, pixels(drawn(engine, texts, prompt=prompt, sampler=sampler))))

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(np.array_equal(image, wanted[prompt]) for prompt, image in found)


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
    assert "2 steps" in data["warm_up"] and len(found.table()[1]) == 9


def test_a_comparison_checks_all_methods_first(engine, softmax):
    with pytest.raises(UserError, match="two methods"):
        last(engine.compare(Settings(prompt="face", model=softmax), [Use()]))
    with pytest.raises(UserError, match="mediators"):
        last(engine.compare(Settings(prompt="face", model=softmax), [Use(), Use("mediators")]))


def test_flops_follow_the_stages_of_a_plan(engine, softmax):
    def flops(agents):
        settings = Settings(
            prompt="face", model=softmax, steps=4, method="agent", options={"agents": agents, "min_tokens": 0}
        )
        return last(engine.generate(settings, count_flops=True)).flops

    exact = last(engine.generate(Settings(prompt="face", model=softmax, steps=4), count_flops=True)).flops
    whole, half = flops("4"), flops("1:4,0.5:0")
    assert whole < half < exact
    assert half == pytest.approx((whole + exact) / 2, rel=0.26)


# Files and recall


def test_recall_draws_the_identical_picture(engine, mediator, tmp_path):
    settings = {"method": "mediators", "options": {"mediators": "1:1,0.5:4"}, "seed": 11, "images": 2, "steps": 4}
    made = save(drawn(engine, mediator, prompt="heart", **settings), tmp_path)
    for k, file in enumerate(made.files):
        found = recall(file, engine.models, engine.limits)
        assert found.notes == []
        assert found.settings.seed == 11 + k and found.settings.images == 1
        again = last(engine.generate(found.settings))
        assert np.array_equal(pixels(again), pixels(made, k))


def test_files_hold_settings_or_do_not(engine, mediator, tmp_path):
    result = drawn(engine, mediator)
    (with_settings,) = save(result, tmp_path).files
    (without,) = save(result, tmp_path, with_settings=False).files
    assert read_settings(with_settings)["model_hash"] == engine.models.get(mediator).hash
    assert b"Steps: 3" in with_settings.read_bytes() and b"face" not in without.read_bytes()
    with pytest.raises(UserError, match="cannot be recalled"):
        recall(without, engine.models)
    assert oct(without.stat().st_mode)[-3:] == "644"


def test_no_file_is_left_when_one_cannot_be_written(engine, mediator, tmp_path, monkeypatch):
    result = drawn(engine, mediator, images=2)
    from pipelines import images

    whole, count = images.write_file, []

    def full(path, content):
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(images, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        save(result, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_recall_of_other_programs_files(engine, tmp_path):
    from PIL import Image

    path = tmp_path / "x.png"
    common = {"prompt": "face", "labels": [0], "seed": 7, "steps": 5, "guidance_scale": 1.5, "images": 1}
    save_png(
        Image.new("RGB", (8, 8)), path, {**common, "sampler": "ode heun", "mediators": "1:4,0.5:16", "model": "emoji"}
    )
    found = recall(path, ModelStore())
    assert found.settings.method == "mediators" and found.settings.options["mediators"] == "1:4,0.5:16"
    assert (found.settings.seed, found.settings.steps, found.settings.sampler) == (7, 5, "ode heun")
    save_png(Image.new("RGB", (8, 8)), path, {**common, "model": "other", "method": "secret/plan.json"})
    found = recall(path, ModelStore())
    assert len(found.notes) == 2 and found.settings.method == "none"


def test_recall_of_a_foreign_parameters_text():
    pairs = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768, Model: x"
    text = f"a fox, in snow\nNegative prompt: cat\n{pairs}"
    found = parse_parameters(text)
    assert found == {
        "prompt": "a fox, in snow", "negative_prompt": "cat", "model": "x", "steps": 20, "seed": 42,
        "guidance_scale": 7.0, "size": "512x768",
    }  # fmt: skip
    assert parse_parameters("hello") is None


HOSTILE = [
    {"prompt": "face", "seed": -5},
    {"prompt": "face", "steps": 10**9},
    {"prompt": ["face"], "seed": 1},
    {"prompt": "face", "size": "99999x99999"},
    {"prompt": "face", "method": "agent", "options": {"agents": "__import__('os').system('touch /tmp/x')"}},
    {"prompt": "face", "method": "plan", "options": {"plan": {"format": "attngen-plan", "stages": 1}}},
    {"prompt": "x" * 5000},
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda value: str(value)[:50])
def test_hostile_settings_are_refused(engine, tmp_path, data):
    from PIL import Image

    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"model": "emoji", **data})
    with pytest.raises(UserError):
        recall(path, ModelStore(), engine.limits)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"\0" * 100])
def test_broken_files_are_refused(engine, tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be recalled"):
        recall(path, engine.models)


def test_other_weights_under_the_same_name_are_told_of(tmp_path):
    from PIL import Image

    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"prompt": "face", "model": "emoji", "model_hash": "0123456789"})
    (note,) = recall(path, ModelStore()).notes
    assert "other weights" in note


def test_shipped_model_comes_first():
    assert next(iter(shipped_models())) == "emoji" and Engine().default_model == "emoji"


def test_result_is_a_whole(engine, mediator):
    result = drawn(engine, mediator)
    assert isinstance(result, Result)
    assert dataclasses.replace(result, files=[]) == result


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
