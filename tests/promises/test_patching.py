"""Promises 1, 2, 6, 12, 13: every pipeline class, every method, everything people do to a pipeline.

A share of the matrix runs always: every class patched and restored, and each action on one class. The whole of it takes
about an hour: `python -m pytest -m slow tests/promises/test_patching.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.promises.matrix import ACTIONS, Case
from tests.promises.pipelines import KINDS, METHODS

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


def test_the_share_reaches_every_class_method_and_action():
    assert {kind for kind, _, _ in share()} == set(KINDS)
    assert {method for _, method, _ in share()} == set(METHODS)
    assert {action for _, _, action in share()} == {*QUICK, "apply_and_remove"}
