"""Tokens as a grid: pooling and the tokens nearest to the centres of cells."""

import pytest
import torch
import torch.nn.functional as tf

from attngen import functional as F
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_no_worse, normal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


GRIDS = [((6, 4), (3, 2)), ((4, 6), (3, 2)), ((7, 5), (3, 4)), ((15, 9), (4, 4)), ((1, 9), (1, 2)), ((8, 3), (8, 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
def test_pool_tokens_equals_oracle(grid, size, dtype):
    x = normal(2, grid[0] * grid[1], 5, dtype=dtype)
    plain = tf.adaptive_avg_pool2d(x.mT.unflatten(2, grid), size).flatten(2).mT
    assert_no_worse(F.pool_tokens(x, grid, size), plain, oracles.pool_tokens(x, grid, size))


def test_pool_tokens_keeps_every_axis_in_place():
    """Distinct values for each batch entry, row, column and channel: a transposed grid or a mixed-up axis shows."""
    batch, row, column, channel = torch.meshgrid(*(torch.arange(n) for n in (2, 6, 8, 3)), indexing="ij")
    x = (1000 * batch + 100 * row + 10 * column + channel).double()
    pooled = F.pool_tokens(x.flatten(1, 2), (6, 8), (3, 2)).view(2, 3, 2, 3)
    batch, row, column, channel = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 2, 3)), indexing="ij")
    assert torch.equal(pooled, 1000 * batch + 100 * (2 * row + 0.5) + 10 * (4 * column + 1.5) + channel.double())


def test_pool_tokens_commutes_with_a_projection():
    x, weight, bias = normal(2, 24, 8), normal(6, 8, seed=1), normal(6, seed=2)
    pooled = F.pool_tokens(tf.linear(x, weight, bias), (4, 6), (2, 2))
    assert_close(tf.linear(F.pool_tokens(x, (4, 6), (2, 2)), weight, bias), pooled, 2e-6)


@pytest.mark.parametrize(("grid", "factor"), [((6, 8), 2), ((8, 6), 2), ((9, 7), 2), ((7, 9), 3), ((5, 3), 1)], ids=str)
def test_downsample_tokens_equals_oracle(grid, factor):
    x = normal(2, grid[0] * grid[1], 5)
    kept = F.downsample_tokens(x, grid, factor)
    assert torch.equal(kept.double(), oracles.nearest_exact(x, grid, (grid[0] // factor, grid[1] // factor)))
