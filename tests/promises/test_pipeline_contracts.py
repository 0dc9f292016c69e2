"""What diffusers' common suite asks of every pipeline, of SiT's and of stock ones, patched exactly and with agents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

import attngen
from attngen import AttnGenWarning
from tests.builders.pipelines import AGENTS, KINDS, Kind, denoisers

METHODS = {"softmax": "softmax", "agents": AGENTS}
QUICK = (("sd", "softmax"), ("sd3", "agents"), ("sit", "agents"))
CASES = [
    pytest.param(kind, method, marks=() if (kind, method) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for method in METHODS
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        yield


def patched(kind: str, method: str) -> tuple[Any, Kind]:
    pipe = KINDS[kind].build()
    attngen.apply(pipe, METHODS[method])
    return pipe, KINDS[kind]


every = pytest.mark.parametrize(("kind", "method"), CASES)


@every
def test_outputs_and_components(kind, method):
    """As an object and as a tuple, in every form; and a second pipeline of the same components."""
    pipe, call = patched(kind, method)
    want = call(pipe)
    images, *_ = call.call(pipe, return_dict=False)
    assert torch.equal(torch.from_numpy(images), want)
    again = type(pipe)(**pipe.components, **{k: v for k, v in call.options.items() if k not in pipe.components})
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(again), want)
    pictures = call.call(pipe, output_type="pil").images
    assert abs(numpy.asarray(pictures[0]) / 255 - want[0].numpy()).max() <= 1 / 255
    assert (call(pipe, output_type="pt").permute(0, 2, 3, 1) - want).abs().max() <= 1e-6
    if kind != "dit":  # diffusers' DiT always decodes
        assert call(pipe, output_type="latent").shape[-1] != 3


@every
def test_batches(kind, method):
    """Of any size, equal ones within 1e-4, and several pictures of one prompt."""
    pipe, call = patched(kind, method)
    one = call(pipe)
    for batch in (2, 3):
        out = call(pipe, batch=batch)
        assert len(out) == batch and (out[:1] - one).abs().max() <= 1e-4
    parameters = type(pipe).__call__.__code__.co_varnames
    if "num_images_per_prompt" in parameters:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        out = call(pipe, num_images_per_prompt=2, generator=generators)
        assert len(out) == 2 and (out[:1] - one).abs().max() <= 1e-4


@every
def test_callbacks(kind, method):
    """They see the tensors that a pipeline says it shows, and may change the latents."""
    pipe, call = patched(kind, method)
    if call.callback != "callback_on_step_end":
        return
    names = list(pipe._callback_tensor_inputs)
    seen = []

    def watch(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) <= set(names)
        seen.append(step)
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    settings = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["latents"]}
    out = call(pipe, output_type="latent", **settings)
    assert seen == list(range(len(seen))) and len(seen) == pipe.num_timesteps
    assert out.abs().sum() == 0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        call(pipe, **{**settings, "callback_on_step_end_tensor_inputs": ["no such tensor"]})


@every
def test_switches_of_diffusers_and_back(kind, method):
    """Slicing of attention and VAE, tiling, fused projections, FreeU: finite, and the same picture afterwards."""
    pipe, call = patched(kind, method)
    want = call(pipe)
    handle_method = METHODS[method]
    for on, off, tolerance in (
        ("enable_vae_slicing", "disable_vae_slicing", 1e-5),
        ("enable_vae_tiling", "disable_vae_tiling", 1.0),
        ("enable_freeu", "disable_freeu", None),
        ("fuse_qkv_projections", "unfuse_qkv_projections", 1e-3),
        ("enable_attention_slicing", "disable_attention_slicing", 1e-3),
    ):
        if not hasattr(pipe, on) or (on == "enable_attention_slicing" and kind == "sit"):
            continue
        getattr(pipe, on)(**({"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4} if on == "enable_freeu" else {}))
        attngen.apply(pipe, handle_method)  # over whatever processors are there now
        out = call(pipe)
        assert torch.isfinite(out).all()
        assert tolerance is None or (out - want).abs().max() <= tolerance, on
        attngen.remove(pipe)
        getattr(pipe, off)()
        attngen.apply(pipe, handle_method)
        assert (call(pipe) - want).abs().max() <= (0 if tolerance in (None, 1e-5, 1.0) else 1e-4), off
    assert denoisers(pipe)


@every
def test_the_guidance_scale_counts(kind, method):
    pipe, call = patched(kind, method)
    if kind == "sit" or "guidance_scale" not in call.arguments(1):
        return
    want = call(pipe)
    assert not torch.equal(call(pipe, guidance_scale=1.0), want)
    assert torch.equal(call(pipe), want)


@every
def test_attention_kwargs_of_the_caller_stay(kind, method):
    """What is given beside ours arrives, and the dictionary is as it was."""
    pipe, call = patched(kind, method)
    name = {"flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs"}.get(call.host, "cross_attention_kwargs")
    if name not in type(pipe).__call__.__code__.co_varnames:
        return
    given = {"scale": 1.0}
    assert torch.equal(call(pipe, **{name: given}), call(pipe))
    assert given == {"scale": 1.0}
