"""Every row of the zoo builds, is finite and deterministic, and treats the samples of a batch apart."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.builders.zoo import ZOO
from tests.builders.zoo.base import Tiny

_WEIGHTS = 5_000_000
_CALLS = [(name, place) for name in ZOO for place in range(2)]


@functools.cache
def model_of(name: str) -> nn.Module:
    return ZOO[name].model()


def alone(given: Any, sample: int, batch: int) -> Any:
    """Arguments of one sample out of those of a batch: tensors and lists whose first axis is the samples are cut."""
    if isinstance(given, Tensor):
        return given[sample : sample + 1] if given.ndim and len(given) == batch else given
    if isinstance(given, dict):
        return {name: alone(value, sample, batch) for name, value in given.items()}
    if isinstance(given, list):
        tensors = all(isinstance(value, Tensor) for value in given)
        if len(given) == batch and not (tensors and all(len(value) == batch for value in given)):
            return given[sample : sample + 1]
        return [alone(value, sample, batch) for value in given]
    return given


@torch.no_grad()
def predicted(tiny: Tiny, model: nn.Module, given: dict[str, Any]) -> Tensor:
    return tiny.drawn(model(**given))


@pytest.mark.parametrize("name", ZOO)
def test_models_are_small_and_reproducible(name, global_rng_untouched):
    tiny, model = ZOO[name], model_of(name)
    assert type(model).__name__ == tiny.cls and not model.training
    assert sum(weight.numel() for weight in model.parameters()) < _WEIGHTS
    again = tiny.model().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    for key, weight in model.named_parameters():
        assert weight.dtype == torch.float32 and weight.count_nonzero() == weight.numel(), key


@pytest.mark.parametrize(("name", "place"), _CALLS)
def test_samples_of_a_batch_are_those_alone(name, place, global_rng_untouched):
    tiny, model = ZOO[name], model_of(name)
    grid = tiny.grids[place]
    given = tiny.inputs(grid, 2)
    both = predicted(tiny, model, given)
    assert both.isfinite().all() and both.std() > 1e-3
    assert torch.equal(both, predicted(tiny, model, tiny.inputs(grid, 2))), "a second call differs"
    one, other = both.view(2, -1)
    assert not torch.allclose(one, other), "the samples are the same"
    for sample, wanted in enumerate((one, other)):
        got = predicted(tiny, model, alone(given, sample, 2))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "place"), _CALLS)
def test_one_sample_changes_with_its_corners(name, place):
    tiny, model = ZOO[name], model_of(name)
    grid = tiny.grids[place]
    given = tiny.inputs(grid, 1)
    before = predicted(tiny, model, given)
    assert before.isfinite().all()
    for last in (False, True):
        changed = {**given, tiny.latents: tiny.corner(given[tiny.latents], grid, last)}
        assert not torch.equal(before, predicted(tiny, model, changed))


@pytest.mark.parametrize("name", ZOO)
def test_grids(name):
    first, second = ZOO[name].grids
    assert first != second
    for frames, height, width in (first, second):
        assert frames * height * width >= 24
