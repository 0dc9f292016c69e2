"""The Triton kernels of agent attention on a GPU, against float64 on the CPU or the GPU."""

from __future__ import annotations

import pytest
import torch

from attngen.kernels import reference
from attngen.kernels.reference import AgentScales
from attngen.kernels.triton import agent as triton_agent
from attngen.kernels.triton.agent_call import why_not_size
from tests.kernels.triton.interpreter import start_with_nan
from tests.kernels.triton.test_agent import CASES, Case, compare, make_inputs, run

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def buffers(monkeypatch):
    """What a kernel leaves unwritten shows; float32 is multiplied in TF32."""
    start_with_nan(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_sizes(case):
    compare(case, tolerance=5e-3, device="cuda")


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("agents", [4, 16, 49, 64])
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(4096, 40), (1024, 64), (16384, 64), (4096, 72), (1000, 128), (300, 160)]
)
def test_large_sizes(tokens, head_dim, agents, dtype):
    biases = {"aggregation_bias": (1, 2, agents, tokens), "broadcast_bias": (1, 2, tokens, agents)}
    if why_not_size(agents, head_dim, dtype):
        pytest.skip("the kernels do not take so many agents")
    case = Case(tokens, head_dim, agents, batch=2, heads=2, **biases)
    compare_on_gpu(case, dtype)
    compare_on_gpu(case._replace(aggregation_bias=None, broadcast_bias=None, shortcut=0.075), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("grid", "head_dim"), [((64, 64), 64), ((24, 40), 72), ((5, 300), 40)])
def test_convolution(grid, head_dim, dtype):
    case = Case(grid[0] * grid[1], head_dim, 16, batch=2, heads=3, convolution=grid)
    compare_on_gpu(case, dtype)


@pytest.mark.parametrize("head_dim", [32, 96])
def test_other_head_sizes(head_dim):
    for dtype in TOLERANCES:
        compare_on_gpu(Case(500, head_dim, 32, keys=300, heads=2), dtype)


def test_masked_agents_and_queries_are_zero():
    case = Case(4096, 64, 16, heads=2, aggregation_bias=(16, 4096), broadcast_bias=(4096, 16))
    inputs = make_inputs(case)
    inputs["aggregation_bias"][1] = float("-inf")
    inputs["broadcast_bias"][7] = float("-inf")
    got = run(triton_agent.agent_attention, case, inputs, torch.bfloat16, "cuda")
    assert all(x.isfinite().all() for x in got.values()) and not got["output"][:, :, 7].any()


def test_two_runs_are_equal():
    case = Case(4096, 64, 64, batch=2, heads=4, aggregation_bias=(4, 64, 4096), broadcast_bias=(4, 4096, 64))
    inputs = make_inputs(case)
    first, second = (run(triton_agent.agent_attention, case, inputs, torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_keeps_little_more_than_its_inputs(monkeypatch):
    monkeypatch.undo()
    heads = [torch.randn(2, 8, 16384, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    agents = torch.randn(2, 8, 16, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (*heads, agents)]
    before = torch.cuda.memory_allocated()
    output = triton_agent.agent_attention(*leaves, AgentScales(0.125, 0.125))
    kept = torch.cuda.memory_allocated() - before - output.nbytes
    assert kept <= 0.02 * sum(x.nbytes for x in heads)


def test_compiles_whole():
    case = Case(1024, 64, 16, batch=2, heads=2, aggregation_bias=(16, 1024), broadcast_bias=(1024, 16), shortcut=0.1)
    compiled = torch.compile(triton_agent.agent_attention, fullgraph=True)
    inputs = make_inputs(case)
    got, want = (run(f, case, inputs, torch.bfloat16, "cuda") for f in (compiled, triton_agent.agent_attention))
    assert all(torch.allclose(got[name], want[name], atol=1e-2, rtol=1e-2) for name in want)


def compare_on_gpu(case: Case, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Against float64 on the same GPU, where large sizes take no time."""
    inputs = make_inputs(case)
    rounded = {name: x.to(dtype).double() for name, x in inputs.items()}
    wanted = run(reference.agent_attention, case, rounded, torch.float64, "cuda")
    got = run(triton_agent.agent_attention, case, inputs, dtype, "cuda")
    for name, want in wanted.items():
        difference = (got[name].double() - want).norm() / want.norm()
        assert difference <= (tolerance or TOLERANCES[dtype]), f"{name}: {difference:.2e}"
