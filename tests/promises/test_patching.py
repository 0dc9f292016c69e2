"""Promises 1, 2, 6, 12, 13: every pipeline class, every method, everything people do to a pipeline.

A share of the matrix runs always: every class patched and restored, and each action on one class. The whole of it takes
an hour and a half of one core, two thirds of it compiling: `python -m pytest -m slow tests/promises/test_patching.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch

import attngen
from attngen.layers.call import Call
from tests.builders.hosts import fresh, normal, self_attention
from tests.builders.pipelines import KINDS, METHODS
from tests.promises.matrix import ACTIONS, Case

QUICK = [name for name in ACTIONS if name not in ("apply_and_remove", "compiled_before_and_after")]
SMALL = ("sit", "flux", "sd", "dit", "sd3-inpaint", "pixart-alpha", "sd-inpaint")
# Compilation takes seconds a graph, so it is tried with one method of one stage and one plan.
COMPILED = ("agents", "stages")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng():
        yield


def share() -> list[tuple[str, str, str]]:
    """(class, method, action)."""
    methods = list(METHODS)
    patched = [(kind, methods[i % len(methods)], "apply_and_remove") for i, kind in enumerate(KINDS)]
    return patched + [(SMALL[i % len(SMALL)], methods[i % len(methods)], action) for i, action in enumerate(QUICK)]


@pytest.mark.parametrize(("kind", "method", "action"), share())
def test_a_share_of_the_matrix(kind, method, action, tmp_path):
    ACTIONS[action](Case(kind, method, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_the_whole_matrix(kind, action, tmp_path):
    for method in METHODS if action != "compiled_before_and_after" else COMPILED:
        ACTIONS[action](Case(kind, method, tmp_path / method))


def test_what_a_layer_does_around_its_attention_stays():
    """Norm, residual and scale of the output, where our processor runs for the sake of an attention backend."""
    model = fresh("sd15")
    layer = next(iter(self_attention(model).values()))
    width = layer.to_q.in_features
    layer.group_norm = torch.nn.GroupNorm(2, width)
    layer.group_norm.weight.copy_(normal(width, seed=1))
    layer.residual_connection, layer.rescale_output_factor = True, 2.0
    x = normal(2, 256, width)
    stock = layer(x)
    attngen.apply(model, METHODS["agents"])
    with diffusers.attention_backend("_native_math"):
        got = layer(x)
    assert (got - stock).abs().max() <= 1e-5


def test_a_mask_of_attention_is_obeyed_in_a_call_of_the_model():
    """No method knows masks, so a layer that is given one is exact, although its method could run."""
    model = fresh("sd15")
    layer = next(iter(self_attention(model).values()))
    x, mask = normal(2, 256, layer.to_q.in_features), 3 * normal(2, 256, 256, seed=1)
    stock, unmasked = layer(x, attention_mask=mask), layer(x)
    attngen.apply(model, METHODS["agents"])
    info = Call("0", (16, 16))
    assert not torch.equal(layer(x, attngen=info), unmasked)
    assert torch.equal(layer(x, attention_mask=mask, attngen=info), stock)


def test_the_share_reaches_every_class_method_and_action():
    assert {kind for kind, _, _ in share()} == set(KINDS)
    assert {method for _, method, _ in share()} == set(METHODS)
    assert {action for _, _, action in share()} == {*QUICK, "apply_and_remove"}
