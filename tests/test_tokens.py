"""Tokens as a grid: pooling and the tokens nearest to the centres of cells."""

import math

import pytest
import torch
import torch.nn.functional as tf
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attngen import functional as F
from attngen.tokens import made_once, nearest_positions
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_no_worse, normal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


GRIDS = [((6, 4), (3, 2)), ((4, 6), (3, 2)), ((7, 5), (3, 4)), ((15, 9), (4, 4)), ((1, 9), (1, 2)), ((8, 3), (8, 3))]
GRIDS += [((3, 4, 5), (2, 2, 3)), ((1, 4, 4), (1, 2, 2)), ((5, 1, 6), (5, 1, 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
def test_pool_tokens_equals_oracle(grid, size, dtype):
    x = normal(2, math.prod(grid), 5, dtype=dtype)
    pool = tf.adaptive_avg_pool2d if len(grid) == 2 else tf.adaptive_avg_pool3d
    plain = pool(x.mT.unflatten(2, grid), size).flatten(2).mT
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


@pytest.mark.parametrize(
    ("grid", "factor"), [((6, 8), 2), ((8, 6), 2), ((9, 7), 2), ((7, 9), 3), ((5, 3), 1), ((3, 7, 9), 3)], ids=str
)
def test_downsample_tokens_equals_oracle(grid, factor):
    x = normal(2, math.prod(grid), 5)
    kept = F.downsample_tokens(x, grid, factor)
    size = (*grid[:-2], grid[-2] // factor, grid[-1] // factor)
    assert torch.equal(kept.double(), oracles.nearest_exact(x, grid, size))
    assert torch.equal(kept, x[:, nearest_positions(grid, size)])


def test_downsample_tokens_by_frames():
    x = normal(2, 5 * 6 * 4, 3)
    kept = F.downsample_tokens(x, (5, 6, 4), 2, frames=2)
    assert torch.equal(kept.double(), oracles.nearest_exact(x, (5, 6, 4), (2, 3, 2)))
    assert torch.equal(F.downsample_tokens(x, (5, 6, 4), 1, frames=9), x.view(2, 5, 24, 3)[:, 2])


@pytest.mark.parametrize(
    ("count", "grid", "frames", "want"),
    [
        (64, (32, 32), None, (8, 8)),
        (64, (8, 8, 8), None, (4, 4, 4)),
        (256, (21, 30, 52), None, (4, 8, 8)),  # cells of about 5 x 4 x 6
        (256, (21, 30, 52), 1, (21, 3, 4)),
        (256, (21, 30, 52), 4, (6, 6, 7)),
        (16, (21, 30, 52), 1, (16, 1, 1)),  # no more than asked for
        (7, (1, 10, 10), None, (1, 2, 3)),
    ],
)
def test_cells_of_a_video(count, grid, frames, want):
    assert F.agent_grid(count, grid, frames) == want


@pytest.mark.parametrize("count", [1, 2, 5, 16, 100, 4096])
def test_cells_of_a_video_are_near_cubes(count):
    for grid in ((21, 30, 52), (2, 3, 40), (13, 5, 5), (4, 64, 64)):
        cells = F.agent_grid(count, grid)
        sides = [length / number for length, number in zip(grid, cells, strict=True)]
        assert 1 <= torch.tensor(cells).prod() <= count and all(map(int.__le__, cells, grid))
        assert max(sides) / min(sides) <= 2 or 1 in cells or cells == grid or max(cells) in grid


def test_index_tensors_are_made_once_but_not_of_fake_tensors():
    made = []

    @made_once
    def build(*sizes):
        made.append(sizes)
        return (torch.arange(*sizes),)

    device = torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(build(3, device=device)[0], FakeTensor)
    with torch.inference_mode():
        (first,) = build(3, device=device)
    assert build(3, device=device)[0] is first and not first.is_inference()
    build(4, device=device)
    assert made == [(3,), (3,), (4,)]
