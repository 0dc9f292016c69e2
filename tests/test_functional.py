"""The pure functions against their definitions, published reference outputs, and the properties they must have."""

import math
import re

import pytest
import torch
import torch.nn.functional as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen import functional as F
from tests import oracles
from tests.golden_cases import golden_cases, state

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURE_MAPS = ["elu", "relu", "focused", "identity"]

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def normal(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers that leave the global random state alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads_of(tokens, heads):
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def tokens_of(x):
    return x.transpose(1, 2).flatten(2)


def max_error(got, want):
    assert got.shape == want.shape, (tuple(got.shape), tuple(want.shape))
    return (got.double() - want.double()).abs().max().item()


def assert_close(got, want, tolerance=1e-5):
    """The greatest error is at most `tolerance`, relative to the greatest wanted magnitude where that is above 1."""
    error = max_error(got, want) / max(1.0, want.double().abs().max().item())
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


def assert_no_worse(got, plain, oracle):
    """The error is at most twice that of the plain expression in the same dtype, and half a rounding of the result."""
    assert got.dtype == plain.dtype
    floor = torch.finfo(got.dtype).eps / 2 * oracle.abs().max().item()
    error, plain_error = max_error(got, oracle), max_error(plain, oracle)
    assert error <= 2 * plain_error + floor, f"{error:.2e}, but the plain expression has {plain_error:.2e}"


def assert_same_rows(got, want, tolerance=1e-5):
    """Each (N, C) of the batch has the wanted rows, in any order."""
    assert got.shape == want.shape
    for rows, wanted in zip(got.double(), want.double(), strict=True):
        distances = (rows[:, None] - wanted[None]).abs().amax(-1)
        assert distances.amin(1).max() <= tolerance
        assert distances.argmin(1).unique().numel() == wanted.shape[0]


def assert_matching(got, want, num_targets, tolerance=1e-5):
    """Merged tokens agree: the ones left over in their order, the targets in any."""
    assert got.shape == want.shape
    if num_targets < got.shape[1]:
        assert_close(got[:, :-num_targets], want[:, :-num_targets], tolerance)
    assert_same_rows(got[:, -num_targets:], want[:, -num_targets:], tolerance)


def names(*sizes):
    """A pattern for a message with all these sizes in it, in any order."""
    return re.compile("".join(rf"(?=.*\b{size}\b)" for size in sizes), re.DOTALL)


# What the reference implementations computed. The oracles have to pass too, or they say nothing about the rest.


@pytest.mark.parametrize("case", golden_cases("agentsd_attention_*"), ids=lambda case: case[0])
def test_golden_agentsd_attention(case):
    _, tensors, arguments = case
    weights, heads, dim = state(tensors), arguments["heads"], arguments["head_dim"]
    query, key, value = (heads_of(tensors["x"] @ weights[f"to_{name}.weight"].T, heads) for name in "qkv")
    agents = heads_of(tensors["agent"] @ weights["to_q.weight"].T, heads)
    broadcast_scale = (dim**-0.5) ** arguments["k_scale2"]
    out = F.agent_attention(
        query, key, value, agents, broadcast_scale=broadcast_scale, shortcut=arguments["k_shortcut"]
    )
    assert_close(tokens_of(out) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"], tensors["out"])
    oracle = oracles.agentsd_layer(
        tensors["x"], tensors["agent"], weights, heads, arguments["k_scale2"], arguments["k_shortcut"]
    )
    assert_close(oracle, tensors["out"], 2e-6)


@pytest.mark.parametrize("case", golden_cases("agentsd_merge_*"), ids=lambda case: case[0])
def test_golden_agentsd_merge(case):
    _, tensors, arguments = case
    x, grid, stride = tensors["x"], (arguments["height"], arguments["width"]), (arguments["sy"], arguments["sx"])
    ratio, agent_ratio = arguments["ratio"], arguments["agent_ratio"]
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    merged, agents = matching.merge(x), matching.agents(x)
    num_targets = (grid[0] // stride[0]) * (grid[1] // stride[1])
    # The reference lists targets in the order of an unstable sort, which differs between processors.
    assert_matching(merged, tensors["merged"], num_targets)
    assert_matching(agents, tensors["agents"], num_targets)
    assert_close(matching.unmerge(merged), tensors["unmerged"])
    oracle, agent_oracle = (oracles.Matching(x, grid, stride, r) for r in (ratio, agent_ratio))
    assert_matching(oracle.merge(x), tensors["merged"], num_targets, 2e-6)
    assert_matching(agent_oracle.merge(x), tensors["agents"], num_targets, 2e-6)
    assert_close(oracle.unmerge(oracle.merge(x)), tensors["unmerged"], 2e-6)


@pytest.mark.parametrize("case", golden_cases("mediator_attention_*"), ids=lambda case: case[0])
def test_golden_mediator_attention(case):
    _, tensors, arguments = case
    weights, heads, mediators = state(tensors), arguments["heads"], arguments["mediators"]
    grid, side = (arguments["size"], arguments["size"]), math.isqrt(arguments["mediators"])
    query, key, value = (tensors["x"] @ weights["qkv.weight"].T + weights["qkv.bias"]).chunk(3, -1)
    agents = F.pool_tokens(query, grid, (side, side))

    def on_grid(table):
        return tf.interpolate(table, size=grid, mode="bilinear").flatten(2)[None]

    out = F.agent_attention(
        *(heads_of(x, heads) for x in (query, key, value, agents)),
        aggregation_bias=on_grid(weights["an_bias"]) + (weights["ah_bias"] + weights["aw_bias"]).flatten(3),
        broadcast_bias=on_grid(weights["na_bias"]).mT + (weights["ha_bias"] + weights["wa_bias"]).flatten(2, 3),
    )
    image = value.mT.unflatten(2, grid)
    conv = tf.conv2d(image, weights["dwc.weight"], weights["dwc.bias"], padding=1, groups=image.shape[1])
    out = tokens_of(out) + conv.flatten(2).mT
    assert_close(out @ weights["proj.weight"].T + weights["proj.bias"], tensors["out"])
    assert_close(oracles.mediator_layer(tensors["x"], weights, heads, grid, mediators), tensors["out"], 2e-6)


@pytest.mark.parametrize("case", golden_cases("focused_linear_*"), ids=lambda case: case[0])
def test_golden_focused_linear(case):
    _, tensors, arguments = case
    weights, heads, factor = state(tensors), arguments["heads"], arguments["focusing_factor"]
    grid = (arguments["size"], arguments["size"])
    query, key, value = (tensors["x"] @ weights["qkv.weight"].T + weights["qkv.bias"]).chunk(3, -1)
    key, scale = key + weights["positional_encoding"], tf.softplus(weights["scale"])
    query, key = (F.focused_feature_map((x.relu() + 1e-6) / scale, factor) for x in (query, key))
    query, key, value = (heads_of(x, heads) for x in (query, key, value))
    out = F.linear_attention(query, key, value, feature_map="identity")
    image = value.flatten(0, 1).mT.unflatten(2, grid)
    conv = tf.conv2d(image, weights["dwc.weight"], weights["dwc.bias"], padding=2, groups=image.shape[1])
    out = tokens_of(out + conv.flatten(2).mT.unflatten(0, (-1, heads)))
    assert_close(out @ weights["proj.weight"].T + weights["proj.bias"], tensors["out"])
    assert_close(oracles.focused_linear_layer(tensors["x"], weights, heads, grid, factor), tensors["out"], 2e-6)


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


# Against the definitions in float64


def agent_inputs(dtype, biases=True, **shape):
    """query, key, value, agents and two biases that are exact in `dtype`."""
    sizes = {"b": 2, "h": 3, "n": 70, "l": 70, "m": 6, "d": 16} | shape
    b, h, n, l, m, d = (sizes[name] for name in "bhnlmd")  # noqa: E741
    shapes = [(b, h, n, d), (b, h, l, d), (b, h, l, d), (b, h, m, d)] + [(b, h, m, l), (b, h, n, m)] * biases
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def plain_agent_attention(
    query, key, value, agents, aggregation_bias=0, broadcast_bias=0, scale=None, broadcast_scale=None, shortcut=0.0
):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    broadcast_scale = scale if broadcast_scale is None else broadcast_scale
    gathered = (agents @ key.mT * scale + aggregation_bias).softmax(-1) @ value
    return (query @ agents.mT * broadcast_scale + broadcast_bias).softmax(-1) @ gathered + shortcut * value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.4}, {"broadcast_scale": 0.9}, {"scale": 0.1, "broadcast_scale": 1.0, "shortcut": 0.075}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_agent_attention_equals_oracle(dtype, biases, options):
    query, key, value, agents, *bias = agent_inputs(dtype, biases)
    named = dict(zip(("aggregation_bias", "broadcast_bias"), bias, strict=False))
    assert_no_worse(
        F.agent_attention(query, key, value, agents, **named, **options),
        plain_agent_attention(query, key, value, agents, **named, **options),
        oracles.agent_attention(query, key, value, agents, **named, **options),
    )


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
def test_agent_attention_biases_broadcast(lead):
    query, key, value, agents = agent_inputs(torch.float32, biases=False, n=20, l=11, m=4)
    for rows, columns in (((4, 11), (20, 4)), ((1, 11), (20, 1)), ((4, 1), (1, 4))):
        biases = {"aggregation_bias": normal(*lead, *rows), "broadcast_bias": normal(*lead, *columns, seed=1)}
        out = F.agent_attention(query, key, value, agents, **biases)
        assert_close(out, oracles.agent_attention(query, key, value, agents, **biases), 2e-6)


def test_agent_attention_each_bias_alone():
    query, key, value, agents, aggregation_bias, broadcast_bias = agent_inputs(torch.float32, n=20, l=11, m=4)
    for bias in ({"aggregation_bias": aggregation_bias}, {"broadcast_bias": broadcast_bias}):
        out = F.agent_attention(query, key, value, agents, **bias)
        assert_close(out, oracles.agent_attention(query, key, value, agents, **bias), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agent_attention_gain_and_correction_equal_oracle(dtype):
    query, key, value, agents = agent_inputs(dtype, biases=False)
    for options in ({"gain": 0.6}, {"correction": "nystrom", "broadcast_scale": 0.8, "gain": 1.2, "shortcut": 0.1}):
        out = F.agent_attention(query, key, value, agents, **options)
        assert out.dtype == dtype
        assert_close(out, oracles.agent_attention(query, key, value, agents, **options), 8 * torch.finfo(dtype).eps)


def test_a_corrected_agent_gets_what_it_read():
    """With queries that are the agents, far apart, and keys that are too, the result is exact attention's."""
    query = 6 * tf.normalize(normal(1, 2, 8, 16, dtype=torch.float64), dim=-1)
    key, value = normal(1, 2, 30, 16, seed=1, dtype=torch.float64), normal(1, 2, 30, 4, seed=2, dtype=torch.float64)
    exact = tf.scaled_dot_product_attention(query, key, value)
    errors = [
        (F.agent_attention(query, key, value, query, correction=correction) - exact).norm() / exact.norm()
        for correction in (None, "nystrom")
    ]
    assert errors[1] < errors[0] / 3


def test_the_correction_bears_equal_agents():
    query, key, value, agents = agent_inputs(torch.float32, biases=False)
    out = F.agent_attention(query, key, value, agents[:, :, :1].expand(-1, -1, 5, -1), correction="nystrom")
    want = F.agent_attention(query, key, value, agents[:, :, :1])
    assert_close(out, want, 1e-4)


def test_agent_attention_refuses_what_a_correction_cannot_do():
    query, key, value, agents, aggregation_bias, _ = agent_inputs(torch.float32)
    with pytest.raises(ValueError, match="'pinv'.*nystrom"):
        F.agent_attention(query, key, value, agents, correction="pinv")
    with pytest.raises(ValueError, match="biases"):
        F.agent_attention(query, key, value, agents, aggregation_bias=aggregation_bias, correction="nystrom")
    with pytest.raises(ValueError, match="cannot run here"):
        F.agent_attention(query, key, value, agents, correction="nystrom", kernel="triton")


def test_agent_attention_infinite_bias_hides_keys():
    query, key, value, agents = agent_inputs(torch.float32, biases=False, n=20, l=11, m=4)
    hidden = torch.zeros(4, 11).masked_fill(torch.arange(11) >= 7, -torch.inf)
    out = F.agent_attention(query, key, value, agents, aggregation_bias=hidden)
    assert_close(out, F.agent_attention(query, key[:, :, :7], value[:, :, :7], agents), 2e-6)


def plain_focused(x, factor=3):
    powers = x**factor
    return x.norm(dim=-1, keepdim=True) * powers / powers.norm(dim=-1, keepdim=True)


PLAIN_MAPS = {
    "elu": lambda x: tf.elu(x) + 1,
    "relu": torch.relu,
    "focused": lambda x: plain_focused(torch.relu(x) + 1e-6),
    "identity": lambda x: x,
}


def plain_linear_attention(query, key, value, feature_map="elu", eps=1e-6):
    phi = PLAIN_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    query, key = phi(query), phi(key)
    normaliser = query @ key.mean(-2, keepdim=True).mT + eps
    return query @ (key.mT @ value / key.shape[-2]) / normaliser


def linear_inputs(dtype, feature_map, b=2, h=3, n=50, l=70, d=16, e=16):  # noqa: E741
    shapes = [(b, h, n, d), (b, h, l, d), (b, h, l, e)]
    query, key, value = (normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    if feature_map == "identity":  # whoever passes features of their own has made them positive
        query, key = query.abs(), key.abs()
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, torch.exp], ids=lambda phi: getattr(phi, "__name__", phi))
def test_linear_attention_equals_oracle(dtype, feature_map):
    query, key, value = linear_inputs(dtype, feature_map)
    assert_no_worse(
        F.linear_attention(query, key, value, feature_map=feature_map),
        plain_linear_attention(query, key, value, feature_map),
        oracles.linear_attention(query, key, value, feature_map),
    )


def test_linear_attention_defaults_and_eps():
    query, key, value = linear_inputs(torch.float32, "elu")
    assert torch.equal(F.linear_attention(query, key, value), F.linear_attention(query, key, value, feature_map="elu"))
    for eps in (1e-6, 0.5):  # added to the mean over the keys, not to the sum
        out = F.linear_attention(query, key, value, eps=eps)
        assert_close(out, oracles.linear_attention(query, key, value, eps=eps), 2e-6)


def test_linear_attention_is_the_same_for_each_key_twice():
    """The mean of features, not their sum, meets eps."""
    query, key, value = linear_inputs(torch.float64, "relu")
    twice = F.linear_attention(query, key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1), feature_map="relu", eps=1.0)
    assert_close(twice, F.linear_attention(query, key, value, feature_map="relu", eps=1.0), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3, 2.5])
def test_focused_feature_map_equals_oracle(dtype, factor):
    x = normal(2, 3, 20, 16, dtype=dtype).abs()
    out, oracle = F.focused_feature_map(x, factor), oracles.focused_feature_map(x, factor)
    assert_no_worse(out, plain_focused(x, factor), oracle)
    if factor == 3:
        assert torch.equal(out, F.focused_feature_map(x))
    assert_close(out.double().norm(dim=-1), x.double().norm(dim=-1), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 41.0, 3000.0])
def test_focused_feature_map_is_finite(dtype, magnitude):
    """41 cubed is beyond float16, and the square of 1e-7 below float32's cube; the result is neither."""
    x = (normal(4, 8, 32).abs() * magnitude).to(dtype)
    out = F.focused_feature_map(x)
    assert out.dtype == dtype and out.isfinite().all()
    oracle = oracles.focused_feature_map(x)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert max_error(out, oracle) <= 4 * torch.finfo(dtype).eps * oracle.abs().max().item() + smallest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focused_feature_map_of_zero_is_zero(dtype):
    x = normal(3, 8, dtype=dtype).abs()
    x[1] = 0
    out = F.focused_feature_map(x)
    assert out[1].eq(0).all() and out.isfinite().all() and out[0].gt(0).all()


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


# Properties


@pytest.mark.parametrize("shortcut", [0.0, 0.075])
def test_agent_attention_returns_constant_values(shortcut):
    query, key, _, agents, *biases = agent_inputs(torch.float32)
    value = normal(2, 3, 1, 16).expand(2, 3, 70, 16)
    out = F.agent_attention(
        query, key, value, agents, aggregation_bias=biases[0], broadcast_bias=biases[1], shortcut=shortcut
    )
    assert_close(out, (1 + shortcut) * value, 2e-6)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_returns_constant_values(feature_map):
    query, key, _ = linear_inputs(torch.float32, feature_map)
    value = normal(2, 3, 1, 16).expand(2, 3, 70, 16)
    out = F.linear_attention(query, key, value, feature_map=feature_map)
    assert_close(out, value[:, :, :50], 1e-5)


def test_agent_attention_weights():
    """The identity as values gives the weights: not negative, rows of sum 1, of rank at most M, whatever M is."""
    for num_agents in (1, 3, 8):
        query, key, agents = (normal(1, 1, n, 8, seed=n, dtype=torch.float64) for n in (20, 8, num_agents))
        weights = F.agent_attention(query, key, torch.eye(8, dtype=torch.float64)[None, None], agents)[0, 0]
        assert weights.min() >= 0
        assert_close(weights.sum(-1), torch.ones(20), 1e-12)
        assert torch.linalg.matrix_rank(weights, rtol=1e-9) <= num_agents
        if num_agents == 1:
            assert_close(weights, weights[:1].expand(20, 8), 1e-12)


def test_order_of_keys_does_not_matter():
    query, key, value, agents, aggregation_bias, broadcast_bias = agent_inputs(torch.float64, l=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = key[:, :, order], value[:, :, order]
    assert_close(
        F.agent_attention(
            query, *shuffled, agents, aggregation_bias=aggregation_bias[..., order], broadcast_bias=broadcast_bias
        ),
        F.agent_attention(query, key, value, agents, aggregation_bias=aggregation_bias, broadcast_bias=broadcast_bias),
        1e-12,
    )
    for phi in FEATURE_MAPS:
        query, key, value = linear_inputs(torch.float64, phi, l=40)
        shuffled = key[:, :, order], value[:, :, order]
        out = F.linear_attention(query, *shuffled, feature_map=phi)
        assert_close(out, F.linear_attention(query, key, value, feature_map=phi), 1e-12)


def test_order_of_agents_does_not_matter():
    query, key, value, agents, aggregation_bias, broadcast_bias = agent_inputs(torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    out = F.agent_attention(
        query,
        key,
        value,
        agents[:, :, order],
        aggregation_bias=aggregation_bias[:, :, order],
        broadcast_bias=broadcast_bias[..., order],
    )
    want = F.agent_attention(
        query, key, value, agents, aggregation_bias=aggregation_bias, broadcast_bias=broadcast_bias
    )
    assert_close(out, want, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_heads_do_not_mix(dtype):
    """Changing one head of one batch entry leaves all others bit-identical, and changes that one."""
    inputs = agent_inputs(dtype)
    cases = [
        (lambda q, k, v, a, ab, bb: F.agent_attention(q, k, v, a, aggregation_bias=ab, broadcast_bias=bb), inputs),
        (lambda q, k, v, a: F.agent_attention(q, k, v, a, shortcut=0.1), inputs[:4]),
        *((lambda q, k, v, phi=phi: F.linear_attention(q, k, v, feature_map=phi), inputs[:3]) for phi in FEATURE_MAPS),
    ]
    for function, tensors in cases:
        before = function(*tensors)
        changed = [tensor.clone() for tensor in tensors]
        for tensor in changed:
            tensor[1, 2] = tensor[1, 2].flip(-1) + 1
        after = function(*changed)
        same = (after == before).flatten(2).all(-1)
        assert same.tolist() == [[True, True, True], [True, True, False]]


def test_batch_entries_do_not_mix_in_pooling_and_matching():
    x = normal(3, 24, 8)
    changed = x.clone()
    changed[1] = changed[1].flip(0)

    def all_of(x):
        matching = F.match_tokens(x, (4, 6), (2, 2), 0.25, 0.7)
        merged = matching.merge(x)
        return F.pool_tokens(x, (4, 6), (2, 2)), merged, matching.agents(x), matching.unmerge(merged)

    for before, after in zip(all_of(x), all_of(changed), strict=True):
        assert (before == after).flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype):
    """Heads split off by a transpose, as layers make them, give what contiguous tensors give."""
    query, key, value, agents, *biases = agent_inputs(dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, agents)]
    assert not strided[0].is_contiguous()
    bound = 4 * torch.finfo(dtype).eps
    assert_close(F.agent_attention(*strided), F.agent_attention(query, key, value, agents), bound)
    assert_close(F.linear_attention(*strided[:3]), F.linear_attention(query, key, value), bound)


def test_number_of_keys_and_value_size_are_free():
    query, key, value, agents = normal(2, 3, 9, 8), normal(2, 3, 13, 8), normal(2, 3, 13, 5), normal(2, 3, 4, 8, seed=1)
    out = F.agent_attention(query, key, value, agents)
    assert_close(out, oracles.agent_attention(query, key, value, agents), 2e-6)
    out = F.linear_attention(query, key, value)
    assert_close(out, oracles.linear_attention(query, key, value), 2e-6)


# Gradients


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biased"])
def test_agent_attention_gradcheck(biases):
    inputs = [x.requires_grad_() for x in agent_inputs(torch.float64, biases, b=1, h=2, n=4, l=4, m=2, d=3)]

    def function(query, key, value, agents, aggregation_bias=None, broadcast_bias=None):
        return F.agent_attention(
            query,
            key,
            value,
            agents,
            broadcast_scale=0.9,
            aggregation_bias=aggregation_bias,
            broadcast_bias=broadcast_bias,
            shortcut=0.1,
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_gradcheck(feature_map):
    inputs = [x.requires_grad_() for x in linear_inputs(torch.float64, feature_map, b=1, h=2, n=4, l=5, d=3, e=2)]
    assert torch.autograd.gradcheck(lambda *x: F.linear_attention(*x, feature_map=feature_map), inputs)


def test_token_functions_gradcheck():
    x = normal(2, 15, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.pool_tokens(x, (5, 3), (2, 2)), [x])
    assert torch.autograd.gradcheck(lambda x: F.focused_feature_map(x.abs()), [x])
    matching = F.match_tokens(x, (5, 3), (2, 2), 0.3, 0.7)
    assert torch.autograd.gradcheck(matching.merge, [x])
    assert torch.autograd.gradcheck(matching.agents, [x])
    assert torch.autograd.gradcheck(lambda x: matching.unmerge(matching.merge(x)), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["agent", "biased", *FEATURE_MAPS])
def test_gradients_are_no_worse_than_plain(dtype, name):
    if name in ("agent", "biased"):
        inputs = agent_inputs(dtype, biases=name == "biased", n=40, l=40)
        plain = plain_agent_attention

        def function(query, key, value, agents, *biases):
            named = dict(zip(("aggregation_bias", "broadcast_bias"), biases, strict=False))
            return F.agent_attention(query, key, value, agents, **named)
    else:
        inputs = linear_inputs(dtype, name)
        plain = lambda *x: plain_linear_attention(*x, feature_map=name)
        function = lambda *x: F.linear_attention(*x, feature_map=name)

    def gradients(function, inputs):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*inputs)
        return torch.autograd.grad(out, inputs, normal(*out.shape, seed=9, dtype=dtype).to(out.dtype))

    exact = gradients(plain, [x.double() for x in inputs])
    for got, naive, want in zip(gradients(function, inputs), gradients(plain, inputs), exact, strict=True):
        assert_no_worse(got, naive, want)


# Extremes


def whole_numbers(*shape, bound, seed):
    """Whole numbers in [-bound, bound]: exact in every dtype, and so are sums of their products in float32."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_agent_attention_at_large_scores(dtype):
    """Scores reach 1e6, beyond float16, over 16384 tokens; the exponentials of none of them may overflow."""
    value = normal(1, 2, 16384, 64, seed=1, dtype=dtype)
    query, key, agents = (whole_numbers(1, 2, n, 64, bound=125, seed=n) for n in (16384, 16383, 16))
    key = torch.cat([key, agents[:, :, :1]], 2)
    key[:, :, 0], agents[:, :, 1] = 125, 125
    assert (agents @ key.mT).max() == 1e6
    query, key, agents = (x.to(dtype) for x in (query, key, agents))
    out = F.agent_attention(query, key, value, agents)
    assert out.dtype == dtype and out.isfinite().all()
    want = F.agent_attention(*(x.float() for x in (query, key, value, agents)))
    assert_close(want, plain_agent_attention(*(x.float() for x in (query, key, value, agents))), 1e-4)
    assert max_error(out, want) <= 1e-2 * want.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_at_large_scores(feature_map, dtype):
    query, key = (whole_numbers(1, 2, 16384, 64, bound=125, seed=seed) for seed in (0, 1))
    query[:, :, 0], key[:, :, 0] = 125, 125
    if feature_map == "identity":
        query, key = query.abs(), key.abs()
    assert (query[:, :, :1] @ key.mT).max() == 1e6
    value = ((key > 60).float() + normal(1, 2, 16384, 64)).to(dtype)  # values that depend on the keys: outputs differ
    query, key = query.to(dtype), key.to(dtype)
    out = F.linear_attention(query, key, value, feature_map=feature_map)
    assert out.dtype == dtype and out.isfinite().all()
    want = plain_linear_attention(*(x.double() for x in (query, key, value)), feature_map=feature_map)
    assert_close(F.linear_attention(*(x.float() for x in (query, key, value)), feature_map=feature_map), want, 1e-4)
    assert max_error(out, want) <= 1e-2 * want.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-4, 1e-6])
def test_linear_attention_at_small_scores(dtype, magnitude):
    """Products of features sink below float16's range; what is left is what eps says, not 0 / 0."""
    query, key, value = linear_inputs(torch.float32, "relu")
    query, key, value = (query * magnitude).to(dtype), key.to(dtype), value.to(dtype)
    out = F.linear_attention(query, key, value, feature_map="relu")
    assert out.isfinite().all()
    assert_close(out, oracles.linear_attention(query, key, value, "relu"), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_denominator_gives_zero(dtype):
    query, key, value = linear_inputs(dtype, "relu")
    query[:, :, 3] = -query[:, :, 3].abs()
    out = F.linear_attention(query, key, value, feature_map="relu")
    assert out.isfinite().all()
    assert out[:, :, 3].eq(0).all() and out[:, :, 4].ne(0).any()
    assert F.linear_attention(query, -key.abs(), value, feature_map="relu").eq(0).all()
    assert F.linear_attention(-query.abs(), -key.abs(), value, feature_map="relu").eq(0).all()
    zeros = torch.zeros_like(query)
    assert F.linear_attention(zeros, key, value, feature_map="identity").eq(0).all()
    assert F.linear_attention(zeros, zeros, value[:, :, :50], feature_map="focused").isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_denominator_gradients_are_finite(dtype):
    query, key, value = linear_inputs(dtype, "relu")
    query[:, :, 3] = -1
    inputs = [x.requires_grad_() for x in (query, key, value)]
    F.linear_attention(*inputs, feature_map="relu").sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


# Matching


@pytest.mark.parametrize(
    ("grid", "stride", "ratio", "agent_ratio", "num_merged", "num_agents"),
    [
        ((64, 64), (4, 4), 0.4, 0.95, 2458, 256),
        ((64, 64), (2, 2), 0.4, 0.5, 2458, None),
        ((64, 64), (2, 2), 0.5, 0.8, 2048, None),  # 2 * 1024 is not less than 2048
        ((72, 40), (4, 4), 0.4, 0.95, 1728, 180),
        ((40, 72), (4, 4), 0.4, 0.95, 1728, 180),
        ((64, 96), (4, 4), 0.4, 0.95, 3687, 384),
        ((65, 63), (4, 4), 0.4, 0.95, 2457, 240),
        ((64, 64), (2, 2), 0.9, 0.95, 1024, None),  # no more can go than there are sources
        ((16, 16), (4, 4), 0.0, 0.95, 256, 16),
        ((16, 16), (4, 4), 0.875, 0.95, 32, None),
        ((16, 16), (4, 4), 0.87, 0.95, 34, 16),
    ],
)
def test_match_counts(grid, stride, ratio, agent_ratio, num_merged, num_agents):
    assert oracles.match_counts(grid, stride, ratio, agent_ratio) == (num_merged, num_agents)
    x = normal(1, grid[0] * grid[1], 4)
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    assert matching.merge(x).shape == (1, num_merged, 4)
    if num_agents is None:
        assert matching.agents is None
    else:
        assert matching.agents(x).shape == (1, num_agents, 4)
    assert matching.unmerge(matching.merge(x)).shape == x.shape


def test_no_agents_without_an_agent_ratio():
    x = normal(1, 256, 4)
    assert F.match_tokens(x, (16, 16), (4, 4), 0.4).agents is None


MATCHINGS = [
    ((6, 8), (2, 2), 0.4, 0.7),
    ((8, 6), (2, 3), 0.3, 0.8),
    ((6, 8), (3, 2), 0.3, 0.8),
    ((5, 12), (1, 4), 0.25, 0.7),
    ((12, 5), (4, 1), 0.25, 0.7),
    ((9, 7), (2, 3), 0.5, 0.8),
    ((7, 9), (4, 4), 0.9, 0.95),
]


@pytest.mark.parametrize(("grid", "stride", "ratio", "agent_ratio"), MATCHINGS, ids=str)
def test_match_tokens_equals_oracle(grid, stride, ratio, agent_ratio):
    """On uneven grids and strides, so that a swap of the axes shows; applied also to a tensor that was not matched."""
    x, other = normal(2, grid[0] * grid[1], 6), normal(2, grid[0] * grid[1], 3, seed=1)
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    oracle = oracles.Matching(x, grid, stride, ratio)
    agent_oracle = oracles.Matching(x, grid, stride, agent_ratio)
    for tokens in (x, other):
        merged = matching.merge(tokens)
        assert_matching(merged, oracle.merge(tokens), len(oracle.targets))
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(tokens)))
        if oracles.match_counts(grid, stride, ratio, agent_ratio)[1] is None:
            assert matching.agents is None
        else:
            assert_matching(matching.agents(tokens), agent_oracle.merge(tokens), len(oracle.targets))


def test_top_left_tokens_are_the_targets():
    """With every source merged, what is left is one token a cell, and alike tokens return to where they came from."""
    grid, stride = (4, 6), (2, 3)
    cell = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(6)[None] // 3).flatten()
    directions = torch.eye(4)[cell][None] * (1 + torch.arange(24.0))[None, :, None]  # one direction a cell, any length
    matching = F.match_tokens(directions, grid, stride, 0.99)
    position = torch.arange(24.0)[None, :, None]
    merged = matching.merge(position)
    means = torch.stack([position[0, cell == c].mean() for c in range(4)])
    assert_close(merged[0, :, 0].sort().values, means.sort().values, 1e-6)
    assert_close(matching.unmerge(merged)[0, :, 0], means[cell], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_keeps_the_dtype(dtype):
    x = normal(2, 48, 6, dtype=dtype)
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, 0.75)
    merged = matching.merge(x)
    assert merged.dtype == matching.agents(x).dtype == matching.unmerge(merged).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thousands_of_tokens_merge_into_one(dtype):
    """The mean of equal tokens is that token: a sum in half precision would stop growing long before."""
    x = torch.full((1, 4096, 8), 3.0, dtype=dtype)
    matching = F.match_tokens(x, (64, 64), (4, 4), 0.9)
    merged = matching.merge(x)
    assert torch.equal(merged, x[:, : merged.shape[1]])
    assert torch.equal(matching.unmerge(merged), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_matching_does_not_depend_on_magnitude(dtype, magnitude):
    """One direction a row of the grid: each row merges into itself, though lengths leave the range of float16."""
    row = torch.arange(24) // 6
    x = (torch.eye(4)[row].repeat_interleave(64, 1)[None] * magnitude).to(dtype)
    matching = F.match_tokens(x, (4, 6), (1, 6), 0.99)
    merged = matching.merge(x)
    assert merged.shape == (1, 4, 256)
    assert torch.equal(matching.unmerge(merged), x)


def test_ratio_zero_is_the_identity():
    x = normal(2, 63, 6)
    for agent_ratio in (None, 0.8):
        matching = F.match_tokens(x, (9, 7), (2, 2), 0.0, agent_ratio)
        assert torch.equal(matching.merge(x), x)
        assert torch.equal(matching.unmerge(x), x)
    assert_matching(matching.agents(x), oracles.Matching(x, (9, 7), (2, 2), 0.8).merge(x), 12)


def test_merging_what_was_unmerged():
    x = normal(2, 63, 6)
    matching = F.match_tokens(x, (9, 7), (2, 2), 0.5)
    merged = normal(*matching.merge(x).shape, seed=1)
    assert_close(matching.merge(matching.unmerge(merged)), merged, 1e-6)
    constant = torch.full_like(x, 3.5)
    assert torch.equal(matching.unmerge(matching.merge(constant)), constant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 0], ids=["top-left", "random"])
def test_zero_tokens_do_not_spoil_the_matching(dtype, seed):
    """A zero token has no direction: its cosine counts as 0, and it must not win the sort as NaN does."""
    x = (normal(2, 48, 4) + 1).abs().to(dtype)  # all cosines positive, so that zero sources come last
    x[0, 9] = x[0, 20] = x[1, 47] = 0
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    choice = None if seed is None else torch.randint(4, (3, 4, 1), generator=torch.Generator().manual_seed(seed))
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, generator=generator)
    merged = matching.merge(x)
    assert merged.isfinite().all()
    assert matching.unmerge(merged).isfinite().all()
    if dtype == torch.float32:
        oracle = oracles.Matching(x, (6, 8), (2, 2), 0.4, choice)
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(x)))
    zeros = torch.zeros_like(x)
    matching = F.match_tokens(zeros, (6, 8), (2, 2), 0.4, 0.75)
    assert matching.unmerge(matching.merge(x)).isfinite().all()


@pytest.mark.parametrize("grid", [(6, 8), (9, 7), (5, 13), (16, 16)], ids=str)
@pytest.mark.parametrize("stride", [(2, 2), (2, 3), (4, 2)], ids=str)
def test_random_targets_equal_tomesd(grid, stride):
    tomesd = pytest.importorskip("tomesd")
    (height, width), (sy, sx) = grid, stride
    x = normal(2, height * width, 6)
    for seed, ratio in enumerate((0.1, 0.4, 0.9)):
        generator, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        num_merged = int(height * width * ratio)
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            x, width, height, sx, sy, num_merged, generator=other
        )
        matching = F.match_tokens(x, grid, stride, ratio, generator=generator)
        merged, want = matching.merge(x), merge(x)
        assert_close(merged, want, 1e-6)
        assert_close(matching.unmerge(merged), unmerge(want), 1e-6)
        assert torch.equal(generator.get_state(), other.get_state())
        choice = torch.randint(sy * sx, (height // sy, width // sx, 1), generator=generator.manual_seed(seed))
        oracle = oracles.Matching(x, grid, stride, ratio, choice)
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(x)))


def test_top_left_targets_equal_tomesd():
    tomesd = pytest.importorskip("tomesd")
    for grid, stride in (((6, 8), (2, 2)), ((9, 7), (2, 3)), ((16, 12), (4, 4))):
        (height, width), (sy, sx) = grid, stride
        x, num_merged = normal(2, height * width, 6), int(height * width * 0.4)
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            x, width, height, sx, sy, num_merged, no_rand=True
        )
        matching = F.match_tokens(x, grid, stride, 0.4)
        assert_close(matching.merge(x), merge(x), 1e-6)
        assert_close(matching.unmerge(matching.merge(x)), unmerge(merge(x)), 1e-6)


def test_generators_decide_alone():
    x = normal(2, 256, 6)

    def merged(seed):
        generator = torch.Generator().manual_seed(seed)
        return F.match_tokens(x, (16, 16), (4, 4), 0.4, generator=generator).merge(x)

    assert torch.equal(merged(0), merged(0))
    assert not torch.equal(merged(0), merged(1))


# Random shapes

size = st.integers(1, 7)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(b=st.integers(1, 2), h=st.integers(1, 3), n=size, l=size, m=size, d=size, e=size, seed=st.integers(0, 99))
def test_any_shape_equals_oracle(b, h, n, l, m, d, e, seed):  # noqa: E741
    shapes = (b, h, n, d), (b, h, l, d), (b, h, l, e), (b, h, m, d), (b, h, m, l), (b, h, n, m)
    query, key, value, agents, aggregation_bias, broadcast_bias = (
        normal(*shape, seed=seed + i, dtype=torch.float64) for i, shape in enumerate(shapes)
    )
    biases = {"aggregation_bias": aggregation_bias, "broadcast_bias": broadcast_bias}
    out = F.agent_attention(query, key, value, agents, **biases)
    assert_close(out, oracles.agent_attention(query, key, value, agents, **biases), 1e-12)
    for phi in FEATURE_MAPS[:3]:
        out = F.linear_attention(query, key, value, feature_map=phi)
        assert_close(out, oracles.linear_attention(query, key, value, phi), 1e-10)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_any_grid_equals_oracle(data, height, width, seed):
    grid = (height, width)
    pooled = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    stride = data.draw(st.tuples(st.integers(1, min(4, height)), st.integers(1, min(4, width))))
    ratio, agent_ratio = data.draw(st.floats(0, 0.95)), data.draw(st.none() | st.floats(0, 0.95))
    x = normal(2, height * width, 8, seed=seed)
    assert_close(F.pool_tokens(x, grid, pooled), oracles.pool_tokens(x, grid, pooled), 1e-6)
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    oracle = oracles.Matching(x, grid, stride, ratio)
    merged, want = matching.merge(x), oracle.merge(x)
    assert_same_rows(merged, want)
    assert_close(matching.unmerge(merged), oracle.unmerge(want))
    num_agents = None if agent_ratio is None else oracles.match_counts(grid, stride, ratio, agent_ratio)[1]
    if num_agents is None:
        assert matching.agents is None
    else:
        assert_same_rows(matching.agents(x), oracles.Matching(x, grid, stride, agent_ratio).merge(x))


# Compilation, random state, errors


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    query, key, value, agents, aggregation_bias, broadcast_bias = agent_inputs(torch.float32)

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="eager")

    def attend(query, key, value, agents):
        return F.agent_attention(
            query, key, value, agents, aggregation_bias=aggregation_bias, broadcast_bias=broadcast_bias, shortcut=0.1
        )

    assert_close(compiled(attend)(query, key, value, agents), attend(query, key, value, agents), 1e-6)
    for phi in FEATURE_MAPS:
        linear = lambda q, k, v, phi=phi: F.linear_attention(q, k, v, feature_map=phi)
        assert_close(compiled(linear)(query, key, value), linear(query, key, value), 1e-6)
    pool = lambda x: F.pool_tokens(x, (10, 7), (3, 2))
    assert_close(compiled(pool)(query[0]), pool(query[0]), 1e-6)


def test_global_random_state_decides_nothing():
    """The same result from two global states. That none is changed is checked around every test."""
    x, before = normal(2, 63, 6), torch.get_rng_state()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(7)
        results.append(F.match_tokens(x, (9, 7), (2, 2), 0.4, generator=generator).merge(x))
        results.append(F.match_tokens(x, (9, 7), (2, 2), 0.4).merge(x))
    torch.set_rng_state(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def tensors(**shapes):
    """query, key, value and agents of matching shapes, but for those given."""
    sizes = {"query": (2, 3, 10, 8), "key": (2, 3, 12, 8), "value": (2, 3, 12, 8), "agents": (2, 3, 4, 8)} | shapes
    return {name: torch.zeros(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({"key": (2, 3, 12, 6)}, (6, 8)),
        ({"query": (2, 3, 10, 6), "agents": (2, 3, 4, 6)}, (6, 8)),
        ({"key": (5, 3, 12, 8), "value": (5, 3, 12, 8)}, (5, 2)),
        ({"value": (5, 3, 12, 8)}, (5, 2)),
        ({"key": (2, 7, 12, 8), "value": (2, 7, 12, 8)}, (7, 3)),
        ({"value": (2, 3, 11, 8)}, (11, 12)),
        ({"query": (3, 10, 8)}, (3, 10, 8)),
        ({"key": (3, 12, 8)}, (3, 12, 8)),
        ({"value": (1, 2, 3, 12, 8)}, (1, 2, 3, 12, 8)),
    ],
    ids=str,
)
def test_attention_names_sizes_that_do_not_fit(shapes, sizes):
    arguments = tensors(**shapes)
    with pytest.raises(ValueError, match=names(*sizes)):
        F.agent_attention(**arguments)
    del arguments["agents"]
    with pytest.raises(ValueError, match=names(*sizes)):
        F.linear_attention(**arguments)


@pytest.mark.parametrize(
    ("shapes", "options", "sizes"),
    [
        ({"agents": (2, 3, 4, 6)}, {}, (6, 8)),
        ({"agents": (5, 3, 4, 8)}, {}, (5, 2)),
        ({"agents": (2, 7, 4, 8)}, {}, (7, 3)),
        ({"agents": (3, 4, 8)}, {}, (3, 4, 8)),
        ({}, {"shortcut": 0.1}, (10, 12)),
        ({}, {"aggregation_bias": (3, 4, 11)}, (11, 12)),
        ({}, {"aggregation_bias": (3, 10, 12)}, (10, 4)),
        ({}, {"broadcast_bias": (3, 10, 5)}, (5, 4)),
        ({}, {"broadcast_bias": (2, 5, 10, 4)}, (5, 3)),
        ({}, {"broadcast_bias": (1, 2, 3, 10, 4)}, (1, 2, 3, 10, 4)),
    ],
    ids=str,
)
def test_agent_attention_names_sizes_that_do_not_fit(shapes, options, sizes):
    options = {name: torch.zeros(value) if "bias" in name else value for name, value in options.items()}
    with pytest.raises(ValueError, match=names(*sizes)):
        F.agent_attention(**tensors(**shapes), **options)


def test_linear_attention_names_the_feature_maps():
    arguments = tensors()
    del arguments["agents"]
    with pytest.raises(ValueError, match="(?=.*gelu)(?=.*elu)(?=.*relu)(?=.*focused)(?=.*identity)"):
        F.linear_attention(**arguments, feature_map="gelu")


@pytest.mark.parametrize(
    ("shape", "grid", "sizes"),
    [((2, 16, 4), (3, 5), (16, 15)), ((2, 4, 4, 8), (4, 4), (2, 4, 4, 8)), ((16, 4), (4, 4), (16, 4))],
    ids=str,
)
def test_token_functions_name_sizes_that_do_not_fit(shape, grid, sizes):
    with pytest.raises(ValueError, match=names(*sizes)):
        F.pool_tokens(torch.zeros(shape), grid, (2, 2))
    with pytest.raises(ValueError, match=names(*sizes)):
        F.match_tokens(torch.zeros(shape), grid, (2, 2), 0.4)


def test_matching_names_sizes_that_do_not_fit():
    x = normal(2, 48, 6)
    with pytest.raises(ValueError, match=names(9, 8)):
        F.match_tokens(x, (6, 8), (2, 9), 0.4)  # no cell fits, so there is no target
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, 0.74)
    for function, sizes in ((matching.merge, (47, 48)), (matching.unmerge, (47, 29))):
        with pytest.raises(ValueError, match=names(*sizes)):
            function(x[:, :47])
    with pytest.raises(ValueError, match=names(1, 2)):
        matching.merge(x[:1])


# Focal attention

FOCAL = [
    # grid, window, margin, cells
    ((8, 8), 4, 1, 4),
    ((5, 7), 3, 1, 6),  # neither windows nor cells divide the grid
    ((7, 4), 2, 0, 1),
    ((3, 11), 4, 2, 9),
    ((1, 9), 2, 1, 3),
    ((6, 6), 1, 0, 36),
]


@pytest.mark.parametrize(("grid", "window", "margin", "cells"), FOCAL)
@pytest.mark.parametrize("text", [0, 3])
def test_focal_attention_equals_oracle(grid, window, margin, cells, text):
    tokens = math.prod(grid)
    query, key, value = (normal(2, 2, tokens, size, seed=i) for i, size in enumerate((8, 8, 5)))
    context = (normal(2, 2, text, 8, seed=5), normal(2, 2, text, 5, seed=6)) if text else None
    options = {"window": window, "margin": margin, "context": context, "scale": 0.7}
    want = oracles.focal_attention(query, key, value, grid, cells=F.agent_grid(cells, grid), **options)
    assert_close(F.focal_attention(query, key, value, grid, num_cells=cells, **options), want)
    for dtype in DTYPES[1:]:
        half = [x.to(dtype) for x in (query, key, value)]
        options["context"] = context and tuple(x.to(dtype) for x in context)
        want = oracles.focal_attention(*half, grid, cells=F.agent_grid(cells, grid), **options)
        got = F.focal_attention(*half, grid, num_cells=cells, **options)
        assert got.dtype == dtype
        assert_close(got, want, 1e-2)


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
    from attngen import FocalAttention

    class Backend:
        kernel = None

        def __call__(self, query, key, value, scale=None):
            assert query.shape[-1] % 8 == 0 and query.shape[-1] == key.shape[-1] == value.shape[-1]
            return tf.scaled_dot_product_attention(query, key, value, scale=scale)

    tokens = math.prod(grid)
    for dtype, size, tolerance in ((torch.float32, 8, 1e-5), (torch.float32, 5, 1e-5), (torch.bfloat16, 8, 2e-2)):
        query, key, value = (normal(2, 2, tokens, size, seed=i, dtype=dtype) for i in range(3))
        method = FocalAttention(window, margin, cells)
        got = method.attend(query, key, value, grid=grid, agents=None, context=None, attention=Backend())
        want = oracles.focal_attention(query, key, value, grid, window, margin, F.agent_grid(cells, grid))
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_count_of_a_cell_is_exact_in_half_precision(dtype):
    """One channel alone would be off by a half of a percent."""
    from attngen import FocalAttention

    class Backend:
        kernel = None

        def __call__(self, query, key, value, scale=None):
            counts = ((key[0, :, -4:, 8].double() + key[0, :, -4:, 9].double()) * scale).exp()
            assert (counts - counts.round()).abs().max() < 1e-3 and counts.sum(-1).round().tolist() == [55] * 9
            return tf.scaled_dot_product_attention(query, key, value, scale=scale)

    query, key, value = (normal(1, 1, 64, 8, seed=i, dtype=dtype) for i in range(3))
    method = FocalAttention(3, 0, 4)
    method.attend(query, key, value, grid=(8, 8), agents=None, context=None, attention=Backend())


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
