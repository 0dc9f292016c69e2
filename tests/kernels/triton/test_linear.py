"""The fused linear attention in Triton's interpreter, against its definition in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from attngen.kernels.triton import common
from attngen.kernels.triton import linear as triton_linear
from attngen.methods import linear
from tests.cases import share
from tests.kernels.triton.interpreter import ROOT, needs_interpreter, needs_triton, run_interpreted, start_with_nan

MAPS = ["elu", "relu", "focused", "identity"]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 3e-2}


@needs_interpreter
def test_kernels_in_the_interpreter():
    run_interpreted(__file__, "-m", "not slow")


@needs_interpreter
@pytest.mark.slow
def test_all_sizes_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


@pytest.fixture(autouse=True)
def buffers(monkeypatch):
    """The shapes of the buffers that the kernels got, which were full of NaN."""
    return start_with_nan(monkeypatch)


def draw(shape, dtype=torch.float32, seed=0, positive=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x.abs() if positive else x + 0.3).to(dtype)


def inputs(n, length, d, e, dtype=torch.float32, feature_map="elu", heads=(1, 2)):
    """Query, key, value and a gradient. Values have a mean of 0.3, as the centring is there for such."""
    positive = feature_map == "identity"  # features of both signs make denominators near zero
    query, key = draw((*heads, n, d), dtype, 0, positive), draw((*heads, length, d), dtype, 1, positive)
    return query, key, draw((*heads, length, e), dtype, 2), draw((*heads, n, e), dtype, 3)


def run(function, query, key, value, gradient, dtype=None):
    """Output and three gradients."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves)
    return output, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))


def definition(query, key, value, gradient, feature_map, eps=1e-6):
    function = lambda *leaves: linear.linear_attention(*leaves, feature_map=feature_map, eps=eps)
    return run(function, query, key, value, gradient, torch.float64)


def assert_close(results, expected, tolerance, scales=None, plain=None):
    """Within the tolerance, or within three times the error of `plain`, the same in PyTorch: gradients may cancel."""
    for i, (name, result, truth) in enumerate(zip(("output", "dq", "dk", "dv"), results, expected, strict=True)):
        assert result.shape == truth.shape, name
        error, size = torch.linalg.vector_norm(result.double() - truth), torch.linalg.vector_norm(truth)
        allowed = tolerance * max(size, scales[i] if scales else 0)
        if plain is not None:
            allowed = max(allowed, 3 * torch.linalg.vector_norm(plain[i].double() - truth))
        assert error <= allowed, f"{name}: {error}"


def check(n, length, d, e, feature_map, dtype=torch.float32):
    # The interpreter takes a second a million products, so only small problems have more than one head.
    tensors = inputs(n, length, d, e, dtype, feature_map, (2, 2) if n + length < 140 and d < 128 else (1, 1))
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, feature_map, 1e-6)
    expected = definition(*tensors, feature_map)
    # One key is the answer to every query: gradients of queries and keys are rounding errors of this size.
    scales = (0, 1, 1, 0) if length == 1 else None
    plain = run(lambda q, k, v: linear.linear_attention(q, k, v, feature_map=feature_map, kernel="reference"), *tensors)
    assert_close(run(fused, *tensors), expected, TOLERANCE[dtype], scales, plain)


# Every N, D, map and tile of columns at least once, two thirds of the pairs of them.
COVERING = [
    (1, 63, 32, 32, "elu"),
    (63, 1, 40, 40, "relu"),
    (130, 140, 64, 64, "focused"),
    (140, 130, 72, 72, "identity"),
    (70, 40, 80, 80, "focused"),
    (63, 140, 128, 128, "elu"),
    (1, 130, 72, 72, "focused"),
    (130, 63, 40, 40, "identity"),
    (520, 140, 40, 40, "focused"),
    (140, 520, 64, 64, "elu"),
    (70, 130, 80, 80, "relu"),
    (63, 63, 16, 160, "elu"),
    (33, 40, 160, 16, "relu"),
    (70, 63, 160, 136, "focused"),
    (63, 70, 32, 72, "focused"),
    (70, 63, 72, 32, "elu"),
    (1, 1, 64, 64, "relu"),
]


@pytest.mark.parametrize("case", share(2, COVERING))
def interpreted_output_and_gradients_are_those_of_the_definition(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("d", [32, 40, 64, 72, 80, 128, 160])
@pytest.mark.parametrize("n", [1, 63, 256, 300, 1000])
def interpreted_all_sizes(n, d, feature_map):
    check(n, {1: 63, 63: 256, 256: 1000, 300: 300, 1000: 1}[n], d, d, feature_map)


@pytest.mark.parametrize(("dtype", "feature_map"), share(2, [torch.float16, torch.bfloat16], MAPS))
def interpreted_half_precision(feature_map, dtype):
    check(63, 70, 40, 72, feature_map, dtype)


def interpreted_bfloat16_gradients_survive_values_far_from_zero():
    query, key, value, gradient = inputs(64, 512, 32, 32, torch.bfloat16)
    value = value + 8  # the summary is then 8 times the mean feature, and so is all that does not cancel
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, "elu", 1e-6)
    results = run(fused, query, key, value, gradient)
    assert_close(results, definition(query, key, value, gradient, "elu"), TOLERANCE[torch.bfloat16])


def interpreted_many_programs_share_the_tokens(monkeypatch):
    monkeypatch.setattr(common, "multiprocessors", lambda device: 100)
    check(300, 2400, 16, 16, "elu")  # parts of 256 keys and 128 queries: more than are added at once


def interpreted_views_are_read_in_place(monkeypatch):
    monkeypatch.setattr(common, "row_strided", lambda tensor: tensor)
    tokens = draw((2, 90, 3 * 2 * 40))
    views = [part.unflatten(2, (2, 40)).transpose(1, 2) for part in tokens.chunk(3, dim=2)]
    gradient = draw((2, 2, 90, 40), seed=4)
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, "elu", 1e-6)
    leaves = [view.requires_grad_() for view in (tokens.clone(),)]
    query, key, value = (part.unflatten(2, (2, 40)).transpose(1, 2) for part in leaves[0].chunk(3, dim=2))
    output = fused(query, key, value)
    assert output.transpose(1, 2).is_contiguous()
    (result,) = torch.autograd.grad(output, leaves, gradient)
    truth = definition(*views, gradient, "elu")
    joined = torch.cat([part.transpose(1, 2).flatten(2) for part in truth[1:]], dim=2)
    torch.testing.assert_close(output.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.double(), joined, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [8, 3])
def interpreted_strides_of_every_kind(offset):
    """Heads of odd distance, one key for all batch elements, a last axis that is not contiguous."""
    query = draw((2, 2, 70, 32 + offset))[..., offset:]
    key = draw((1, 2, 66, 32), seed=1).expand(2, -1, -1, -1)
    value = draw((2, 2, 24, 66), seed=2).transpose(2, 3)
    gradient = draw((1, 1, 1, 1), seed=3).expand(2, 2, 70, 24)  # as of a sum: all strides 0
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = triton_linear.linear_attention(*leaves, "relu", 1e-6)
    results = output, *torch.autograd.grad(output, leaves, gradient)
    assert_close(results, definition(query, key, value, gradient, "relu"), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("eps", "e"), [(1e-6, 16), (0.5, 16), (0.5, 136)])
def interpreted_eps_counts(eps, e):
    tensors = inputs(40, 50, 16, e)
    results = run(lambda q, k, v: triton_linear.linear_attention(q, k, v, "relu", eps), *tensors)
    assert_close(results, definition(*tensors, "relu", eps), TOLERANCE[torch.float32])


def interpreted_features_of_both_signs():
    query, key, value, gradient = (draw((1, 1, 33, 16), seed=seed) for seed in range(4))
    results = run(
        lambda q, k, v: triton_linear.linear_attention(q, k, v, "identity", 40.0), query, key, value, gradient
    )
    assert_close(results, definition(query, key, value, gradient, "identity", 40.0), TOLERANCE[torch.float32])


@pytest.mark.parametrize("feature_map", MAPS)
def interpreted_zeros_give_finite_results(feature_map):
    zeros = [torch.zeros(1, 1, 20, 16) for _ in range(3)]
    results = run(
        lambda q, k, v: triton_linear.linear_attention(q, k, v, feature_map, 1e-6), *zeros, torch.ones(1, 1, 20, 16)
    )
    assert_close(results, definition(*zeros, torch.ones(1, 1, 20, 16), feature_map), TOLERANCE[torch.float32])


def interpreted_keys_that_match_nothing_give_zero():
    query, key, value, gradient = inputs(20, 30, 16, 16)
    results = run(
        lambda q, k, v: triton_linear.linear_attention(q, k, v, "relu", 1e-6), query, -key.abs(), value, gradient
    )
    assert all(torch.equal(result, torch.zeros_like(result)) for result in (results[0], results[1], results[3]))
    assert results[2].isfinite().all()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def interpreted_large_numbers(feature_map, dtype):
    query, key, value, gradient = inputs(40, 50, 32, 32, dtype, feature_map)
    query, key, value = query * 1e4, key * 1e4, value * 1e4
    results = run(
        lambda q, k, v: triton_linear.linear_attention(q, k, v, feature_map, 1e-6), query, key, value, gradient
    )
    expected = definition(query, key, value, gradient, feature_map)
    tolerance = max(TOLERANCE[dtype], 2e-5)
    # Gradients of queries and keys are as small as cancellation leaves them next to |gradient| · |value| / |query|.
    assert_close(results, expected, tolerance, (0, 20, 20, 0))


def interpreted_exponentials_do_not_overflow():
    x = torch.linspace(-200, 200, 64).view(1, 1, 4, 16)
    results = run(lambda q, k, v: triton_linear.linear_attention(q, k, v, "elu", 1e-6), x, x, x, torch.ones_like(x))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("feature_map", MAPS)
def interpreted_nan_stays_with_its_query(feature_map):
    query, key, value, _ = inputs(20, 30, 16, 16, feature_map=feature_map)
    query[0, 1, 5, 3] = float("nan")
    output = triton_linear.linear_attention(query, key, value, feature_map, 1e-6)
    assert output[0, 1, 5].isnan().all() and output.isnan().sum() == 16


def interpreted_results_repeat_bit_for_bit():
    tensors = inputs(100, 700, 32, 32)
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, "focused", 1e-6)
    first, second = run(fused, *tensors), run(fused, *tensors)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def interpreted_saved_for_backward():
    query, key, value, _ = inputs(100, 100, 16, 24, torch.float16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.setdefault(tensor.data_ptr(), tensor).clone(), lambda tensor: tensor
    ):
        triton_linear.linear_attention(*leaves, "elu", 1e-6)
    saved = sum(tensor.nbytes for tensor in sizes.values())
    assert saved == sum(leaf.nbytes for leaf in leaves) + 2 * 4 * (16 * 24 + 16 + 24)


def interpreted_operators_pass_the_checks_of_torch():
    query, key, value, gradient = inputs(20, 30, 16, 24)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(triton_linear._forward.operator, (*leaves, "focused", 1e-6))
    tensors = [leaf.detach() for leaf in leaves]
    _, state = triton_linear._forward.operator(*tensors, "focused", 1e-6)
    torch.library.opcheck(triton_linear._backward.operator, (gradient, *tensors, state, "focused", 1e-6))


@pytest.mark.parametrize("dynamic", [False, True])
def interpreted_compiles_to_one_graph(dynamic):
    tensors = inputs(60, 70, 16, 24)
    fused = lambda q, k, v: triton_linear.linear_attention(q * 2, k, v, "elu", 1e-6) * 3
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for result, truth in zip(run(compiled, *tensors), run(fused, *tensors), strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def interpreted_autocast_keeps_the_dtype_as_the_definition_does(dtype):
    query, key, value, gradient = inputs(60, 70, 16, 24, dtype)
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, "elu", 1e-6)
    outside = run(fused, query, key, value, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(fused, query, key, value, gradient)
        eager = linear.linear_attention(query, key, value, feature_map="elu")
    assert inside[0].dtype == eager.dtype == dtype
    assert all(torch.equal(one, two) for one, two in zip(inside, outside, strict=True))


def interpreted_second_derivatives_are_refused():
    query, key, value, _ = inputs(20, 30, 16, 16)
    query.requires_grad_()
    output = triton_linear.linear_attention(query, key, value, "elu", 1e-6)
    (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double(), "elu"), "float64"),
        (lambda q, k, v: (q, k.half(), v, "elu"), "dtypes"),
        (lambda q, k, v: (q, k, v, torch.relu), "function"),
        (lambda q, k, v: (q, k, v, "softmax"), "'softmax' is not one of elu, relu, focused, identity"),
        (lambda q, k, v: (q[..., :20], k[..., :20], v, "elu"), "head size 20 is not a multiple of 8"),
        (lambda q, k, v: (q, k, v.repeat(1, 1, 1, 11), "elu"), "head size 176"),
        (lambda q, k, v: (q[..., :16], k, v, "elu"), "shapes do not fit"),
        (lambda q, k, v: (q, k[:, :, :9], v, "elu"), "shapes do not fit"),
        (lambda q, k, v: (q[:, :1], k, v, "elu"), "shapes do not fit"),
        (lambda q, k, v: (q[0], k[0], v[0], "elu"), "4 dimensions"),
        (lambda q, k, v: (q[:, :, :0], k, v, "elu"), "empty"),
        (lambda q, k, v: (q.to("meta"), k, v, "elu"), "several devices"),
    ],
)
def interpreted_reasons_against_the_kernels(change, reason):
    tensors = change(*inputs(10, 12, 24, 16)[:3])
    assert reason in triton_linear.why_not(*tensors)
    with pytest.raises(ValueError, match=reason):
        triton_linear.linear_attention(*tensors, 1e-6)


def interpreted_no_reason_where_there_is_none():
    assert triton_linear.why_not(*inputs(10, 12, 24, 16)[:3], "elu") is None


def test_imports_and_says_why_without_triton():
    source = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from attngen.kernels.triton.linear import why_not
x = torch.zeros(1, 1, 4, 16)
print(why_not(x, x, x, "elu"))
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Triton" in done.stdout, done.stderr


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("n", "length", "d", "e"), [(1000, 999, 64, 64), (300, 4096, 72, 40), (63, 70, 160, 160)])
def test_on_a_gpu(n, length, d, e, feature_map, dtype, tolerance):
    tensors = [tensor.cuda() for tensor in inputs(n, length, d, e, dtype, feature_map)]
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, feature_map, 1e-6)
    results = run(fused, *tensors)
    assert_close(results, definition(*tensors, feature_map), tolerance)
    assert all(torch.equal(one, two) for one, two in zip(results, run(fused, *tensors), strict=True))


@pytest.mark.gpu
@needs_triton
def test_compiled_on_a_gpu():
    tensors = [tensor.cuda() for tensor in inputs(200, 300, 64, 64, torch.bfloat16)]
    fused = lambda q, k, v: triton_linear.linear_attention(q, k, v, "elu", 1e-6) * 2
    for result, truth in zip(run(torch.compile(fused, fullgraph=True), *tensors), run(fused, *tensors), strict=True):
        torch.testing.assert_close(result, truth)
