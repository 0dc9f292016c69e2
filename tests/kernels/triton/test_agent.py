"""The Triton kernels of agent attention on the CPU: in Triton's interpreter against float64, and compiled for a GPU.

Triton decides at its import, and again for every kernel it decorates, whether kernels are interpreted. Other tests may
have imported it before, so the checks run in processes of their own, with TRITON_INTERPRET set from the start: pytest
collects `test_*` here and starts itself on this file, where it collects `interpreted_*` or `compiled_*` instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from attngen.kernels import reference
from attngen.kernels.reference import AgentScales, Convolution
from attngen.kernels.triton import agent as triton_agent
from attngen.kernels.triton import common as triton_common
from tests.cases import share

ROOT = Path(__file__).parents[3]
SCALES, EQUAL = AgentScales(0.3, 0.5), AgentScales(1.0, 1.0)
"""Different factors, so that exchanging them shows, and equal ones."""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def interpreter_reads_numpy() -> bool:
    """Triton 3.6 converts arrays of one element to integers, which newer versions of NumPy refuse."""
    import numpy
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version > (3, 6) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)


needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or not interpreter_reads_numpy(), reason="needs Triton, and NumPy as old as it"
)


@needs_interpreter
def test_kernels_in_the_interpreter():
    run_in_process("interpreted", "1", "-m", "not slow")


@needs_interpreter
@pytest.mark.slow
def test_all_sizes_in_the_interpreter():
    run_in_process("interpreted", "1", "-m", "slow")


@needs_triton
def test_kernels_compile_for_a_gpu():
    run_in_process("compiled", "0")


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from attngen.kernels.triton import agent; print(agent.why_not)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_reasons_against_the_kernels(monkeypatch):
    q = torch.zeros(1, 1, 4, 8)
    monkeypatch.setattr(triton_common, "_has_triton", lambda: False)
    assert triton_agent.why_not(q, q, q, q) == "Triton is not installed"
    monkeypatch.setattr(triton_common, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a CUDA device" in str(triton_agent.why_not(q, q, q, q))
    with pytest.raises(ValueError, match="cannot run here: .* need a CUDA device"):
        triton_agent.agent_attention(q, q, q, q, EQUAL)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_agent.why_not(q, q, q, q) is None
    wide, many = torch.zeros(1, 1, 4, 257), torch.zeros(1, 1, 257, 8)
    assert "not in torch.float64" in str(triton_agent.why_not(*(x.double() for x in (q, q, q, q))))
    assert "several dtypes" in str(triton_agent.why_not(q, q, q.half(), q))
    assert "several devices" in str(triton_agent.why_not(q, q, q.to("meta"), q))
    assert "not 257" in str(triton_agent.why_not(wide, wide, q, wide))
    assert "not 257" in str(triton_agent.why_not(q, q, wide, q))
    assert "agents, not 257" in str(triton_agent.why_not(q, q, q, many))
    assert "no queries" in str(triton_agent.why_not(q[:, :, :0], q, q, q))


@pytest.mark.parametrize(
    ("width", "parts"),
    [(1, (16, 0)), (16, (16, 0)), (32, (32, 0)), (40, (32, 16)), (56, (64, 0)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (160, (128, 32)), (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_widths_are_cut_in_powers_of_two(width, parts):
    assert triton_common.split_width(width) == parts


def run_in_process(prefix: str, interpret: str, *options: str) -> None:
    """Run the functions of this file named `prefix`_* as tests in a process with TRITON_INTERPRET as given."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"python_functions={prefix}_*"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # options of the outer run, such as its number of processes
    done = subprocess.run(
        [*command, *options, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
def buffers_start_as_nan(monkeypatch):
    """What a kernel leaves unwritten, or reads before it is written, shows."""

    def nan(shape, dtype, device):
        return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(triton_common, "empty", nan)


# Every count of tokens, head size and count of agents occurs, and each branch with one and with two parts of a head.
CASES = [
    Case(1, 32, 1, aggregation_bias=(1, 1, 1, 1), broadcast_bias=(1, 1)),
    Case(1, 8, 3, shortcut=0.5, convolution=(1, 1)),
    Case(63, 40, 4, keys=100, value_dim=72, heads=2),
    Case(63, 64, 49, aggregation_bias=(1, 1, 49, 63), broadcast_bias=(1, 1, 63, 49), shortcut=0.075),
    Case(256, 16, 16, convolution=(8, 32), aggregation_bias=(1, 1, 16, 256), broadcast_bias=(1, 1, 256, 16)),
    Case(40, 72, 16, convolution=(4, 10), shortcut=0.5),
    Case(300, 32, 64, keys=77, value_dim=16),
    Case(60, 40, 100, aggregation_bias=(1, 1, 100, 60), broadcast_bias=(1, 1, 60, 100), convolution=(12, 5)),
    Case(33, 80, 70, keys=20, value_dim=24, batch=2),
    Case(1000, 16, 4, shortcut=0.2),
    Case(40, 128, 16, batch=2),
    Case(35, 20, 5, value_dim=13, heads=3, convolution=(5, 7)),
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


def interpreted_shared_bias_over_many_batches(monkeypatch):
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: 1)
    compare(Case(17, 8, 5, 20, 16, 5, 1, (5, 20), (17, 5)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def interpreted_half_precision(dtype, tolerance):
    case = Case(70, 40, 20, aggregation_bias=(1, 20, 70), broadcast_bias=(70, 20), shortcut=0.1, convolution=(7, 10))
    compare(case, dtype, tolerance)
    compare(case._replace(agents=70, aggregation_bias=None, broadcast_bias=None), dtype, tolerance)


@pytest.mark.parametrize("agents", [16, 70])
def interpreted_masks_and_large_scores(agents):
    """A bias of -inf over whole splits and tiles, and scores beyond the range of an exponential, without NaN."""
    case = Case(100, 16, agents, aggregation_bias=(agents, 100), broadcast_bias=(100, agents))
    inputs = make_inputs(case)
    inputs["query"] *= 40
    inputs["key"] *= 40
    # Far below zero for all keys, so that a score of zero beyond the last key would exceed the sum of the others.
    inputs["aggregation_bias"] -= 300
    inputs["aggregation_bias"][:, :80] = float("-inf")
    inputs["broadcast_bias"][:, 3:-3] = float("-inf")
    wanted = run(reference.agent_attention, case, {k: x.float().double() for k, x in inputs.items()}, torch.float64)
    got = run(triton_agent.agent_attention, case, inputs, torch.float32)
    for name, want in wanted.items():
        assert (got[name] - want).norm() <= 3e-4 * want.norm(), name


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


def interpreted_biases_are_never_expanded(monkeypatch):
    case = Case(90, 8, 4, batch=6, aggregation_bias=(4, 90), broadcast_bias=(90, 4))
    sizes = []
    full = triton_common.empty
    monkeypatch.setattr(triton_common, "empty", lambda shape, *rest: sizes.append(shape) or full(shape, *rest))
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: 1)
    compare(case)
    assert sizes and all((6, 4, 90) != (shape[0], *shape[-2:]) for shape in sizes)


def interpreted_two_runs_are_equal():
    case = Case(70, 8, 4, batch=2, aggregation_bias=(4, 70), broadcast_bias=(70, 4), convolution=(7, 10))
    first, second = (run(triton_agent.agent_attention, case, make_inputs(case), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def interpreted_without_gradients_equals_with(monkeypatch):
    """Splits are combined by the broadcast itself, or before it where they are many."""
    from attngen.kernels.triton import agent_launch as triton_agent_launch

    heads = small(Case(300, 16, 16))
    want = triton_agent.agent_attention(*(x.detach().requires_grad_() for x in heads), SCALES)
    assert torch.allclose(triton_agent.agent_attention(*heads, SCALES), want, rtol=0, atol=1e-6)
    monkeypatch.setattr(triton_agent_launch, "_COMBINED_IN_PLACE", 0)
    assert torch.equal(triton_agent.agent_attention(*heads, SCALES), want)


def interpreted_needless_gradients_cost_nothing(monkeypatch):
    launched = []
    launch = triton_common.launch
    monkeypatch.setattr(
        triton_common, "launch", lambda kernel, *a, **k: launched.append(kernel.__name__) or launch(kernel, *a, **k)
    )
    query, key, value, agents = small(Case(20, 8, 4))
    bias = torch.zeros(4, 20)
    query.requires_grad_()
    triton_agent.agent_attention(query, key, value, agents, EQUAL, (bias, bias.T)).sum().backward()
    assert "broadcast_backward" in launched
    assert not any("bias" in name or "aggregation" in name for name in launched)
    launched.clear()
    key.requires_grad_()
    triton_agent.agent_attention(query, key, value, agents, EQUAL, (bias, bias.T)).sum().backward()
    assert "aggregation_backward" in launched and not any("bias" in name for name in launched)
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
    biases = [inputs["aggregation_bias"], inputs["broadcast_bias"]]
    branches = [0.5, inputs["weight"], inputs["weight_bias"], 2, 3]
    leaves = [x.detach().requires_grad_() for x in (*heads, *biases)]
    torch.library.opcheck(triton_agent._forward, (*leaves[:4], 0.3, 0.5, *leaves[4:], *branches, True))
    torch.library.opcheck(triton_agent._forward, (*heads, 0.3, 0.5, None, None, 0.0, None, None, 0, 0, False))
    output, aggregated, lse = triton_agent._forward(*heads, 0.3, 0.5, *biases, *branches, True)
    common = (torch.ones_like(output), *heads, aggregated, lse, 0.3, 0.5, *biases, 0.5, inputs["weight"], 2, 3)
    torch.library.opcheck(triton_agent._backward, (*common, True, True, True))
    torch.library.opcheck(triton_agent._backward, (*common, False, False, False))


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


class NoDevice:
    """What Triton asks of a driver before it compiles: the target, here a Hopper GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compile_only(monkeypatch):
    """Launches compile their kernel instead; the list it gives fills with (name, stack bytes, shared bytes)."""
    import triton

    compiled = []

    def warm_up(kernel, programs, *arguments, **constants):
        binary = kernel.warmup(*arguments, grid=(programs,), **constants)
        compiled.append((kernel.__name__, stack_bytes(binary.asm["cubin"]), binary.metadata.shared))

    # Never reset: without a GPU there is no driver to go back to, and this process has no other use for one.
    triton.runtime.driver.set_active(NoDevice())
    monkeypatch.setattr(triton_common, "launch", warm_up)
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: 132)
    return compiled


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread has, which is where registers are spilt to: the frame size in the binary."""
    import struct

    sections, frames = elf_sections(cubin), []
    for content in (content for name, content in sections.items() if name.startswith(".nv.info")):
        at = 0
        while at < len(content):
            form, attribute, size = struct.unpack_from("<BBH", content, at)
            # Attribute 0x11 is a function's frame size: its symbol and the bytes.
            if (form, attribute) == (4, 0x11):
                frames.append(struct.unpack_from("<II", content, at + 4)[1])
            at += 4 + (size if form == 4 else 0)
    assert frames, "the binary does not say how large its frames are"
    return max(frames)


def elf_sections(binary: bytes) -> dict[str, bytes]:
    import struct

    (table,) = struct.unpack_from("<Q", binary, 40)
    entry, count, names = struct.unpack_from("<HHH", binary, 58)
    headers = [struct.unpack_from("<IIQQQQ", binary, table + entry * i) for i in range(count)]
    text = binary[headers[names][4] :]
    return {text[h[0] : text.index(b"\0", h[0])].decode(): binary[h[4] : h[4] + h[5]] for h in headers if h[1] != 8}


@pytest.mark.parametrize(
    ("head_dim", "agents", "dtype", "branches"),
    [(64, 16, torch.bfloat16, True), (72, 100, torch.float16, False)],
)
def compiled_kernels_fit_a_multiprocessor(compile_only, monkeypatch, head_dim, agents, dtype, branches):
    """For Hopper: 227 KB of shared memory, and registers that spill little or nothing."""
    from attngen.kernels.triton import agent_launch as triton_agent_launch

    monkeypatch.setattr(triton_common, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    query = torch.zeros(2, 4096, 8, head_dim, dtype=dtype).transpose(1, 2)
    pooled = query[:, :, :agents]
    biases = [torch.zeros(8, agents, 4096, dtype=dtype), torch.zeros(8, 4096, agents, dtype=dtype)]
    biases = biases if branches else [None, None]
    weights = [torch.zeros(8 * head_dim, 1, 3, 3), torch.zeros(8 * head_dim)] if branches else [None, None]
    call = (query, query, query, pooled)
    output, aggregated, lse = triton_agent_launch.forward(
        *call, 0.3, 0.5, *biases, 0.1 if branches else 0.0, *weights, (64, 64), True
    )
    triton_agent_launch.backward(
        output, *call, aggregated, lse, 0.3, 0.5, *biases, 0.1, weights[0], (64, 64), (True, branches, branches)
    )
    names = {name for name, _, _ in compile_only}
    assert {"aggregate", "combine", "broadcast", "broadcast_backward", "aggregation_backward"} <= names
    assert ("query_backward" in names) == (agents == 100)
    for name, stack, shared in compile_only:
        assert stack <= 128 and shared <= 227 * 1024, (name, stack, shared)
