"""Absorbed agent attention against projections and the written-out oracle, in value, gradient and rounding."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as tf
from torch import nn

from attngen import functional as F
from attngen.kernels.absorbed import Projection, absorbed_agent_attention
from attngen.layers.projections import effective_projection
from tests import oracles

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Case:
    """A layer of odd sizes: heads of the values wider than the others, another number of channels out than in."""

    def __init__(
        self,
        grid=(3, 4),
        agents=4,
        batch=2,
        biases=(True, True, True, True),
        positions=(True, True),
        channels=10,
        heads=2,
        head_dim=4,
        value_dim=3,
        out_channels=7,
        gain=1.0,
        dtype=torch.float64,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, size=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)

        def projection(outputs, inputs, bias, size=1.0):
            weight = normal(outputs, inputs, size=size * inputs**-0.5)
            return Projection(weight, normal(outputs, size=0.5) if bias else None)

        tokens = math.prod(grid)
        self.grid, self.heads = grid, heads
        self.x, self.agents = normal(batch, tokens, channels), normal(batch, agents, channels)
        self.query = projection(heads * head_dim, channels, biases[0], gain)
        self.key = projection(heads * head_dim, channels, biases[1], gain)
        self.value = projection(heads * value_dim, channels, biases[2])
        self.out = projection(out_channels, heads * value_dim, biases[3])
        self.aggregation_bias = normal(heads, agents, tokens) if positions[0] else None
        self.broadcast_bias = normal(heads, tokens, agents) if positions[1] else None
        self.value_conv = (normal(heads * value_dim, 1, 3, 3), normal(heads * value_dim))
        self.input_conv = (normal(channels, 1, 3, 3), normal(channels))

    def tensors(self):
        """Everything that has a gradient."""
        projections = itertools.chain(self.query, self.key, self.value, self.out)
        given = [self.x, self.agents, *projections, self.aggregation_bias, self.broadcast_bias]
        given += [*self.value_conv, *self.input_conv]
        return [tensor for tensor in given if tensor is not None]

    def requires_grad(self):
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self

    def convolve(self, x, weights):
        image = x.transpose(1, 2).unflatten(2, self.grid)
        return tf.conv2d(image, *weights, padding=1, groups=x.shape[-1]).flatten(2).transpose(1, 2)

    def absorbed(self, branches="", **options):
        if "value" in branches:
            options["value_branch"] = lambda values: self.convolve(values, self.value_conv)
        if "input" in branches:
            options["input_branch"] = lambda x: self.convolve(x, self.input_conv)
        return absorbed_agent_attention(
            self.x,
            self.agents,
            query=self.query,
            key=self.key,
            value=self.value,
            out=self.out,
            num_heads=self.heads,
            aggregation_bias=self.aggregation_bias,
            broadcast_bias=self.broadcast_bias,
            **options,
        )

    def plain(self, branches="", attention=F.agent_attention, **options):
        """Project, attend with `attention`, project."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value, agents = (
            tf.linear(x, *projection)
            for x, projection in [
                (self.x, self.query),
                (self.x, self.key),
                (self.x, self.value),
                (self.agents, self.query),
            ]
        )
        out = attention(
            *(split(x) for x in (query, key, value, agents)),
            aggregation_bias=self.aggregation_bias,
            broadcast_bias=self.broadcast_bias,
            **options,
        )
        out = out.transpose(1, 2).flatten(2)
        if "value" in branches:
            out = out + self.convolve(value, self.value_conv)
        if "input" in branches:
            out = out + tf.linear(self.convolve(self.x, self.input_conv), self.value.weight)
        return tf.linear(out, *self.out)

    def weighted(self):
        """Keywords of `absorbed_agent_attention` that every call needs."""
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "out": self.out,
            "num_heads": self.heads,
        }


def error(got, want):
    assert got.shape == want.shape
    return (got.double() - want).norm().item() / max(want.norm().item(), 1e-12)


def assert_same(got, want, tolerance=1e-12):
    assert got.shape == want.shape
    worst = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert worst <= tolerance, f"{worst:.1e} > {tolerance:.0e}"


def gradients(output, tensors):
    """Of a weighted sum of `output`, all weights different."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape).cos()
    return torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("branches", ["", "value", "input", "value and input"])
@pytest.mark.parametrize("shortcut", [0.0, 0.3])
@pytest.mark.parametrize("positions", list(itertools.product([False, True], repeat=2)), ids=str)
def test_equals_the_projected_layer(positions, shortcut, branches):
    options = {"scale": 0.7, "broadcast_scale": 0.4, "shortcut": shortcut, "branches": branches}
    for biases in itertools.product([False, True], repeat=4):
        case = Case(biases=biases, positions=positions).requires_grad()
        got, want = case.absorbed(**options), case.plain(**options)
        assert_same(got, want)
        got, want = gradients(got, case.tensors()), gradients(want, case.tensors())
        for mine, plain in zip(got, want, strict=True):
            assert (mine is None) == (plain is None)
            if mine is not None:
                assert_same(mine, plain, 1e-11)


@pytest.mark.parametrize("branches", ["", "value", "input"])
def test_gain_scales_only_what_comes_through_the_agents(branches):
    options = {"scale": 0.7, "broadcast_scale": 0.4, "shortcut": 0.3, "gain": 0.6, "branches": branches}
    case = Case().requires_grad()
    got, want = case.absorbed(**options), case.plain(**options)
    assert_same(got, want)
    for mine, plain in zip(gradients(got, case.tensors()), gradients(want, case.tensors()), strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            assert_same(mine, plain, 1e-11)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("branches", ["", "value", "input"])
def test_equals_the_oracle(grid, batch, branches):
    tokens = math.prod(grid)
    for agents in sorted({1, 2, tokens}):
        if agents > tokens:
            continue
        case = Case(grid=grid, agents=agents, batch=batch)
        for options in ({}, {"scale": 0.2}, {"broadcast_scale": 0.9, "shortcut": 0.075}):
            want = case.plain(branches, attention=oracles.agent_attention, **options)
            assert_same(case.absorbed(branches, **options), want)


def test_many_tokens_fold_the_value_and_output_projections():
    case = Case(grid=(40, 40), channels=6, head_dim=2, value_dim=3, out_channels=6, positions=(False, False))
    for options in ({"shortcut": 0.3}, {"branches": "input"}, {"branches": "input", "shortcut": 0.3}):
        assert_same(case.absorbed(**options), case.plain(**options))


def test_pooled_inputs_are_pooled_queries():
    case, size = Case(grid=(4, 6), agents=6), (2, 3)
    case.agents = F.pool_tokens(case.x, case.grid, size)
    heads = lambda x: x.unflatten(-1, (case.heads, -1)).transpose(1, 2)
    query, key, value = (tf.linear(case.x, *p) for p in (case.query, case.key, case.value))
    pooled = F.pool_tokens(query, case.grid, size)
    mixed = F.agent_attention(
        *(heads(x) for x in (query, key, value, pooled)),
        aggregation_bias=case.aggregation_bias,
        broadcast_bias=case.broadcast_bias,
    )
    assert_same(case.absorbed(), tf.linear(mixed.transpose(1, 2).flatten(2), *case.out))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 12), (1, 4, 12), (2, 2, 4, 12), (2, 1, 1, 12)], ids=str)
def test_biases_of_any_shape_that_broadcasts(shape):
    case = Case(grid=(3, 4)).requires_grad()
    case.aggregation_bias = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    case.broadcast_bias = case.aggregation_bias.transpose(-1, -2).sin()
    for bias in (case.aggregation_bias, case.broadcast_bias):
        bias.requires_grad_()
    assert_same(case.absorbed(), case.plain())
    tensors = [case.aggregation_bias, case.broadcast_bias]
    for mine, plain in zip(*(gradients(f(), tensors) for f in (case.absorbed, case.plain)), strict=True):
        assert_same(mine, plain)


def test_gradcheck():
    case = Case(grid=(2, 3), agents=2, batch=1, channels=4, head_dim=2, value_dim=1, out_channels=3).requires_grad()
    tensors = case.tensors()
    assert torch.autograd.gradcheck(lambda *_: case.absorbed("value and input", shortcut=0.2), tensors)
    assert torch.equal(*gradients(case.absorbed(), [case.key.bias]), torch.zeros(4, dtype=torch.float64))


def test_only_what_needs_a_gradient_has_one():
    for index in range(len(Case().tensors())):
        case = Case()
        tensor = case.tensors()[index].requires_grad_()
        got = gradients(case.absorbed("value and input"), [tensor])
        (want,) = gradients(case.plain("value and input"), [tensor])
        assert_same(got[0], want, 1e-11)


def test_second_derivatives_are_refused():
    case = Case().requires_grad()
    (grad,) = torch.autograd.grad(case.absorbed().sum(), [case.x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.sum().backward()


def test_training_keeps_no_projection():
    kept = []
    case = Case(grid=(16, 16), agents=2, channels=64, head_dim=32, value_dim=32, out_channels=64).requires_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.absorbed()
    of_tokens = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.numel() >= 16 * 16}
    softmaxes = 2 * 2 * case.heads * 2 * 256  # batch, both, heads, agents, tokens
    small = 64 * 64 * 8 * 4 + 2 * 2 * case.heads * 64 * 2 * 8 * 4
    assert sum(of_tokens.values()) <= (case.x.numel() + softmaxes) * 8 + small


# Half precision


def rounded(dtype, **options):
    """The layer in `dtype`, the same numbers in float64, and two-call attention in `dtype`: outputs and gradients."""
    results = []
    for kind, precision in (("plain", torch.float64), ("absorbed", dtype), ("plain", dtype)):
        case = Case(dtype=dtype, **options)
        for name, item in vars(case).items():
            if isinstance(item, Projection):
                setattr(case, name, Projection(*(t.to(precision) for t in item)))
            elif isinstance(item, torch.Tensor):
                setattr(case, name, item.to(precision))
        tensors = [t for t in case.requires_grad().tensors()[:12] if t is not case.key.bias]
        output = getattr(case, kind)()
        weights = torch.linspace(0, 99, output.numel(), dtype=torch.float64).cos().reshape(output.shape).to(dtype)
        results.append([output, *torch.autograd.grad((output * weights.to(precision)).sum(), tensors)])
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("agents", [1, 4, 16])
@pytest.mark.parametrize("gain", [0.5, 1.0, 4.0])
def test_rounds_no_more_than_the_projected_layer(dtype, agents, gain):
    sizes = {"channels": 48, "heads": 3, "head_dim": 16, "value_dim": 16, "out_channels": 48}
    exact, got, plain = rounded(dtype, agents=agents, gain=gain, grid=(8, 8), **sizes)
    assert got[0].dtype == dtype
    assert error(got[0], exact[0]) <= 1.05 * error(plain[0], exact[0])
    for mine, other, want in zip(got[1:], plain[1:], exact[1:], strict=True):
        # A single gradient is a sum of few roundings, so allow it some luck.
        assert error(mine, want) <= 1.25 * error(other, want) + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_extremes(dtype):
    for size in (0.0, 1e-7, 100.0, 4e3):
        case = Case(dtype=torch.float32, gain=3.0)
        case.x, case.agents = (case.x * size).to(dtype), (case.agents * size).to(dtype)
        for name in ("query", "key", "value", "out"):
            setattr(case, name, Projection(*(t.to(dtype) for t in getattr(case, name))))
        case.aggregation_bias = (case.aggregation_bias * 1e4).to(dtype)
        case.requires_grad()
        output = case.absorbed(shortcut=0.1)
        output.float().mean().backward()
        assert output.isfinite().all()
        assert all(t.grad is None or t.grad.isfinite().all() for t in case.tensors())


@pytest.mark.parametrize("branches", ["", "value", "input"])
def test_autocast(branches):
    case = Case(dtype=torch.float32, channels=32, head_dim=16, value_dim=16, out_channels=32).requires_grad()
    want = case.plain(branches, shortcut=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.absorbed(branches, shortcut=0.1)
        plain = case.plain(branches, shortcut=0.1)
    assert got.dtype == torch.bfloat16
    assert error(got, want.double()) <= 1.25 * error(plain, want.double()) + 2**-9
    gradient = torch.autograd.grad(got.float().sum(), case.x)[0]
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def test_float32_weights_serve_half_precision():
    case = Case(dtype=torch.bfloat16)
    want = case.absorbed("value", shortcut=0.1)
    for name in ("query", "key", "value", "out"):
        setattr(case, name, Projection(*(t.float() for t in getattr(case, name))))
    got = case.absorbed("value", shortcut=0.1)
    assert got.dtype == torch.bfloat16
    assert error(got, want.double()) <= 2**-7


# torch.compile and CUDA


@pytest.mark.parametrize("options", [{}, {"shortcut": 0.1}, {"branches": "value"}, {"branches": "input"}], ids=str)
def test_compiles_to_one_graph(options):
    torch._dynamo.reset()
    case = Case(dtype=torch.float32).requires_grad()
    with torch.random.fork_rng():
        modules = [nn.Linear(10, 8) for _ in range(2)]

    def layer(x):
        case.x = x
        case.query, case.key = (effective_projection(module) for module in modules)
        return case.absorbed(**options)

    x = case.x
    case.value = Projection(case.value.weight)
    want = layer(x)
    got = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees(dtype):
    sizes = {"channels": 64, "heads": 4, "head_dim": 16, "value_dim": 16, "out_channels": 64, "grid": (16, 16)}
    case = Case(dtype=dtype, **sizes)
    wide = Case(dtype=dtype, **sizes)
    for name, item in vars(case).items():
        if isinstance(item, Projection):
            setattr(case, name, Projection(*(t.cuda() for t in item)))
            setattr(wide, name, Projection(*(t.double() for t in item)))
        elif isinstance(item, torch.Tensor):
            setattr(case, name, item.cuda())
            setattr(wide, name, item.double())
    want, got, plain = wide.requires_grad().plain(), case.requires_grad().absorbed(), case.plain()
    limit = 1.05 * error(plain.cpu(), want) + (0 if dtype != torch.float32 else 1e-5)
    assert error(got.cpu(), want) <= limit
    tensors = [case.x, case.agents, case.query.weight, case.out.weight]
    wide_tensors = [wide.x, wide.agents, wide.query.weight, wide.out.weight]
    grads, plain_grads = gradients(got, tensors), gradients(plain, tensors)
    for mine, other, exact in zip(grads, plain_grads, gradients(want, wide_tensors), strict=True):
        assert error(mine.cpu(), exact) <= 1.5 * error(other.cpu(), exact) + torch.finfo(dtype).eps


# Errors


def names(*sizes):
    return re.compile("".join(rf"(?=.*\b{size}\b)" for size in sizes), re.DOTALL)


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        ({"x": (3, 10)}, (3, 10)),
        ({"agents": (2, 2, 4, 10)}, (2, 4, 10)),
        ({"agents": (3, 4, 10)}, (3, 2)),
        ({"agents": (2, 4, 9)}, (9, 10)),
        ({"query": Projection(torch.zeros(8, 9))}, (9, 10)),
        ({"key": Projection(torch.zeros(8, 9))}, (9, 10)),
        ({"key": Projection(torch.zeros(6, 10))}, (6, 8)),
        ({"value": Projection(torch.zeros(6))}, (6,)),
        ({"value": Projection(torch.zeros(6, 10), torch.zeros(5))}, (5, 6)),
        ({"out": Projection(torch.zeros(7, 8))}, (8, 6)),
        ({"num_heads": 3}, (3, 8)),
        ({"aggregation_bias": torch.zeros(2, 4, 11)}, (11, 12)),
        ({"broadcast_bias": torch.zeros(2, 12, 5)}, (5, 4)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "-".join(value),
)
def test_names_sizes_that_do_not_fit(change, sizes):
    case = Case(dtype=torch.float32)
    arguments = {"x": case.x, "agents": case.agents, **case.weighted()}
    arguments |= {name: torch.zeros(item) if type(item) is tuple else item for name, item in change.items()}
    x, agents = arguments.pop("x"), arguments.pop("agents")
    with pytest.raises(ValueError, match=names(*sizes)):
        absorbed_agent_attention(x, agents, **arguments)


def test_names_dtypes_that_do_not_fit():
    case = Case(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"(?=.*float64)(?=.*float32)"):
        absorbed_agent_attention(case.x, case.agents.double(), **case.weighted())
    with pytest.raises(ValueError, match=r"value(?=.*bfloat16)(?=.*float32)"):
        value = Projection(case.value.weight.bfloat16())
        absorbed_agent_attention(case.x, case.agents, **case.weighted() | {"value": value})
