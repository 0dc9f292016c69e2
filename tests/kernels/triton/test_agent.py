"""The Triton kernels of agent attention in Triton's interpreter, against float64."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from attngen.kernels import reference, sdpa
from attngen.kernels.reference import AgentScales, Convolution
from attngen.kernels.triton import agent as triton_agent
from attngen.kernels.triton import common as triton_common
from tests.cases import share
from tests.kernels.triton.interpreter import ROOT, needs_interpreter, run_interpreted, start_with_nan

SCALES, EQUAL = AgentScales(0.3, 0.5), AgentScales(1.0, 1.0)
"""Different factors, so that exchanging them shows, and equal ones."""


@needs_interpreter
def test_kernels_in_the_interpreter():
    run_interpreted(__file__, "-m", "not slow")


@needs_interpreter
@pytest.mark.slow
def test_all_sizes_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from attngen.kernels.triton import agent; print(agent.why_not)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_reasons_against_the_kernels(monkeypatch):
    q = torch.zeros(1, 1, 4, 8)
    monkeypatch.setattr(triton_common, "PLANS", {})
    monkeypatch.setattr(triton_common, "_has_triton", lambda: False)
    assert triton_agent.why_not(q, q, q, q) == "Triton is not installed"
    monkeypatch.setattr(triton_common, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a CUDA device" in str(triton_agent.why_not(q, q, q, q))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_agent.why_not(q, q, q, q) is None
    wide, many = torch.zeros(1, 1, 4, 161), torch.zeros(1, 1, 65, 8)
    assert "not in torch.float64" in str(triton_agent.why_not(*(x.double() for x in (q, q, q, q))))
    assert "several dtypes" in str(triton_agent.why_not(q, q, q.half(), q))
    assert "several devices" in str(triton_agent.why_not(q, q, q.to("meta"), q))
    assert "not 161" in str(triton_agent.why_not(wide, wide, q, wide))
    assert "not 161" in str(triton_agent.why_not(q, q, wide, q))
    assert "from 1 to 64 agents for heads of 8" in str(triton_agent.why_not(q, q, q, many))
    assert "no queries" in str(triton_agent.why_not(q[:, :, :0], q, q, q))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "most"),
    [(torch.bfloat16, 64, 64), (torch.bfloat16, 128, 64), (torch.float16, 160, 32), (torch.float32, 72, 32)],
)
def test_agents_that_stay_on_the_chip(monkeypatch, dtype, head_dim, most):
    """Four tiles of agents and two of tokens have to fit into the 99 KB of the smaller GPUs."""
    monkeypatch.setattr(triton_common, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 1, most + 1, head_dim, dtype=dtype)
    assert f"from 1 to {most} agents" in str(triton_agent.why_not(q, q, q, q))
    wide = torch.zeros(1, 1, 4, 129)
    assert "head sizes from 1 to 128 in torch.float32, not 129" in str(triton_agent.why_not(wide, wide, wide, wide))
    assert triton_agent.why_not(q, q, q, q[:, :, 1:]) is None


def test_gpus_that_are_too_old_and_exact_float32_are_refused(monkeypatch):
    """Before capability 8.0 there is no bfloat16, and half precision is compiled without matrix units."""
    from attngen.kernels.like import Like

    monkeypatch.setattr(triton_common, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_common, "_capability", lambda index: (7, 5))
    for dtype in (torch.float16, torch.bfloat16):
        q = Like((1, 1, 4, 8), dtype, torch.device("cuda", 0))
        assert "compute capability 8.0, this one has 7.5" in str(triton_agent.why_not(q, q, q, q))
    monkeypatch.setattr(triton_common, "_capability", lambda index: (8, 0))
    assert triton_agent.why_not(q, q, q, q) is None
    q = q._replace(dtype=torch.float32)
    monkeypatch.setattr(triton_common, "uses_tf32", lambda: False)
    assert "in TF32" in str(triton_agent.why_not(q, q, q, q))
    monkeypatch.setattr(triton_common, "uses_tf32", lambda: True)
    assert triton_agent.why_not(q, q, q, q) is None


class Case(NamedTuple):
    """Sizes and branches of one call; `convolution` is its grid, the biases are their shapes."""

    queries: int
    head_dim: int
    agents: int
    keys: int | None = None
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    aggregation_bias: tuple[int, ...] | None = None
    broadcast_bias: tuple[int, ...] | None = None
    shortcut: float = 0.0
    convolution: tuple[int, int] | None = None
    gain: float = 1.0


def make_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Leaves in float64, heads after tokens as projections give them."""
    generator = torch.Generator().manual_seed(hash(case[:3]) % 1000)
    keys, value_dim = case.keys or case.queries, case.value_dim or case.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query": (case.batch, case.queries, case.heads, case.head_dim),
        "key": (case.batch, keys, case.heads, case.head_dim),
        "value": (case.batch, keys, case.heads, value_dim),
        "agents": (case.batch, case.agents, case.heads, case.head_dim),
    }
    if case.aggregation_bias:
        shapes["aggregation_bias"] = case.aggregation_bias
    if case.broadcast_bias:
        shapes["broadcast_bias"] = case.broadcast_bias
    if case.convolution:
        shapes["weight"] = (case.heads * value_dim, 1, 3, 3)
        shapes["weight_bias"] = (case.heads * value_dim,)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def run(function, case: Case, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: str = "cpu"):
    """Output and the gradients of all inputs by name, for one fixed gradient of the output."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    heads = [leaves[name].transpose(1, 2) for name in ("query", "key", "value", "agents")]
    convolution = Convolution(leaves["weight"], leaves["weight_bias"], case.convolution) if case.convolution else None
    scales = SCALES._replace(shortcut=case.shortcut, gain=case.gain)
    biases = leaves.get("aggregation_bias"), leaves.get("broadcast_bias")
    output = function(*heads, scales, biases, convolution)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.to(device, dtype))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare(case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, device: str = "cpu") -> None:
    inputs = make_inputs(case)
    wanted = run(reference.agent_attention, case, {k: x.to(dtype).double() for k, x in inputs.items()}, torch.float64)
    got = run(triton_agent.agent_attention, case, inputs, dtype, device)
    for name, want in wanted.items():
        assert got[name].shape == want.shape and got[name].dtype == dtype, name
        # What moves all scores of a softmax alike has a gradient of zero, whose rounding is measured against one.
        size = want.norm() if want.norm() > 1e-9 else want.numel() ** 0.5
        difference = (got[name].cpu().double() - want).norm() / size
        assert difference <= tolerance, f"{name}: {difference:.2e}"


@pytest.fixture(autouse=True)
def buffers(monkeypatch):
    """The shapes of the buffers that the kernels got, which were full of NaN."""
    return start_with_nan(monkeypatch)


# Every count of tokens, head size and count of agents occurs, and each branch with one and with two parts of a head.
CASES = [
    Case(1, 32, 1, aggregation_bias=(1, 1, 1, 1), broadcast_bias=(1, 1)),
    Case(1, 8, 3, shortcut=0.5, convolution=(1, 1)),
    Case(63, 40, 4, keys=100, value_dim=72, heads=2),
    Case(63, 64, 49, aggregation_bias=(1, 1, 49, 63), broadcast_bias=(1, 1, 63, 49), shortcut=0.075),
    Case(256, 16, 16, convolution=(8, 32), aggregation_bias=(1, 1, 16, 256), broadcast_bias=(1, 1, 256, 16)),
    Case(40, 72, 16, convolution=(4, 10), shortcut=0.5),
    Case(300, 32, 64, keys=77, value_dim=16),
    Case(60, 40, 33, aggregation_bias=(1, 1, 33, 60), broadcast_bias=(1, 1, 60, 33), convolution=(12, 5)),
    Case(33, 80, 20, keys=20, value_dim=24, batch=2),
    Case(1000, 16, 4, shortcut=0.2),
    Case(40, 128, 16, batch=2),
    Case(35, 20, 5, value_dim=13, heads=3, convolution=(5, 7)),
    Case(70, 120, 16, keys=40),
    Case(300, 32, 16, heads=2, shortcut=0.2, gain=0.6),
    Case(12, 16, 4, aggregation_bias=(1, 1, 4, 12), broadcast_bias=(1, 1, 12, 4), convolution=(3, 4), gain=1.7),
]


@pytest.mark.parametrize("case", share(2, CASES))
def interpreted_gradients_match_float64(case):
    compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("agents", [1, 4, 16, 49, 64])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 128])
@pytest.mark.parametrize("tokens", [1, 63, 256, 300, 1000])
def interpreted_all_sizes(tokens, head_dim, agents):
    if triton_agent.why_not(*(torch.zeros(1, 1, n, head_dim) for n in (tokens, tokens, tokens, agents))):
        pytest.skip("too many agents for float32")
    compare(Case(tokens, head_dim, agents, aggregation_bias=(1, agents, tokens), broadcast_bias=(tokens, agents)))


# Batch 5 of 2 heads: several programs share the batch of a gradient, and the last has fewer elements.
BIASES = [
    ((1, 2, 5, 20), (1, 2, 17, 5)),
    ((5, 1, 5, 1), (5, 2, 17, 5)),
    ((1, 20), (5,)),
    ((2, 1, 20), (17, 1)),
    ((5, 2, 1, 1), (1, 1, 1, 1)),
    (None, (2, 17, 5)),
    ((5, 20), None),
]


@pytest.mark.parametrize("biases", share(2, BIASES))
def interpreted_biases_broadcast(biases):
    compare(Case(17, 8, 5, 20, 16, 5, 2, *biases))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def interpreted_half_precision(dtype, tolerance):
    case = Case(70, 40, 20, aggregation_bias=(1, 20, 70), broadcast_bias=(70, 20), shortcut=0.1, convolution=(7, 10))
    compare(case, dtype, tolerance)


def interpreted_masks_and_large_scores():
    """A bias of -inf over whole splits and tiles, and scores beyond the range of an exponential, without NaN."""
    agents = 16
    case = Case(300, 16, agents, aggregation_bias=(agents, 300), broadcast_bias=(300, agents))
    inputs = make_inputs(case)
    inputs["query"] *= 40
    inputs["key"] *= 40
    # Far below zero for all keys, so that a score of zero beyond the last key would exceed the sum of the others.
    inputs["aggregation_bias"] -= 300
    inputs["aggregation_bias"][:, :260] = float("-inf")
    inputs["broadcast_bias"][:, 3:-3] = float("-inf")
    wanted = run(reference.agent_attention, case, {k: x.float().double() for k, x in inputs.items()}, torch.float64)
    got = run(triton_agent.agent_attention, case, inputs, torch.float32)
    for name, want in wanted.items():
        assert (got[name] - want).norm() <= 3e-4 * want.norm(), name


@pytest.mark.parametrize("processors", [1, 6])
@pytest.mark.parametrize("trained", [False, True])
def interpreted_masked_agents_and_queries_are_zero(monkeypatch, processors, trained):
    """An agent without any key gives zeros, and so does a query without any agent, in one split and in several."""
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: processors)
    case = Case(520, 16, 4, aggregation_bias=(4, 520), broadcast_bias=(520, 4))
    inputs = {name: x.float() for name, x in make_inputs(case).items()}
    inputs["aggregation_bias"][1] = float("-inf")
    inputs["broadcast_bias"][7] = float("-inf")
    wanted = run(sdpa.agent_attention, case, {k: x.double() for k, x in inputs.items()}, torch.float64)
    heads = [inputs[name].transpose(1, 2) for name in ("query", "key", "value", "agents")]
    if not trained:
        got = triton_agent.agent_attention(*heads, SCALES, (inputs["aggregation_bias"], inputs["broadcast_bias"]))
        assert torch.allclose(got, wanted["output"].float(), atol=1e-5) and not got[:, :, 7].any()
        return
    for name, result in run(triton_agent.agent_attention, case, inputs, torch.float32).items():
        assert torch.allclose(result, wanted[name].float(), atol=1e-5), name


def small(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    inputs = make_inputs(case)
    return [inputs[name].to(dtype).transpose(1, 2) for name in ("query", "key", "value", "agents")]


def interpreted_strided_inputs_are_read_in_place(monkeypatch):
    """Parts of one projection of all three, and a head size that no vector load divides."""
    for head_dim, align in ((24, 8), (12, 1)):
        query, key, value, agents = small(Case(50, head_dim, 4, heads=2, batch=2))
        packed = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)
        views = [x.transpose(1, 2) for x in packed.unbind(2)]
        assert triton_common.alignment(*views) == align
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("an input was copied"))
            got = triton_agent.agent_attention(*views, agents, SCALES)
        want = triton_agent.agent_attention(*(x.contiguous() for x in (query, key, value, agents)), SCALES)
        assert torch.equal(got, want)
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value, agents)]
    assert torch.equal(triton_agent.agent_attention(*columns, SCALES), want)


def interpreted_output_joins_its_heads_without_a_copy():
    query, key, value, agents = small(Case(50, 16, 4, heads=3, batch=2))
    output = triton_agent.agent_attention(query, key, value, agents, SCALES)
    assert output.shape == (2, 3, 50, 16)
    assert output.transpose(1, 2).is_contiguous()


def interpreted_biases_are_never_expanded(buffers):
    case = Case(90, 8, 4, batch=6, aggregation_bias=(4, 90), broadcast_bias=(90, 4))
    inputs = {name: x.float() for name, x in make_inputs(case).items()}
    heads = [inputs[name].transpose(1, 2) for name in ("query", "key", "value", "agents")]
    triton_agent.agent_attention(*heads, SCALES, (inputs["aggregation_bias"], inputs["broadcast_bias"]))
    assert buffers and all(sorted((4, 90)) != sorted(shape[-2:]) for shape in buffers)


def interpreted_two_runs_are_equal():
    case = Case(70, 8, 4, batch=2, aggregation_bias=(4, 70), broadcast_bias=(70, 4), convolution=(7, 10))
    first, second = (run(triton_agent.agent_attention, case, make_inputs(case), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def interpreted_without_gradients_equals_with():
    heads = small(Case(300, 16, 16))
    want = triton_agent.agent_attention(*(x.detach().requires_grad_() for x in heads), SCALES)
    assert torch.equal(triton_agent.agent_attention(*heads, SCALES), want)


def interpreted_a_plan_serves_all_calls_of_a_shape():
    heads, others = small(Case(300, 16, 16)), small(Case(299, 16, 16))
    first, second = (triton_agent.agent_attention(*heads, SCALES._replace(shortcut=k)) for k in (0.0, 0.5))
    assert len(triton_common.PLANS) == 2 and not torch.equal(first, second)
    assert torch.equal(triton_agent.agent_attention(*heads, SCALES), first) and len(triton_common.PLANS) == 2
    triton_agent.agent_attention(*others, SCALES)
    assert len(triton_common.PLANS) == 3


def interpreted_heads_are_beside_each_other():
    """Programs follow the heads of a token, which share sectors of memory; with a shared bias the batch."""
    from tests.kernels.triton.programs import places

    plain, shared = places(2, 3, 4, False), places(2, 3, 4, True)
    assert [h for _, h, _ in plain[:6]] == [0, 1, 2, 0, 1, 2] and len(set(plain)) == 24
    assert [b for b, _, _ in shared[:4]] == [0, 1, 0, 1] and len(set(shared)) == 24


def interpreted_needless_gradients_cost_nothing(buffers):
    query, key, value, agents = small(Case(20, 8, 4))
    bias = torch.zeros(4, 20)
    query.requires_grad_()
    triton_agent.agent_attention(query, key, value, agents, EQUAL, (bias, bias.T)).sum().backward()
    assert (1, 20, 1, 8) in buffers and (1, 1, 4, 20) not in buffers and (1, 1, 20, 4) not in buffers
    heads_last = buffers.count((1, 20, 1, 8))  # the output and the gradient of the queries
    buffers.clear()
    key.requires_grad_()
    triton_agent.agent_attention(query, key, value, agents, EQUAL, (bias, bias.T)).sum().backward()
    assert heads_last == 2 and buffers.count((1, 20, 1, 8)) == 4 and (1, 1, 4, 20) not in buffers
    assert key.grad is not None and agents.grad is None and value.grad is None


def interpreted_single_gradients():
    """Each input alone: what it needs is computed whatever the others need."""
    case = Case(30, 8, 4, aggregation_bias=(4, 30), broadcast_bias=(30, 4), convolution=(5, 6))
    inputs = {name: x.float() for name, x in make_inputs(case).items()}
    wanted = run(reference.agent_attention, case, inputs, torch.float64)
    grad = torch.randn(1, 1, 30, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    for name in inputs:
        leaves = {other: x.clone().requires_grad_(other == name) for other, x in inputs.items()}
        heads = [leaves[other].transpose(1, 2) for other in ("query", "key", "value", "agents")]
        biases = leaves["aggregation_bias"], leaves["broadcast_bias"]
        convolution = Convolution(leaves["weight"], leaves["weight_bias"], (5, 6))
        output = triton_agent.agent_attention(*heads, SCALES, biases, convolution)
        (gradient,) = torch.autograd.grad(output, leaves[name], grad)
        assert torch.allclose(gradient.double(), wanted[name], rtol=1e-4, atol=1e-5), name


def interpreted_second_derivatives_are_refused():
    query, key, value, agents = (x.requires_grad_() for x in small(Case(10, 8, 4)))
    output = triton_agent.agent_attention(query, key, value, agents, EQUAL)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def interpreted_wrong_shapes_are_refused():
    query, key, value, agents = small(Case(12, 8, 4))
    for tensors, name in (
        ((query, key[:, :, :, :4], value, agents), "key"),
        ((query, key, value[:, :, :9], agents), "key"),  # the values count
        ((query, key, value, agents[..., :4]), "agents"),
    ):
        with pytest.raises(ValueError, match=f"the {name} has shape"):
            triton_agent.agent_attention(*tensors, EQUAL)
        with pytest.raises(ValueError, match=f"the {name} has shape"):
            triton_agent._forward.operator(*tensors, None, None, None, None, [1.0, 1.0, 0.0, 1.0], [0, 0])
    with pytest.raises(ValueError, match=r"shape \(3, 12\) does not broadcast to \(1, 1, 4, 12\)"):
        triton_agent.agent_attention(query, key, value, agents, EQUAL, (torch.zeros(3, 12), None))


def interpreted_wrong_branches_are_refused():
    query, key, value, agents = small(Case(12, 8, 4, keys=10))
    with pytest.raises(ValueError, match="10 values and 12 queries"):
        triton_agent.agent_attention(query, key, value, agents, EQUAL._replace(shortcut=0.5))
    weight = torch.zeros(8, 1, 3, 3)
    with pytest.raises(ValueError, match="10 values and 12 queries"):
        triton_agent.agent_attention(
            query, key, value, agents, EQUAL, convolution=Convolution(weight, None, (3, 4))
        )  # fmt: skip
    with pytest.raises(ValueError, match="3 x 3 is not 10"):
        triton_agent.agent_attention(key, key, value, agents, EQUAL, convolution=Convolution(weight, None, (3, 3)))
    with pytest.raises(ValueError, match=r"shape \(7, 1, 3, 3\), not \(8, 1, 3, 3\)"):
        triton_agent.agent_attention(
            key, key, value, agents, EQUAL, convolution=Convolution(weight[:7], None, (2, 5))
        )  # fmt: skip


def interpreted_convolution_without_a_bias():
    query, key, value, agents = small(Case(12, 8, 4))
    convolution = Convolution(torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(1)), None, (3, 4))
    got = triton_agent.agent_attention(query, key, value, agents, EQUAL, convolution=convolution)
    want = reference.agent_attention(query, key, value, agents, EQUAL, convolution=convolution)
    assert torch.allclose(got, want, atol=1e-5)


def interpreted_autocast_casts_what_attention_casts():
    """Like `F.scaled_dot_product_attention`: half precision in and out, gradients in the dtype of the leaves."""
    case = Case(30, 16, 4, aggregation_bias=(4, 30), broadcast_bias=(30, 4), convolution=(5, 6))
    leaves = {name: x.float().requires_grad_() for name, x in make_inputs(case).items()}
    heads = [leaves[name].transpose(1, 2) for name in ("query", "key", "value", "agents")]
    biases = leaves["aggregation_bias"], leaves["broadcast_bias"]
    convolution = Convolution(leaves["weight"], leaves["weight_bias"], (5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        output = triton_agent.agent_attention(*heads, SCALES, biases, convolution)
    assert output.dtype == torch.bfloat16
    want = triton_agent.agent_attention(*(x.bfloat16() for x in heads), SCALES, biases, convolution)
    assert torch.equal(output, want)
    output.float().square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32, name
        assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0, name


def interpreted_operators_pass_opcheck():
    case = Case(6, 8, 3, aggregation_bias=(3, 6), broadcast_bias=(1, 6, 3), convolution=(2, 3))
    inputs = {name: x.float() for name, x in make_inputs(case).items()}
    heads = [inputs[name].transpose(1, 2) for name in ("query", "key", "value", "agents")]
    biases, weights = [inputs["aggregation_bias"], inputs["broadcast_bias"]], [inputs["weight"], inputs["weight_bias"]]
    numbers, grid = [0.3, 0.5, 0.5, 0.9], [2, 3]
    leaves = [x.detach().requires_grad_() for x in (*heads, *biases)]
    forward, backward = triton_agent._forward.operator, triton_agent._backward.operator
    torch.library.opcheck(forward, (*leaves, *weights, numbers, grid))
    torch.library.opcheck(forward, (*heads, None, None, None, None, [0.3, 0.5, 0.0, 1.0], [0, 0]))
    output, state = forward(*heads, *biases, *weights, numbers, grid)
    common = (torch.ones_like(output), *heads, *biases, weights[0], state, numbers, grid)
    torch.library.opcheck(backward, (*common, [True, True, True]))
    torch.library.opcheck(backward, (*common, [False, False, False]))


def interpreted_compiles_whole():
    case = Case(20, 8, 4, batch=2, aggregation_bias=(4, 20), broadcast_bias=(20, 4), shortcut=0.1, convolution=(4, 5))
    compiled = torch.compile(triton_agent.agent_attention, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(case)
    got, want = (run(f, case, inputs, torch.float32) for f in (compiled, triton_agent.agent_attention))
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-6), name
    larger = small(Case(30, 8, 4, batch=2))
    want = triton_agent.agent_attention(*larger, SCALES)
    assert torch.allclose(compiled(*larger, SCALES), want, atol=1e-6)
