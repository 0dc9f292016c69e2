"""Rows of the zoo whose calls cannot be cut into samples: caches, frames in the axis of samples, samples that mix."""

import pytest
import torch

from tests.builders.zoo import APART, ZOO

_ALONE = {"Cosmos3OmniTransformer"}  # takes one sample a call
_MIXED = {"ControlNetUnionModel", "MultiControlNetUnionModel"}  # a sample changes with the others of its batch
_ROUGH = {"Kandinsky5Transformer3DModel", "SanaWMTransformer3DModel"}  # round to bfloat16 whatever the weights are


def test_names():
    assert not ZOO.keys() & APART.keys()
    assert _ALONE | _MIXED | _ROUGH <= APART.keys()


@torch.no_grad()
@pytest.mark.parametrize("name", APART)
def test_rows_are_small_finite_and_reproducible(name, global_rng_untouched):
    tiny = APART[name]
    model = tiny.model()
    assert type(model).__name__ == tiny.cls and not model.training
    assert sum(weight.numel() for weight in model.parameters()) < 3_000_000
    again = tiny.model().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    for grid in tiny.grids:
        one = tiny.drawn(model(**tiny.inputs(grid, 1)))
        assert one.isfinite().all() and one.std() > 1e-3
        for last in (False, True):
            given = tiny.inputs(grid, 1)
            given[tiny.latents] = tiny.corner(given[tiny.latents], grid, last)
            assert not torch.equal(one, tiny.drawn(model(**given)))
        both = tiny.drawn(model(**tiny.inputs(grid, 2)))
        assert torch.equal(both, tiny.drawn(model(**tiny.inputs(grid, 2)))), "a second call differs"
        if name in _ALONE:
            assert torch.equal(both, one)
            continue
        first, second = both.view(2, -1)
        assert not torch.allclose(first, second), "the samples are the same"
        if name not in _MIXED:
            tolerance = 1e-2 if name in _ROUGH else 1e-4
            torch.testing.assert_close(first, one, rtol=tolerance, atol=tolerance)
