"""The fused linear attention, run by Triton's interpreter, against its definition in float64.

The interpreter has to be chosen before Triton is first imported, and by then another test may have imported it, with
the module under test. So these tests import both a second time for themselves: `sys.modules` holds the second Triton
while they run and gets the first back, and the second copy of the module has a namespace of operators of its own.
"""

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest
import torch

from attngen.kernels.triton import linear as triton_linear
from attngen.methods import linear
from tests.cases import share

MAPS = ["elu", "relu", "focused", "identity"]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 3e-2}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def _of_triton():
    """Its modules in Python; the compiled ones cannot be loaded twice."""
    return [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The module under test, with kernels that run on the CPU."""
    pytest.importorskip("triton")
    others = {name: sys.modules.pop(name) for name in _of_triton()}
    setting = pytest.MonkeyPatch()
    setting.setenv("TRITON_INTERPRET", "1")
    path = tmp_path_factory.mktemp("interpreted") / "interpreted_triton_linear.py"
    # A file, because Triton reads the source of kernels.
    path.write_text(inspect.getsource(triton_linear).replace('"attngen::', '"attngen_interpreted::'))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    setting.setitem(sys.modules, path.stem, module)  # torch.compile looks for it there
    spec.loader.exec_module(module)
    yield module
    setting.undo()
    for name in _of_triton():
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture
def poisoned(interpreted, monkeypatch):
    """The module, whose buffers are full of NaN before kernels write them; fails the test if it has none."""
    filled = []

    def empty(shape, like, dtype=None):
        filled.append(shape)
        return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)

    monkeypatch.setattr(interpreted, "_empty", empty)
    yield interpreted
    assert filled


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


def check(module, n, length, d, e, feature_map, dtype=torch.float32):
    # The interpreter takes a second a million products, so only small problems have more than one head.
    tensors = inputs(n, length, d, e, dtype, feature_map, (2, 2) if n + length < 140 and d < 128 else (1, 1))
    fused = lambda q, k, v: module.linear_attention(q, k, v, feature_map, 1e-6)
    expected = definition(*tensors, feature_map)
    # One key is the answer to every query: gradients of queries and keys are rounding errors of this size.
    scales = (0, 1, 1, 0) if length == 1 else None
    plain = run(lambda q, k, v: linear.linear_attention(q, k, v, feature_map=feature_map, kernel="reference"), *tensors)
    assert_close(run(fused, *tensors), expected, TOLERANCE[dtype], scales, plain)


# Every N, D, map and tile of columns at least once, two thirds of the pairs of them.
COVERING = [
    (1, 63, 32, 32, "elu"),
    (63, 1, 40, 40, "relu"),
    (256, 300, 64, 64, "focused"),
    (300, 256, 72, 72, "identity"),
    (300, 63, 80, 80, "focused"),
    (63, 300, 128, 128, "elu"),
    (1, 256, 72, 72, "focused"),
    (256, 63, 40, 40, "identity"),
    (1000, 300, 40, 40, "focused"),
    (300, 1000, 64, 64, "elu"),
    (256, 256, 80, 80, "relu"),
    (63, 63, 16, 160, "elu"),
    (63, 70, 160, 16, "relu"),
    (70, 63, 160, 136, "focused"),
    (63, 70, 32, 72, "focused"),
    (70, 63, 72, 32, "elu"),
    (1, 1, 64, 64, "relu"),
]


@pytest.mark.parametrize("case", share(2, COVERING))
def test_output_and_gradients_are_those_of_the_definition(poisoned, case):
    check(poisoned, *case)


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("d", [32, 40, 64, 72, 80, 128, 160])
@pytest.mark.parametrize("n", [1, 63, 256, 300, 1000])
def test_all_sizes(poisoned, n, d, feature_map):
    check(poisoned, n, {1: 63, 63: 256, 256: 1000, 300: 300, 1000: 1}[n], d, d, feature_map)


@pytest.mark.parametrize(("dtype", "feature_map"), share(2, [torch.float16, torch.bfloat16], MAPS))
def test_half_precision(poisoned, feature_map, dtype):
    check(poisoned, 63, 70, 40, 72, feature_map, dtype)


def test_bfloat16_gradients_survive_values_far_from_zero(interpreted):
    query, key, value, gradient = inputs(64, 512, 32, 32, torch.bfloat16)
    value = value + 8  # the summary is then 8 times the mean feature, and so is all that does not cancel
    results = run(lambda q, k, v: interpreted.linear_attention(q, k, v, "elu", 1e-6), query, key, value, gradient)
    assert_close(results, definition(query, key, value, gradient, "elu"), TOLERANCE[torch.bfloat16])


def test_many_programs_share_the_tokens(poisoned, monkeypatch):
    monkeypatch.setattr(poisoned, "multiprocessors", lambda device: 100)
    check(poisoned, 300, 2400, 16, 16, "elu")  # parts of 256 keys and 128 queries: more than are added at once


def test_views_are_read_in_place(poisoned, monkeypatch):
    monkeypatch.setattr(poisoned, "row_strided", lambda tensor: tensor)
    tokens = draw((2, 90, 3 * 2 * 40))
    views = [part.unflatten(2, (2, 40)).transpose(1, 2) for part in tokens.chunk(3, dim=2)]
    gradient = draw((2, 2, 90, 40), seed=4)
    fused = lambda q, k, v: poisoned.linear_attention(q, k, v, "elu", 1e-6)
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
def test_strides_of_every_kind(poisoned, offset):
    """Heads of odd distance, one key for all batch elements, a last axis that is not contiguous."""
    query = draw((2, 2, 70, 32 + offset))[..., offset:]
    key = draw((1, 2, 66, 32), seed=1).expand(2, -1, -1, -1)
    value = draw((2, 2, 24, 66), seed=2).transpose(2, 3)
    gradient = draw((1, 1, 1, 1), seed=3).expand(2, 2, 70, 24)  # as of a sum: all strides 0
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = poisoned.linear_attention(*leaves, "relu", 1e-6)
    results = output, *torch.autograd.grad(output, leaves, gradient)
    assert_close(results, definition(query, key, value, gradient, "relu"), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("eps", "e"), [(1e-6, 16), (0.5, 16), (0.5, 136)])
def test_eps_counts(interpreted, eps, e):
    tensors = inputs(40, 50, 16, e)
    results = run(lambda q, k, v: interpreted.linear_attention(q, k, v, "relu", eps), *tensors)
    assert_close(results, definition(*tensors, "relu", eps), TOLERANCE[torch.float32])


def test_features_of_both_signs(interpreted):
    query, key, value, gradient = (draw((1, 1, 33, 16), seed=seed) for seed in range(4))
    results = run(lambda q, k, v: interpreted.linear_attention(q, k, v, "identity", 40.0), query, key, value, gradient)
    assert_close(results, definition(query, key, value, gradient, "identity", 40.0), TOLERANCE[torch.float32])


@pytest.mark.parametrize("feature_map", MAPS)
def test_zeros_give_finite_results(poisoned, feature_map):
    zeros = [torch.zeros(1, 1, 20, 16) for _ in range(3)]
    results = run(
        lambda q, k, v: poisoned.linear_attention(q, k, v, feature_map, 1e-6), *zeros, torch.ones(1, 1, 20, 16)
    )
    assert_close(results, definition(*zeros, torch.ones(1, 1, 20, 16), feature_map), TOLERANCE[torch.float32])


def test_keys_that_match_nothing_give_zero(poisoned):
    query, key, value, gradient = inputs(20, 30, 16, 16)
    results = run(lambda q, k, v: poisoned.linear_attention(q, k, v, "relu", 1e-6), query, -key.abs(), value, gradient)
    assert all(torch.equal(result, torch.zeros_like(result)) for result in (results[0], results[1], results[3]))
    assert results[2].isfinite().all()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_numbers(interpreted, feature_map, dtype):
    query, key, value, gradient = inputs(40, 50, 32, 32, dtype, feature_map)
    query, key, value = query * 1e4, key * 1e4, value * 1e4
    results = run(lambda q, k, v: interpreted.linear_attention(q, k, v, feature_map, 1e-6), query, key, value, gradient)
    expected = definition(query, key, value, gradient, feature_map)
    tolerance = max(TOLERANCE[dtype], 2e-5)
    # Gradients of queries and keys are as small as cancellation leaves them next to |gradient| · |value| / |query|.
    assert_close(results, expected, tolerance, (0, 20, 20, 0))


def test_exponentials_do_not_overflow(interpreted):
    x = torch.linspace(-200, 200, 64).view(1, 1, 4, 16)
    results = run(lambda q, k, v: interpreted.linear_attention(q, k, v, "elu", 1e-6), x, x, x, torch.ones_like(x))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("feature_map", MAPS)
def test_nan_stays_with_its_query(interpreted, feature_map):
    query, key, value, _ = inputs(20, 30, 16, 16, feature_map=feature_map)
    query[0, 1, 5, 3] = float("nan")
    output = interpreted.linear_attention(query, key, value, feature_map, 1e-6)
    assert output[0, 1, 5].isnan().all() and output.isnan().sum() == 16


def test_results_repeat_bit_for_bit(interpreted):
    tensors = inputs(100, 700, 32, 32)
    fused = lambda q, k, v: interpreted.linear_attention(q, k, v, "focused", 1e-6)
    first, second = run(fused, *tensors), run(fused, *tensors)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_saved_for_backward(interpreted):
    query, key, value, _ = inputs(100, 100, 16, 24, torch.float16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.setdefault(tensor.data_ptr(), tensor).clone(), lambda tensor: tensor
    ):
        interpreted.linear_attention(*leaves, "elu", 1e-6)
    saved = sum(tensor.nbytes for tensor in sizes.values())
    assert saved == sum(leaf.nbytes for leaf in leaves) + 2 * 4 * (16 * 24 + 16 + 24)


def test_operators_pass_the_checks_of_torch(interpreted):
    query, key, value, gradient = inputs(20, 30, 16, 24)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(interpreted._forward_op, (*leaves, "focused", 1e-6))
    tensors = [leaf.detach() for leaf in leaves]
    _, state = interpreted._forward_op(*tensors, "focused", 1e-6)
    torch.library.opcheck(interpreted._backward_op, (gradient, *tensors, state, "focused", 1e-6))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(interpreted, dynamic):
    tensors = inputs(60, 70, 16, 24)
    fused = lambda q, k, v: interpreted.linear_attention(q * 2, k, v, "elu", 1e-6) * 3
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for result, truth in zip(run(compiled, *tensors), run(fused, *tensors), strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_as_the_definition_does(interpreted, dtype):
    query, key, value, gradient = inputs(60, 70, 16, 24, dtype)
    fused = lambda q, k, v: interpreted.linear_attention(q, k, v, "elu", 1e-6)
    outside = run(fused, query, key, value, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(fused, query, key, value, gradient)
        eager = linear.linear_attention(query, key, value, feature_map="elu")
    assert inside[0].dtype == eager.dtype == dtype
    assert all(torch.equal(one, two) for one, two in zip(inside, outside, strict=True))


def test_second_derivatives_are_refused(interpreted):
    query, key, value, _ = inputs(20, 30, 16, 16)
    query.requires_grad_()
    output = interpreted.linear_attention(query, key, value, "elu", 1e-6)
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
def test_reasons_against_the_kernels(interpreted, change, reason):
    tensors = change(*inputs(10, 12, 24, 16)[:3])
    assert reason in interpreted.why_not(*tensors)
    with pytest.raises(ValueError, match=reason):
        interpreted.linear_attention(*tensors, 1e-6)


def test_no_reason_where_there_is_none(interpreted):
    assert interpreted.why_not(*inputs(10, 12, 24, 16)[:3], "elu") is None


def run_alone(source, **environment):
    environment = {**os.environ, **environment}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


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
    assert "Triton" in run_alone(source)


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from attngen.kernels.triton import linear as triton_linear

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *values, num_warps=4, num_stages=3, **constants):
        names = self.kernel.arg_names
        values = dict(zip(names, values)) | constants
        fixed = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        free = {name: TYPES.get(getattr(value, "dtype", type(value))) for name, value in values.items()}
        signature = {name: "constexpr" if name in fixed else free[name] for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        constexprs = {(names.index(name),): value for name, value in fixed.items()}
        source = triton.compiler.ASTSource(self.kernel, signature, constexprs, aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(self.kernel.__name__, result.metadata.shared, "cubin" in result.asm)


for name in ("_summarise", "_combine", "_read", "_backward_query", "_backward_key"):
    setattr(triton_linear, name, Compiled(getattr(triton_linear, name)))
triton_linear.multiprocessors = lambda device: 132
d, dtype, feature_map = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
x = torch.zeros(1, 2, 600, d, dtype=dtype)
_, state = triton_linear._forward(x, x, x, feature_map, 1e-6)
triton_linear._backward(x, x, x, x, state, feature_map, 1e-6)
"""


@needs_triton
@pytest.mark.parametrize(
    ("d", "dtype", "feature_map"),
    [
        (64, "bfloat16", "elu"),
        pytest.param(72, "float16", "focused", marks=pytest.mark.slow),
        pytest.param(128, "float16", "focused", marks=pytest.mark.slow),
        pytest.param(160, "bfloat16", "focused", marks=pytest.mark.slow),
        pytest.param(160, "float16", "elu", marks=pytest.mark.slow),
        pytest.param(160, "float32", "relu", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path, d, dtype, feature_map):
    if "nvidia" not in __import__("triton").backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA")
    source = (
        COMPILE.replace("sys.argv[1]", repr(d))
        .replace("sys.argv[2]", repr(dtype))
        .replace("sys.argv[3]", repr(feature_map))
    )
    lines = run_alone(source, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 6  # five kernels, the sum of the parts once in each direction
    for line in lines:
        kernel, shared, built = line.split()
        assert built == "True" and int(shared) <= 232448, f"{kernel} takes {shared} bytes of 227 KiB shared memory"


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
