"""What means and samples of rotated queries and keys cost: the reason for how each method treats rotation."""

import pytest
import torch
import torch.nn.functional as tf

from attngen import functional as F
from attngen.tokens import nearest_positions
from tests import oracles
from tests.compare import normal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

GRID = (32, 32)
SIZE = 32


def smooth(seed, reach):
    """(1, 1, N, D) unit-variance content that is alike over about `reach` tokens."""
    image = normal(1, SIZE, *GRID, seed=seed)
    steps = torch.arange(-3 * reach, 3 * reach + 1).double()
    kernel = (-(steps**2) / (2 * reach**2)).exp().float()
    image = tf.conv2d(tf.pad(image, (3 * reach,) * 4, "circular").transpose(0, 1), kernel.outer(kernel)[None, None])
    image = 0.95 * image / image.std() + 0.3 * normal(SIZE, 1, *GRID, seed=seed + 50)
    return image.flatten(1).T[None, None]


def heads(reach, rotated):
    """Queries that look for what is like them, and not only there, by position where `rotated`."""
    shared = smooth(0, reach)
    query, key = (2 * tf.normalize(0.8 * shared + 0.6 * smooth(seed, reach), dim=-1) * SIZE**0.5 for seed in (1, 2))
    given = query, key, smooth(3, reach)
    return (*(oracles.rotate(x[0], GRID).float()[None] for x in given[:2]), given[2]) if rotated else given


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("reach", [2, 4])
def test_the_mean_of_rotated_queries_is_a_better_agent_than_the_nearest_query(reach):
    query, key, value = heads(reach, rotated=True)
    exact = tf.scaled_dot_product_attention(query, key, value)
    pooled = F.pool_tokens(query[0], GRID, (8, 8))[None]
    nearest = query[:, :, nearest_positions(GRID, (8, 8))]
    by_means, by_samples = (error(F.agent_attention(query, key, value, agents), exact) for agents in (pooled, nearest))
    assert by_means < by_samples


@pytest.mark.parametrize("reach", [2, 4])
def test_means_of_rotated_keys_do_not_hurt(reach):
    """Tiles, and cells of up to 8 x 8, cost at most twice of what they cost without rotation."""
    errors = {}
    for rotated in (False, True):
        query, key, value = heads(reach, rotated)
        exact = tf.scaled_dot_product_attention(query, key, value)
        errors[rotated] = [
            error(F.tile_attention(query, key, value, GRID), exact),
            error(F.tile_attention(query, key, value, GRID, key_tile=8), exact),
            error(F.focal_attention(query, key, value, GRID, num_cells=64), exact),
            error(F.focal_attention(query, key, value, GRID, num_cells=16), exact),
        ]
    assert all(after < 2 * before for before, after in zip(errors[False], errors[True], strict=True)), errors
