"""Agent attention against its definition, published reference outputs, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as tf

from attngen import functional as F
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_no_worse, max_error, names, normal
from tests.golden_cases import golden_cases, state
from tests.plain import agent_inputs, heads_of, plain_agent_attention, tokens_of, whole_numbers, zero_inputs

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


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


@pytest.mark.parametrize("shortcut", [0.0, 0.075])
def test_agent_attention_returns_constant_values(shortcut):
    query, key, _, agents, *biases = agent_inputs(torch.float32)
    value = normal(2, 3, 1, 16).expand(2, 3, 70, 16)
    out = F.agent_attention(
        query, key, value, agents, aggregation_bias=biases[0], broadcast_bias=biases[1], shortcut=shortcut
    )
    assert_close(out, (1 + shortcut) * value, 2e-6)


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
        F.agent_attention(**zero_inputs(**shapes), **options)
