"""What all pure functions have in common: shapes, strides, gradients, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen import functional as F
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_no_worse, assert_same_rows, normal
from tests.plain import FEATURE_MAPS, agent_inputs, linear_inputs, plain_agent_attention, plain_linear_attention

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


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
