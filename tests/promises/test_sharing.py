"""Promise 14: threads that draw with one patched model, and pipelines that share one."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import attngen
from attngen import AgentAttention, AttnGenWarning, InterpolantScheduler, Plan, Stage, TokenMerging
from tests.builders.hosts import fresh
from tests.builders.pipelines import AGENTS, KINDS
from tests.hosts.test_integrations import STABLE
from tests.hosts.test_integrations import parts as parts

PLAN = Plan((Stage(1.0, {"*": TokenMerging(0.5, random=True)}), Stage(0.5, {"*": AgentAttention(num_agents=4)})))
DISCRETE = {
    "DDIM": diffusers.DDIMScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM++": diffusers.DPMSolverMultistepScheduler,
}
FLOW = (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler)
SIT = (*FLOW, InterpolantScheduler, lambda: InterpolantScheduler(sampler="sde"))
PROMPTS = ("a cat", "cat", "abc de", "x")
THREADS = 8


def for_a_thread(pipe: Any) -> Any:
    """A pipeline on the same networks with its own scheduler and tokenizers, which keep the state of a run.

    `docs/promises.md` recommends this.
    """
    own = copy.copy(pipe)
    for name, part in pipe.components.items():
        if name == "scheduler" or name.startswith("tokenizer"):
            setattr(own, name, copy.deepcopy(part))
    return own


def in_threads(tasks: list[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, all started at once."""
    results: list[Any] = [None] * len(tasks)
    start = threading.Barrier(len(tasks))

    def work(index: int) -> None:
        start.wait()
        try:
            results[index] = tasks[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (errors := [x for x in results if isinstance(x, Exception)]), errors
    return results


def compare(pipe: Any, tasks: list[Callable[[Any], Any]]) -> None:
    """The tasks one after the other, and twice all at once, each on its own pipeline over the same networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        alone = [task(for_a_thread(pipe)) for task in tasks]
        assert len({hashlib.sha256(x.numpy().tobytes()).digest() for x in alone}) == len(tasks), "all pictures differ"
        for _ in range(2):
            together = in_threads([lambda task=task: task(for_a_thread(pipe)) for task in tasks])
            assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "scheduler", ["PNDM", *(pytest.param(x, marks=pytest.mark.slow) for x in DISCRETE if x != "PNDM")]
)
def test_eight_threads_on_stable_diffusion(parts, scheduler):
    """Different prompts, sizes, steps and seeds through one UNet, text encoder and VAE."""
    own = {**parts, "scheduler": DISCRETE[scheduler]()}
    pipe = diffusers.StableDiffusionPipeline(**own, **STABLE, unet=fresh("sd15"))
    pipe.set_progress_bar_config(disable=True)
    attngen.apply(pipe, PLAN, seed=1)

    def task(index: int) -> Callable[[Any], torch.Tensor]:
        def draw(pipe: Any) -> torch.Tensor:
            height, width = ((32, 32), (16, 48))[index % 2]
            generator = torch.Generator().manual_seed(index)
            settings = {"height": height, "width": width, "num_inference_steps": 2 + index % 3}
            out = pipe(PROMPTS[index % 4], generator=generator, output_type="np", **settings)
            return torch.from_numpy(out.images)

        return draw

    compare(pipe, [task(index) for index in range(THREADS)])


@pytest.mark.parametrize("kind", ["sit", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sd3", "flux", "dit"))])
def test_eight_threads_on_transformers(kind):
    """Each thread with another seed, and another scheduler where there are several."""
    pipe = KINDS[kind].build()
    attngen.apply(pipe, PLAN if kind != "flux" else AGENTS)
    schedulers = SIT if kind == "sit" else (DISCRETE["DDIM"],) if kind == "dit" else FLOW[:1]

    def task(index: int) -> Callable[[Any], torch.Tensor]:
        def draw(pipe: Any) -> torch.Tensor:
            pipe.scheduler = schedulers[index % len(schedulers)]()
            return KINDS[kind](pipe, batch=1 + index % 2, seed=index)

        return draw

    compare(pipe, [task(index) for index in range(THREADS)])


# Pipelines that share a model


def two_pipelines() -> tuple[Any, Any]:
    """Text to image and image to image on one UNet."""
    pipe = KINDS["sd"].build()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return pipe, other


@pytest.fixture
def shared() -> tuple[Any, Any]:
    return two_pipelines()


SHARED = "the unet is shared with a Stable.* through which it was patched; the new patch holds there too"


def test_a_second_patch_through_another_pipeline_holds_in_both_and_warns(shared):
    pipe, other = shared
    first = attngen.apply(pipe, AGENTS)
    want = KINDS["sd"](pipe)
    with pytest.warns(attngen.AttnGenWarning, match=SHARED):
        second = attngen.apply(other, PLAN)
    assert second.is_applied and not first.is_applied
    drawn = KINDS["sd"](pipe)
    assert not torch.equal(drawn, want)
    attngen.apply(pipe.unet, PLAN)
    assert torch.equal(KINDS["sd"](pipe), drawn)
    attngen.remove(pipe)  # from either side
    assert not second.is_applied
    first.reapply()
    assert first.is_applied and torch.equal(KINDS["sd"](pipe), want)


def test_copies_of_the_model_do_not_disturb_each_other(shared):
    """Each pipeline has a patch of its own where it has a model of its own."""
    pipe, other = shared
    exact = KINDS["sd"](pipe), KINDS["sd-img2img"](other)
    other.unet = copy.deepcopy(pipe.unet)
    attngen.apply(pipe, AGENTS)
    attngen.apply(other, PLAN)
    first, second = KINDS["sd"](pipe), KINDS["sd-img2img"](other)
    assert not torch.equal(first, exact[0]) and not torch.equal(second, exact[1])
    attngen.remove(pipe)
    assert torch.equal(KINDS["sd"](pipe), exact[0]) and torch.equal(KINDS["sd-img2img"](other), second)
    attngen.remove(other)
    assert torch.equal(KINDS["sd-img2img"](other), exact[1])


def test_the_same_pipeline_and_the_bare_model_may_change_the_patch(shared):
    pipe, other = shared
    with warnings.catch_warnings():
        warnings.simplefilter("error", attngen.AttnGenWarning)
        attngen.apply(pipe, AGENTS)
        first = attngen.apply(pipe, PLAN)
        bare = attngen.apply(pipe.unet, AGENTS)
        assert bare.is_applied and not first.is_applied
        assert attngen.apply(other, PLAN).is_applied  # the model's caller had it last
        attngen.apply(pipe.unet, "softmax")
        attngen.apply(pipe, AGENTS)


def test_a_pipeline_that_is_gone_owns_nothing():
    pipe, other = two_pipelines()
    handle = attngen.apply(pipe, AGENTS)
    del pipe
    gc.collect()
    assert handle.is_applied
    with warnings.catch_warnings():
        warnings.simplefilter("error", attngen.AttnGenWarning)
        second = attngen.apply(other, PLAN)
    assert second.is_applied and not handle.is_applied


def test_copies_of_pipelines_and_handles_are_their_own(shared):
    pipe, _ = shared
    handle = attngen.apply(pipe, AGENTS)
    other = copy.deepcopy(pipe)
    assert attngen.apply(other, PLAN).is_applied and handle.is_applied
    pickle.loads(pickle.dumps(handle)).reapply()
    assert handle.is_applied
