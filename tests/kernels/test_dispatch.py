"""Which path runs: looked up in measurements, overridden by an argument, always the same numbers."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attngen
from attngen import AgentAttention
from attngen import functional as F
from attngen.kernels import crossovers, dispatch
from attngen.kernels.crossovers import Choice
from attngen.kernels.dispatch import Problem
from attngen.kernels.reference import AgentScales, Convolution
from tests import oracles
from tests.builders.hosts import HOSTS, fresh

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(**changes):
    given = {"device": "cpu", "dtype": "float32", "batch_heads": 8, "tokens": 1024, "agents": 16, "head_dim": 64}
    return Problem(**{**given, **changes})


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Put a file of measurements in force: `measured({kind: rows}, absorbed={...})`."""

    def put(calls, absorbed=None, device="cpu"):
        part = {"machine": {}, "calls": calls, "absorbed": absorbed or {}}
        path = tmp_path / f"table{len(list(tmp_path.iterdir()))}.json"
        file = {"format": "attngen-crossovers", "version": 1, "devices": {device: part}}
        path.write_text(json.dumps(file))
        crossovers.use_crossovers(path)

    yield put
    crossovers.use_crossovers(None)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def path_taken(*args, **kwargs):
    with Operators() as ran:
        F.agent_attention(*args, **kwargs)
    attention = sum("scaled_dot_product" in name for name in ran.names)
    return {2: "sdpa", 0: "softmax"}[attention]


# The choice


def test_the_nearest_measured_size_decides(measured):
    rows = [[8, 64, tokens, agents, f"{tokens}/{agents}", 2.0] for tokens in (256, 1024) for agents in (4, 64)]
    measured({"agent float32 forward plain": rows})

    def found(**changes):
        return dispatch.choose_for_agents(problem(**changes), why_not_triton=lambda: None).kernel

    assert found(tokens=256, agents=4) == "256/4" and found(tokens=1, agents=1) == "256/4"
    assert found(tokens=512, agents=16) == "256/4" and found(tokens=513, agents=17) == "1024/64"
    assert found(tokens=10**6, agents=10**4, batch_heads=10**4, head_dim=7) == "1024/64"
    for unlike in ({"dtype": "bfloat16"}, {"training": True}, {"bias": True}, {"device": "cuda-9.0"}):
        assert dispatch.choose_for_agents(problem(**unlike)) == Choice("sdpa")


def test_a_hole_in_the_measurements_is_not_a_measurement(measured):
    measured({"agent float32 forward plain": [[8, 64, 64, 4, "matmul", 2.0], [8, 64, 1024, 64, "matmul", 2.0]]})
    assert dispatch.choose_for_agents(problem(tokens=64, agents=64)) == Choice("sdpa")


def test_no_measurements_of_a_device_claim_nothing(measured):
    measured({}, device="cuda-1.2")
    assert dispatch.choose_for_agents(problem()) == Choice("sdpa", None, None)
    assert dispatch.choose_for_linear(problem(agents=0)) == Choice("reference", None, None)
    assert dispatch.absorbed_cost(torch.zeros(1)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tensors_are_looked_up_by_what_they_are(measured, dtype, training, bias):
    kinds = [
        f"agent {name} {kind} {added}"
        for name in ("float32", "bfloat16")
        for kind in ("forward", "training")
        for added in ("plain", "bias")
    ]
    measured({kind: [[1, 1, 1, 1, kind, 1.0]] for kind in kinds})
    query = normal(1, 2, 9, 4, dtype=dtype).requires_grad_(training)
    table = [normal(1, 2, 3, 9) if bias else None, None]
    choice = dispatch.choose_agent_kernel(query, query, query, query[:, :, :3], table)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    added = "bias" if bias else "plain"
    assert choice.kernel == f"agent {name} {'training' if training else 'forward'} {added}"
    with torch.no_grad():
        choice = dispatch.choose_agent_kernel(query, query, query, query[:, :, :3], table)
    assert choice.kernel == f"agent {name} forward {added}"


def test_autocast_is_what_decides_where_it_is_on(measured):
    measured({"agent bfloat16 forward plain": [[1, 1, 1, 1, "matmul", 1.0]]})
    query = normal(1, 2, 9, 4, dtype=torch.float32)
    assert dispatch.choose_agent_kernel(query, query, query, query).kernel == "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.choose_agent_kernel(query, query, query, query).kernel == "matmul"


def test_what_was_measured_to_win_is_what_runs(measured):
    query, agents = normal(1, 2, 32, 8, dtype=torch.float32), normal(1, 2, 4, 8, dtype=torch.float32)
    for kernel, path in (("sdpa", "sdpa"), ("matmul", "softmax")):
        measured({"agent float32 forward plain": [[2, 8, 32, 4, kernel, 3.0]]})
        assert path_taken(query, query, query, agents) == path


def test_triton_that_cannot_run_is_not_chosen(measured):
    measured({"agent float32 forward plain": [[8, 64, 1024, 16, "triton", 9.0]]})
    assert dispatch.choose_for_agents(problem(), why_not_triton=lambda: "no such thing") == Choice("sdpa", None, None)
    assert dispatch.choose_for_agents(problem()) == Choice("triton", 9.0, None)


# The override


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
def test_the_argument_prefers_a_path(kernel):
    choice = dispatch.choose_for_agents(problem(), kernel, why_not_triton=lambda: "no such thing")
    runs = {"auto": "sdpa", "table": "sdpa", "absorbed": "sdpa", "triton": "sdpa"}.get(kernel, kernel)
    assert choice.kernel == runs
    assert choice.reason == ("no such thing" if kernel == "triton" else None)


def test_a_path_that_a_method_does_not_have():
    choice = dispatch.choose_for_linear(problem(agents=0), "matmul")
    assert choice.kernel == "reference" and "reference and triton" in choice.reason


def test_unknown_paths_are_named():
    query = normal(1, 1, 8, 4)
    with pytest.raises(ValueError, match="unknown kernel 'cuda'; known: auto, table, reference, sdpa, matmul, triton"):
        F.agent_attention(query, query, query, query[:, :, :2], kernel="cuda")
    with pytest.raises(ValueError, match="unknown kernel 'sdpa'; known: auto, table, reference, triton"):
        F.linear_attention(query, query, query, kernel="sdpa")
    with pytest.raises(ValueError, match="unknown kernel 'fast'.*absorbed"):
        attngen.apply(fresh("sd15"), "agent", kernel="fast")


@pytest.mark.parametrize("function", ["agents", "linear"])
def test_a_path_asked_for_by_name_runs_or_says_why_not(function):
    query = normal(1, 1, 8, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="the kernel 'triton' cannot run here: "):
        if function == "agents":
            F.agent_attention(query, query, query, query[:, :, :2], kernel="triton")
        else:
            F.linear_attention(query, query, query, kernel="triton")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "attngen-crossovers", "version": 2}', "no", '{"format": 1}'])
def test_a_broken_file_of_measurements_is_named(text, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cannot read the measurements in .*mine\.json"):
        crossovers.use_crossovers(path)


def test_a_missing_file_of_measurements_is_named():
    with pytest.raises(ValueError, match=r"/nowhere/mine\.json"):
        crossovers.use_crossovers(Path("/nowhere/mine.json"))


@pytest.mark.parametrize(
    "calls",
    [{"agent float32 forward plain": 3}, {"agent float32 forward plain": [["a", 1, 1, 1, "sdpa", 1]]}, [], {"x": [[]]}],
)
def test_measurements_of_another_form_are_refused(calls, measured):
    with pytest.raises(ValueError, match="not measurements of crossovers"):
        measured(calls)


# The numbers


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "matmul"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_path_has_the_same_numbers(kernel, biases):
    query, key, value = (normal(2, 3, n, d, seed=n + d) for n, d in ((11, 8), (11, 8), (11, 5)))
    agents = normal(2, 3, 4, 8, seed=3)
    given = {"scale": 0.4, "broadcast_scale": 0.9, "shortcut": 0.3}
    if biases:
        given |= {"aggregation_bias": normal(1, 3, 4, 11, seed=4), "broadcast_bias": normal(3, 11, 1, seed=5)}
    got = F.agent_attention(query, key, value, agents, kernel=kernel, **given)
    want = oracles.agent_attention(query, key, value, agents, **given)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "matmul"])
@pytest.mark.parametrize("options", [{"gain": 0.7}, {"correction": "nystrom"}, {"gain": 1.3, "correction": "nystrom"}])
def test_every_path_scales_and_corrects_what_agents_gather(kernel, options):
    query, key, value = (normal(2, 3, n, d, seed=n + d) for n, d in ((11, 8), (11, 8), (11, 5)))
    given = {"scale": 0.4, "broadcast_scale": 0.9, "shortcut": 0.3, **options}
    agents = normal(2, 3, 4, 8, seed=3)
    got = F.agent_attention(query, key, value, agents, kernel=kernel, **given)
    want = oracles.agent_attention(query, key, value, agents, **given)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "matmul"])
def test_every_path_convolves_the_values(kernel):
    grid, query = (3, 4), normal(2, 2, 12, 4)
    value, agents = normal(2, 2, 12, 3, seed=1), normal(2, 2, 2, 4, seed=2)
    weight, bias = normal(6, 1, 3, 3, seed=3), normal(6, seed=4)
    scales, convolution = AgentScales(0.5, 0.5), Convolution(weight, bias, grid)
    got = dispatch.agent_attention(query, query, value, agents, scales, convolution=convolution, kernel=kernel)
    tokens = value.transpose(1, 2).flatten(2)
    beside = oracles.depthwise_conv(tokens, grid, weight, bias).unflatten(2, (2, 3)).transpose(1, 2)
    want = oracles.agent_attention(query, query, value, agents, 0.5, 0.5) + beside
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_the_matmul_form(dtype):
    """Scores are rounded to bfloat16, float16 is computed in float32; extremes stay finite."""
    query, value = normal(1, 2, 64, 16, dtype=dtype), normal(1, 2, 64, 16, seed=1, dtype=dtype)
    agents = normal(1, 2, 4, 16, seed=2, dtype=dtype)
    want = oracles.agent_attention(query, query, value, agents)
    got = F.agent_attention(query, query, value, agents, kernel="matmul")
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() < (1.5e-2 if dtype == torch.bfloat16 else 1e-3)
    assert F.agent_attention(query * 300, query * 300, value, agents * 300, kernel="matmul").isfinite().all()


# Compilation


def test_one_graph_for_sizes_that_take_the_same_path(measured):
    rows = [[1, 8, 64, 4, "matmul", 2.0], [1, 8, 4096, 4, "sdpa", 2.0]]
    measured({"agent float32 forward plain": rows})
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(query, agents):
        return F.agent_attention(query, query, query, agents)

    compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=True)
    agents = normal(1, 1, 4, 8, dtype=torch.float32)
    for tokens in (64, 65, 80, 4000, 5000):
        query = normal(1, 1, tokens, 8, dtype=torch.float32)
        torch.testing.assert_close(compiled(query, agents), attend(query, agents))
    assert len(graphs) == 2
    torch.compiler.reset()


# The committed measurements


def test_the_committed_measurements():
    """Every kind is there, and where agents are fewer than half of 256 tokens or more, no path loses to softmax."""
    table = crossovers._tables()
    assert "cpu" in table
    text = json.loads((resources.files("attngen.kernels") / "crossovers.json").read_text())
    for device, part in text["devices"].items():
        assert part["machine"]["device"] and part["machine"]["torch"]
        for dtype in ("float32", "bfloat16"):
            for training in (False, True):
                assert crossovers.layer_kind(dtype, training) in table[device].absorbed
                for kind in (
                    crossovers.call_kind("agent", dtype, training),
                    crossovers.call_kind("agent", dtype, training, True),
                    crossovers.call_kind("linear", dtype, training),
                ):
                    assert part["calls"][kind], kind
    for kind, rows in text["devices"]["cpu"]["calls"].items():
        for row in rows:
            assert row[-2] in dispatch.AGENT_KERNELS
            assert row[2] < 256 or kind.startswith("linear") or row[-1] >= crossovers.TOLERANCE, (kind, row)


# What the report and the warning say


def patched(measured, row, **options):
    measured({"agent float32 forward plain": [row]})
    model = fresh("sd15")
    return model, attngen.apply(model, AgentAttention(num_agents=16), **options)


def kernels_in(handle):
    return {layer.stages[0].kernel for layer in handle.report().patched if layer.is_active}


def test_the_report_names_the_path(measured):
    _, handle = patched(measured, [4, 8, 256, 16, "matmul", 2.5])
    stage = handle.report().patched[0].stages[0]
    assert (stage.kernel, stage.speedup, stage.why_not_kernel, stage.is_slower) == ("matmul", 2.5, None, False)
    assert "agent (16) by matmul" in str(handle.report())
    assert handle.report().to_dict()["layers"][0]["stages"][0]["kernel"] == "matmul"
    json.loads(handle.report().to_json())


def test_the_report_says_why_not_the_path_asked_for(measured):
    _, handle = patched(measured, [4, 8, 256, 16, "sdpa", 2.5], kernel="triton")
    stage = handle.report().patched[0].stages[0]
    assert stage.kernel == "sdpa" and stage.why_not_kernel
    assert f": {stage.why_not_kernel}" in str(handle.report())
    _, handle = patched(measured, [4, 8, 256, 16, "sdpa", 2.5], kernel="absorbed")
    assert kernels_in(handle) == {"absorbed"}


def test_the_report_follows_gradients(measured):
    """Before the first call it is about pipelines, which record none, unless the model is in training mode."""
    measured(
        {
            "agent float32 forward plain": [[4, 8, 256, 16, "matmul", 2.5]],
            "agent float32 training plain": [[4, 8, 256, 16, "sdpa", 1.5]],
        }
    )
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=16), min_tokens=64)
    assert kernels_in(handle) == {"matmul"}
    HOSTS["sd15"](model, batch=1)
    assert kernels_in(handle) == {"sdpa"}
    with torch.no_grad():
        HOSTS["sd15"](model, batch=1)
    assert kernels_in(handle) == {"matmul"}
    model.train()
    assert kernels_in(attngen.apply(model, AgentAttention(num_agents=16))) == {"sdpa"}


@pytest.mark.filterwarnings("default::attngen.AttnGenWarning")
@torch.no_grad()
def test_slower_than_softmax_is_said_once(measured, recwarn):
    model, _ = patched(measured, [4, 8, 256, 16, "sdpa", 0.5], min_tokens=64)
    for _ in range(2):
        HOSTS["sd15"](model, batch=1)
    said = [str(w.message) for w in recwarn if issubclass(w.category, attngen.AttnGenWarning)]
    assert len(said) == 1 and "slower than softmax attention" in said[0] and "0.50 times its speed" in said[0]
    model, _ = patched(measured, [4, 8, 256, 16, "sdpa", 0.99])
    recwarn.clear()
    HOSTS["sd15"](model, batch=1)
    assert not [w for w in recwarn if issubclass(w.category, attngen.AttnGenWarning)]


def test_a_chosen_backend_is_named_and_no_path_of_ours_runs(measured):
    model, handle = patched(measured, [4, 8, 256, 16, "matmul", 2.5])
    model.set_attention_backend("native")
    assert kernels_in(handle) == {"native"}
    with Operators() as ran, torch.no_grad():
        HOSTS["sd15"](model, batch=1)
    active = sum(layer.is_active for layer in handle.report().patched)
    exact_and_cross = 2 * len(handle.report().patched) - active
    assert sum("scaled_dot_product" in name for name in ran.names) == 2 * active + exact_and_cross


def test_sit_takes_the_path_by_attention_kwargs():
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 16}
    model = attngen.SiTTransformer2DModel(attention="mediator", num_mediators=4, **config).eval()
    paths = {}
    for kernel in ("sdpa", "matmul", "absorbed"):
        with Operators() as ran, torch.no_grad():
            HOSTS["sit"](model, attention_kwargs={"kernel": kernel})
        calls = sum("scaled_dot_product" in name for name in ran.names)
        paths[kernel] = calls, sum("_softmax" in name for name in ran.names)
    assert paths == {"sdpa": (2, 0), "matmul": (0, 2), "absorbed": (0, 2)}
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        HOSTS["sit"](model, attention_kwargs={"kernel": "fast"})
