"""Focal attention against its definition, and its properties."""

import math
import re

import pytest
import torch
import torch.nn.functional as tf

from attngen import FocalAttention
from attngen import functional as F
from attngen.methods.focal import _Regions
from tests import oracles
from tests.compare import DTYPES, assert_close, normal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


FOCAL = [
    # grid, window, margin, cells
    ((8, 8), 4, 1, 4),
    ((5, 7), 3, 1, 6),  # neither windows nor cells divide the grid
    ((7, 4), 2, 0, 1),
    ((3, 11), 4, 2, 9),
    ((1, 9), 2, 1, 3),
    ((6, 6), 1, 0, 36),
    ((4, 4, 5), 2, 1, 6),
    ((3, 1, 6), 2, 1, 4),
]


@pytest.mark.parametrize(("grid", "window", "margin", "cells"), FOCAL)
@pytest.mark.parametrize("text", [0, 3])
def test_focal_attention_equals_oracle(grid, window, margin, cells, text):
    tokens = math.prod(grid)
    query, key, value = (normal(2, 2, tokens, size, seed=i) for i, size in enumerate((8, 8, 5)))
    context = (normal(2, 2, text, 8, seed=5), normal(2, 2, text, 5, seed=6)) if text else None
    options = {"window": window, "margin": margin, "context": context, "scale": 0.7, "frames": 2, "margin_frames": 1}
    want = oracles.focal_attention(query, key, value, grid, cells=F.agent_grid(cells, grid), **options)
    assert_close(F.focal_attention(query, key, value, grid, num_cells=cells, **options), want)
    for dtype in DTYPES[1:]:
        half = [x.to(dtype) for x in (query, key, value)]
        options["context"] = context and tuple(x.to(dtype) for x in context)
        want = oracles.focal_attention(*half, grid, cells=F.agent_grid(cells, grid), **options)
        got = F.focal_attention(*half, grid, num_cells=cells, **options)
        assert got.dtype == dtype
        assert_close(got, want, 1e-2)


def test_windows_and_cells_do_not_cross_the_edge_of_a_frame():
    """Without a margin in time, a frame of its own is what an image of its own would be, but for the cell."""
    query, key, value = (normal(1, 2, 3 * 16, 8, seed=i) for i in range(3))
    options = {"window": 2, "margin": 0, "margin_frames": 0}
    before = F.focal_attention(query, key, value, (3, 4, 4), num_cells=1, **options)
    rows = slice(16, 32)
    key[:, :, 16:32], value[:, :, 16:32] = key[:, :, 16:32].flip(2), value[:, :, 16:32].flip(2)  # means stay
    after = F.focal_attention(query, key, value, (3, 4, 4), num_cells=1, **options)
    same = torch.isclose(before, after, rtol=1e-4, atol=1e-5).all(-1)
    assert same[:, :, :16].all() and same[:, :, 32:].all() and not same[:, :, rows].any()


def test_focal_attention_of_the_whole_grid_is_softmax_attention():
    query, key, value = (normal(1, 2, 35, 8, seed=i) for i in range(3))
    want = oracles.softmax_attention(query, key, value)
    assert_close(F.focal_attention(query, key, value, (5, 7), window=7, num_cells=4), want)
    assert_close(F.focal_attention(query, key, value, (5, 7), window=1, margin=0, num_cells=35), want)
    assert_close(F.focal_attention(query, key, value, (5, 7), window=2, margin=6, num_cells=1), want)


def test_focal_attention_sums_to_one_and_is_exact_where_cells_are_uniform():
    """Far tokens that are all alike lose nothing by being averaged."""
    query, key, value = (normal(1, 1, 64, 8, seed=i) for i in range(3))
    ones = F.focal_attention(query, key, torch.ones_like(value), (8, 8), window=2, margin=1, num_cells=4)
    assert_close(ones, torch.ones_like(value))
    blocks = (torch.arange(64) // 8 // 4) * 2 + torch.arange(64) % 8 // 4
    key, value = key[:, :, :4][:, :, blocks], value[:, :, :4][:, :, blocks]
    got = F.focal_attention(query, key, value, (8, 8), window=2, margin=1, num_cells=4)
    assert_close(got, oracles.softmax_attention(query, key, value))


@pytest.mark.parametrize(("grid", "window", "margin", "cells"), FOCAL)
def test_focal_attention_by_a_backend_without_masks(grid, window, margin, cells):
    """The number of tokens of a cell is a channel of the keys there."""

    def backend(query, key, value, scale=None):
        assert query.shape[-1] % 8 == 0 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        return tf.scaled_dot_product_attention(query, key, value, scale=scale)

    tokens = math.prod(grid)
    regions = _Regions(grid, window, margin, cells)
    for dtype, size, tolerance in ((torch.float32, 8, 1e-5), (torch.float32, 5, 1e-5), (torch.bfloat16, 8, 2e-2)):
        query, key, value = (normal(2, 2, tokens, size, seed=i, dtype=dtype) for i in range(3))
        got = regions.attend(query, key, value, None, size**-0.5, backend)
        want = oracles.focal_attention(query, key, value, grid, window, margin, F.agent_grid(cells, grid))
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_count_of_a_cell_is_exact_in_half_precision(dtype):
    """One channel alone would be off by a half of a percent."""

    def backend(query, key, value, scale=None):
        counts = ((key[0, :, -4:, 8].double() + key[0, :, -4:, 9].double()) * scale).exp()
        assert (counts - counts.round()).abs().max() < 1e-3 and counts.sum(-1).round().tolist() == [55] * 9
        return tf.scaled_dot_product_attention(query, key, value, scale=scale)

    query, key, value = (normal(1, 1, 64, 8, seed=i, dtype=dtype) for i in range(3))
    _Regions((8, 8), 3, 0, 4).attend(query, key, value, None, query.shape[-1] ** -0.5, backend)


def test_focal_attention_of_a_tiny_scale_is_finite():
    """A count over the scale is more than float16 holds then."""
    query, key, value = (normal(1, 1, 64, 8, seed=i, dtype=torch.float16) for i in range(3))
    got = F.focal_attention(query, key, value, (8, 8), window=2, margin=1, num_cells=4, scale=1e-6)
    assert got.isfinite().all()


def test_gradients_of_focal_attention():
    tensors = [normal(1, 2, 12, 4, seed=i, dtype=torch.float64).requires_grad_() for i in range(3)]
    options = {"window": 2, "margin": 1, "num_cells": 2}
    assert torch.autograd.gradcheck(lambda *x: F.focal_attention(*x, (3, 4), **options), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 5)}, "12 queries and 12 keys do not fill a grid of 3 x 5 = 15"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"margin": -1}, "margin must be a whole number >= 0, got -1"),
        ({"num_cells": 0}, "num_cells must be a whole number >= 1, got 0"),
        ({"key": torch.zeros(1, 2, 12, 6)}, "key has head size 6, but query has 4"),
        ({"context": (torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3, 4))}, "key has head size 6, but query has 4"),
        ({"scale": 0.0}, "scale must not be 0"),
    ],
)
def test_focal_attention_refuses(change, message):
    given = {name: torch.zeros(1, 2, 12, 4) for name in ("query", "key", "value")} | {"grid": (3, 4)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        F.focal_attention(**given)


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        (FocalAttention(), (64, 64), None),
        (FocalAttention(), (128, 128), "cells of at most 8 tokens a side: num_cells of 256 or more"),
        (FocalAttention(num_cells=256), (128, 128), None),
        (FocalAttention(), (21, 30, 52), "cells of at most 8 tokens a side: num_cells of 84 or more"),
        (FocalAttention(num_cells=256), (21, 30, 52), None),
    ],
)
def test_cells_of_rotated_keys_are_small(method, grid, message):
    why = method.why_not_rotated(grid)
    assert why is None if message is None else message in why
