"""Promises 3, 4 and 5: same seed, same picture, in any batch; the caller's objects and random states stay."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import attngen
from attngen import AgentAttention, AttnGenWarning, Plan, Stage, TokenMerging
from tests.builders.pipelines import KINDS

ROOT = Path(__file__).parents[2]
PLAN = Plan((Stage(1.0, {"*": TokenMerging(0.5, random=True)}), Stage(0.5, {"*": AgentAttention(num_agents=4)})))
QUICK = ("sd-inpaint", "sd3", "flux", "pixart-sigma", "sit")
KIND_NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in QUICK)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        yield


def patched(name: str) -> Any:
    pipe = KINDS[name].build()
    attngen.apply(pipe, PLAN, seed=5)
    return pipe


def digest(name: str) -> str:
    return hashlib.sha256(KINDS[name](patched(name)).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", KIND_NAMES)
def test_whatever_ran_before(name):
    """A, B, A: B is another seed, batch and state of the global generators."""
    pipe, kind = patched(name), KINDS[name]
    first = kind(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = kind(pipe, batch=2, seed=9)
        assert not torch.equal(other[:1], first)
        assert torch.equal(kind(pipe), first)
    assert torch.equal(kind(patched(name)), first)


def sliced(arguments: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """The arguments of one picture of a batch."""
    return {
        name: value[index : index + 1] if isinstance(value, (list, torch.Tensor)) and len(value) == count else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("name", KIND_NAMES)
def test_a_picture_does_not_depend_on_its_batch(name):
    """Three pictures with prompts, start pictures and seeds of their own, together and alone."""
    pipe, kind = patched(name), KINDS[name]
    together = kind(pipe, batch=3)
    for index in range(3):
        alone = kind(pipe, batch=1, seed=index, **sliced(kind.arguments(3), index, 3))
        assert (alone[0] - together[index]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", KIND_NAMES)
def test_global_random_states_and_arguments_stay_as_they_are(name):
    pipe, kind = patched(name), KINDS[name]
    state = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    arguments = kind.arguments(2)
    kept = copy.deepcopy({k: v for k, v in arguments.items() if not hasattr(v, "getpixel")})
    kind(pipe, batch=2, **arguments)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (numpy.random.get_state()[1] == state[1]).all() and random.getstate() == state[2]
    for key, value in kept.items():
        assert (
            torch.equal(arguments[key], value) if torch.is_tensor(value) else arguments[key] == value or key == "image"
        )


@pytest.mark.parametrize("names", [("sd", "sit", "flux"), pytest.param(tuple(KINDS), marks=pytest.mark.slow)])
def test_other_processes_draw_the_same(names):
    """By hash, with another hash seed of Python and another state of its memory."""
    code = (
        "import torch, warnings; warnings.simplefilter('ignore');"
        f"torch.set_num_threads({torch.get_num_threads()}); torch.manual_seed(77); waste = torch.rand(12345);"
        "from tests.promises.test_determinism import digest;"
        f"torch.set_grad_enabled(False); print([digest(name) for name in {names}])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([digest(name) for name in names])
