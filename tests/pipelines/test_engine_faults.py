"""The engine on tiny models: what it refuses before any work, how it stops, and what it survives."""

import math
import threading
import time

import numpy as np
import pytest
import torch

from pipelines.cli import UserError
from pipelines.engine.calls import Stopped
from pipelines.engine.models import ModelStore
from pipelines.engine.results import Progress
from pipelines.engine.session import Engine
from pipelines.engine.settings import Settings
from pipelines.engine.turns import TURNS
from pipelines.methods.uses import Use
from tests.pipelines.engines import drawn, pixels

pytestmark = pytest.mark.usefixtures("unmeasured")


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
    ({"method": "none", "options": {"num_agents": 4}}, "num_agents"),
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
        ({"num_agents": 0.5}, "0.5"),
        ({"num_agents": -1}, "-1"),
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


def test_waiting_for_a_turn_can_be_stopped(engine, mediator):
    stop = threading.Event()
    engine.models.get(mediator)
    with TURNS.taken(), pytest.raises(Stopped):
        for event in engine.generate(Settings(prompt="face", model=mediator, steps=2), stop=stop):
            if "waiting" in str(event):
                assert "1 before this one" in str(event)
                stop.set()


def test_turns_come_in_the_order_of_arrival():
    done, threads = [], []

    def draw(number):
        with TURNS.taken():
            done.append(number)

    with TURNS.taken():
        for number in range(4):
            threads.append(threading.Thread(target=draw, args=(number,)))
            threads[-1].start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert done == [0, 1, 2, 3]


def loading_slowly(monkeypatch, seconds=30.0, error=None):
    """Models named slow/model load until the event that this returns is set."""
    from pipelines.engine import models

    fetch, go, tries = models.fetch, threading.Event(), []

    def wait(name, options):
        if name != "slow/model":
            return fetch(name, options)
        tries.append(name)
        go.wait(seconds)
        raise OSError("cannot get slow/model")

    monkeypatch.setattr(models, "fetch", wait)
    return go, tries


def test_a_model_that_loads_blocks_nobody(mediator, monkeypatch):
    engine = Engine(ModelStore())
    drawn(engine, mediator)
    go, tries = loading_slowly(monkeypatch)
    stop = threading.Event()
    loads = engine.load("slow/model", stop)
    assert "loading slow/model" in str(next(loads))
    start = time.monotonic()
    drawn(engine, mediator)
    engine.models.get(mediator)
    assert time.monotonic() - start < 5
    assert any("s" in str(next(loads)) for _ in range(3))
    stop.set()
    with pytest.raises(Stopped):
        list(loads)
    go.set()
    for _ in range(2):  # whoever asks again soon gets the same error, without another try
        with pytest.raises(OSError, match="cannot get slow/model"):
            engine.models.get("slow/model")
    assert tries == ["slow/model"]


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
    wanted = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == step + 1:
            raise error

    hook = engine.models.get(softmax).pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="smaller or fewer"):
        drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
    hook.remove()
    again = drawn(engine, softmax, method="agent", options={"num_agents": 4, "min_tokens": 0})
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
