"""Linear attention and its feature maps against their definitions and published outputs, and their properties."""

import pytest
import torch
import torch.nn.functional as tf

from attngen import functional as F
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_no_worse, max_error, normal
from tests.golden_cases import golden_cases, state
from tests.plain import (
    FEATURE_MAPS,
    heads_of,
    linear_inputs,
    plain_focused,
    plain_linear_attention,
    tokens_of,
    whole_numbers,
    zero_inputs,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


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


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_returns_constant_values(feature_map):
    query, key, _ = linear_inputs(torch.float32, feature_map)
    value = normal(2, 3, 1, 16).expand(2, 3, 70, 16)
    out = F.linear_attention(query, key, value, feature_map=feature_map)
    assert_close(out, value[:, :, :50], 1e-5)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_gradcheck(feature_map):
    inputs = [x.requires_grad_() for x in linear_inputs(torch.float64, feature_map, b=1, h=2, n=4, l=5, d=3, e=2)]
    assert torch.autograd.gradcheck(lambda *x: F.linear_attention(*x, feature_map=feature_map), inputs)


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


def test_linear_attention_names_the_feature_maps():
    arguments = zero_inputs()
    del arguments["agents"]
    with pytest.raises(ValueError, match="(?=.*gelu)(?=.*elu)(?=.*relu)(?=.*focused)(?=.*identity)"):
        F.linear_attention(**arguments, feature_map="gelu")
