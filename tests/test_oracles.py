"""The oracles themselves, against published reference outputs and PyTorch."""

import pytest
import torch
import torch.nn.functional as tf

from tests import oracles
from tests.compare import assert_close, normal
from tests.golden_cases import golden_cases, state

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize("case", golden_cases("mlla_linear_*"), ids=lambda case: case[0])
def test_golden_mlla_linear(case):
    """The oracle only: rotations in the numerator alone are beyond `linear_attention`."""
    _, tensors, arguments = case
    grid = (arguments["size"], arguments["size"])
    out = oracles.mlla_linear_layer(tensors["x"], state(tensors), arguments["heads"], grid)
    assert_close(out, tensors["out"], 2e-6)


@pytest.mark.parametrize("case", golden_cases("switch_*"), ids=lambda case: case[0])
def test_golden_switch(case):
    """The oracle only: the schedule itself is tested with the schedules."""
    _, tensors, arguments = case
    ratios = (arguments["switch_ratio1"], arguments["switch_ratio2"])
    levels = oracles.change_switch(tensors["latents"], arguments["first_several_num"], ratios, arguments["distance"])
    assert levels == tensors["level"].tolist()


def test_oracle_downsampling_is_nearest_exact():
    for grid, size in (((6, 4), (3, 2)), ((9, 5), (4, 2)), ((7, 7), (3, 3))):
        x = normal(2, grid[0] * grid[1], 3)
        want = tf.interpolate(x.mT.unflatten(2, grid), size=size, mode="nearest-exact").flatten(2).mT
        assert torch.equal(oracles.nearest_exact(x, grid, size), want)
    query, key, value = (normal(1, 2, 35, 4, seed=seed) for seed in range(3))
    kept = torch.arange(35).view(5, 7)[1::2, 1::2][:2, :3].flatten()  # 5 x 7 by 2: rows 1, 3 and columns 1, 3, 5
    want = oracles.softmax_attention(query, key[:, :, kept], value[:, :, kept])
    assert torch.equal(oracles.downsampled_attention(query, key, value, (5, 7), 2), want)


def test_oracles_agree_with_torch():
    """Where PyTorch has the operation itself, the loops must give its numbers."""
    query, key, value, bias = (
        normal(2, 3, 7, 4),
        normal(2, 3, 5, 4, seed=1),
        normal(2, 3, 5, 6, seed=2),
        normal(3, 7, 5),
    )
    want = tf.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(2, 3, 7, 5))
    assert_close(oracles.softmax_attention(query, key, value, bias=bias), want, 1e-6)
    for grid, size in (((6, 4), (3, 2)), ((7, 5), (3, 4)), ((1, 9), (1, 2))):
        x = normal(2, grid[0] * grid[1], 3)
        want = tf.adaptive_avg_pool2d(x.mT.unflatten(2, grid), size).flatten(2).mT
        assert_close(oracles.pool_tokens(x, grid, size), want, 1e-6)
