"""Kernels chosen by measuring where they run: once a shape, kept for later processes, never in a traced graph."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attngen
from attngen import AgentAttention
from attngen import functional as F
from attngen.kernels import candidates, clock, crossovers, dispatch, measured
from attngen.kernels.candidates import ABSORBED, PROJECTIONS, SOFTMAX, Shape
from attngen.kernels.crossovers import Choice
from attngen.kernels.dispatch import Problem
from attngen.layers.route import EXACT
from tests.builders.hosts import HOSTS, fresh

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

CPU = torch.device("cpu")
SHAPE = Shape("agent", "float32", 1, 2, 64, 64, 4, 8, False)
DEFAULT = Choice("sdpa")
FAST = {"sdpa": 2.0, "matmul": 1.0, SOFTMAX: 5.0}


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    """Measuring is on, nothing is known, no table has a device, and the cache is empty."""
    monkeypatch.setenv("ATTNGEN_MEASURE", "1")
    monkeypatch.setattr(measured, "folder", lambda: tmp_path)
    monkeypatch.setattr(crossovers, "_in_force", {"tables": {}})
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "_said", set())


@pytest.fixture
def times(monkeypatch):
    """Put times in place of the clock: `times(seconds)`; returns the list of what was measured."""
    asked = []

    def put(seconds):
        def in_turn(calls, device, limit):
            asked.append(sorted(calls))
            return {name: seconds.get(name, 9.0) * calls[name].share for name in calls}

        monkeypatch.setattr(clock, "in_turn", in_turn)
        return asked

    return put


def find(shape, device):
    return measured.find(shape, device, lambda: DEFAULT)


def kernels_in(handle):
    return {layer.stages[0].kernel or layer.stages[0].why_exact for layer in handle.report().patched}


# What is chosen


def test_the_fastest_kernel_runs(times):
    times(FAST)
    assert find(SHAPE, CPU) == Choice("matmul", 5.0, here=True)


@pytest.mark.parametrize(
    ("seconds", "kernel", "speedup"),
    [
        ({PROJECTIONS: 2.0, ABSORBED: 2.9}, ABSORBED, (2 + 5) / 2.9),
        ({PROJECTIONS: 2.0, ABSORBED: 3.1}, "matmul", 5.0),
        ({PROJECTIONS: 2.0}, "matmul", 5.0),
        ({ABSORBED: 0.9}, ABSORBED, 5 / 0.9),
        ({ABSORBED: 1.1}, "matmul", 5.0),
    ],
)
def test_a_layer_is_absorbed_where_that_is_faster_than_its_projections_and_a_kernel(seconds, kernel, speedup):
    seconds = {**FAST, **seconds}
    assert measured.choice_of(seconds) == Choice(kernel, speedup, here=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_all_candidates_are_measured_on_tensors_like_those_of_the_call(dtype, training, global_rng_untouched):
    shape = Shape("agent", dtype, 2, 2, 64, 70, 4, 8, training, channels=16, kept=1)
    found = measured._measured(shape, CPU)["eager"]
    assert found.keys() == {"sdpa", "matmul", SOFTMAX, ABSORBED} and min(found.values()) > 0
    for candidate in candidates.candidates(shape, CPU).values():
        assert {x.requires_grad for x in candidate.inputs} == {training}
        assert {str(x.dtype) for x in candidate.inputs} == {f"torch.{dtype}"}


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_with_biases_and_convolutions_are_measured(kept, bias):
    shape = Shape("agent", "float32", 1, 2, 64, 64, 4, 8, True, bias, channels=16, kept=kept)
    assert ABSORBED in measured._measured(shape, CPU)["eager"]


def test_a_correction_and_linear_attention_are_measured():
    assert "sdpa" in measured._measured(SHAPE._replace(correction="nystrom"), CPU)["eager"]
    assert "reference" in measured._measured(SHAPE._replace(method="linear", agents=0), CPU)["eager"]


def test_large_calls_are_measured_in_part():
    """On a CPU time is proportional to heads and queries, and softmax attention alone may take many seconds."""
    torch_threads = torch.get_num_threads()
    shape = Shape("agent", "float32", 2, 8, 16384, 16384, 64, 40, False)
    ways = candidates.candidates(shape, CPU)
    assert ways[SOFTMAX].share < ways["sdpa"].share < 1
    assert ways["sdpa"].share == torch_threads / 16
    layer = candidates.candidates(shape._replace(channels=320), CPU)
    assert layer[PROJECTIONS].share < 1 and layer[ABSORBED].share == 0.5
    small = candidates.candidates(SHAPE._replace(channels=16), CPU)
    assert {way.share for way in small.values()} == {1.0} and PROJECTIONS not in small


# Once a shape, and kept


def test_a_shape_is_measured_once_and_kept_for_other_processes(times, monkeypatch, tmp_path, caplog):
    asked = times(FAST)
    for _ in range(2):
        assert find(SHAPE, CPU).kernel == "matmul"
    assert len(asked) == 1 and len(list(tmp_path.iterdir())) == 1
    find(SHAPE._replace(queries=65), CPU)
    assert len(asked) == 2 and len(list(tmp_path.iterdir())) == 2
    assert [record.message.count("kernel='table'") for record in caplog.records] == [1], "it is said once"
    forget(monkeypatch)
    assert find(SHAPE, CPU).kernel == "matmul" and len(asked) == 2


@pytest.mark.parametrize("changed", ["device", "driver", "torch", "triton", "attngen"])
def test_what_was_measured_in_another_environment_does_not_count(times, monkeypatch, changed):
    asked = times(FAST)
    find(SHAPE, CPU)
    other = {**measured.environment(CPU), changed: "other"}
    monkeypatch.setattr(measured, "environment", lambda device: other)
    forget(monkeypatch)
    find(SHAPE, CPU)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"shape": 1}', "nan", '{"sdpa": -1}', '{"sdpa": "a", "softmax": 1}', '{"sdpa": 1}', '{"softmax": 1}'],
)
def test_a_damaged_file_is_measured_again(times, monkeypatch, tmp_path, content):
    asked = times(FAST)
    find(SHAPE, CPU)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    if content.startswith('{"s') and "shape" not in content:
        content = json.dumps({**kept, "seconds": {"eager": json.loads(content)}})
    path.write_text(content)
    forget(monkeypatch)
    assert find(SHAPE, CPU).kernel == "matmul" and len(asked) == 2
    assert json.loads(path.read_text()) == kept


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file"])
def test_a_cache_that_cannot_be_written_ends_nothing(times, monkeypatch, tmp_path, place):
    asked = times(FAST)
    (tmp_path / "a file").touch()
    monkeypatch.setattr(measured, "folder", lambda: tmp_path / place)
    for _ in range(2):
        assert find(SHAPE, CPU).kernel == "matmul"
    assert len(asked) == 1


def test_threads_measure_once(times):
    asked = times(FAST)
    threads = [threading.Thread(target=measured.find, args=(SHAPE, CPU, lambda: DEFAULT)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.folder().is_relative_to(tmp_path / "torch") and measured.folder().name == "attngen"


# Failures


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    ways = candidates.candidates(SHAPE, CPU)
    monkeypatch.setattr(measured, "candidates", lambda *_: {**ways, "matmul": ways["sdpa"]._replace(run=None)})
    assert measured._measured(SHAPE, CPU)["eager"].keys() == {"sdpa", SOFTMAX}


@pytest.mark.parametrize("left", [(), ("sdpa",), (SOFTMAX,)])
def test_a_measurement_that_fails_leaves_the_default_and_is_not_tried_again(times, monkeypatch, left):
    asked, real = times(FAST), clock.in_turn
    monkeypatch.setattr(clock, "in_turn", lambda calls, *rest: real({name: calls[name] for name in left}, *rest))
    for _ in range(2):
        assert find(SHAPE, CPU) == DEFAULT
    assert len(asked) == 1


def test_sizes_that_no_tensor_has_leave_the_default():
    assert find(SHAPE._replace(keys=0), CPU) == DEFAULT
    assert find(SHAPE, torch.device("meta")) == DEFAULT


# Where nothing is measured


def attend(kernel="auto", tokens=64):
    query = torch.ones(1, 2, tokens, 8)
    return F.agent_attention(query, query, query, query[:, :, :4], kernel=kernel)


def test_auto_measures_and_nothing_else_does(times, monkeypatch):
    asked = times(FAST)
    for kernel in ("table", "sdpa", "matmul", "reference"):
        attend(kernel)
    monkeypatch.setenv("ATTNGEN_MEASURE", "0")
    attend()
    assert asked == []
    monkeypatch.setenv("ATTNGEN_MEASURE", "1")
    attend()
    assert asked == [["matmul", "sdpa", SOFTMAX]]


def test_a_committed_table_answers_for_its_device_and_sizes(times, monkeypatch):
    asked = times(FAST)
    rows = [[2, 8, tokens, 4, "sdpa", 2.0] for tokens in (64, 256)]
    part = {"machine": {"device": "this"}, "calls": {"agent float32 forward plain": rows}, "absorbed": {}}
    table = crossovers.Crossovers(part)
    monkeypatch.setattr(crossovers, "_in_force", {"tables": {"cpu": table}})
    monkeypatch.setattr(crossovers, "device_name", lambda device: "this")
    for tokens in (32, 64, 100, 512):
        attend(tokens=tokens)
    assert asked == []
    for tokens in (31, 513):
        attend(tokens=tokens)
    assert len(asked) == 2
    monkeypatch.setattr(crossovers, "device_name", lambda device: "another")
    attend()
    assert len(asked) == 3
    assert dispatch.choose_for_agents(Problem("cpu", "float32", 2, 31, 4, 8)) == Choice("sdpa", 2.0)


def test_operations_are_counted_without_those_of_a_measurement(times):
    asked = times(FAST)
    with FlopCounterMode(display=False):
        attend()
    assert asked == []
    attend()
    assert len(asked) == 1


def test_a_traced_graph_takes_what_was_measured_before(times):
    """Nothing is measured while a graph is traced; a measurement that changes the kernel has it traced again."""
    asked, graphs = times(FAST), []
    torch.compiler.reset()

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda query: attend_like(query), backend=backend, fullgraph=True)
    compiled(torch.ones(1, 2, 64, 8))
    assert asked == [] and "scaled_dot_product" in graphs[-1]
    attend()
    compiled(torch.ones(1, 2, 64, 8))
    assert len(asked) == 1 and len(graphs) == 2 and "softmax" in graphs[-1]
    compiled(torch.ones(1, 2, 80, 8))
    assert "scaled_dot_product" in graphs[-1], "other sizes are not measured"
    times({**FAST, "matmul": 9.0})
    attend(tokens=96)
    number = len(graphs)
    compiled(torch.ones(1, 2, 80, 8))
    assert len(graphs) == number, "a measurement that changes no kernel has nothing traced again"
    torch.compiler.reset()


def attend_like(query):
    return F.agent_attention(query, query, query, query[:, :, :4])


# In a patched model


@torch.no_grad()
def test_a_layer_stays_exact_where_agents_are_not_faster(times):
    """The report and the trace have the reason, and the output is the model's own, bit for bit."""
    times({"sdpa": 4.97, "matmul": 4.95, SOFTMAX: 5.0, PROJECTIONS: 1.0})
    model = fresh("sd15")
    want = HOSTS["sd15"](model, (16, 16))
    handle = attngen.apply(model, AgentAttention(num_agents=4), min_tokens=1)
    with handle.trace() as trace:
        got = HOSTS["sd15"](model, (16, 16))
    assert torch.equal(got, want)
    reasons = {row.why for row in trace.rows}
    assert {row.kernel for row in trace.rows} == {EXACT} and reasons == kernels_in(handle)
    assert "4 agents are not faster than softmax here: 1.01 times its speed" in reasons


@torch.no_grad()
def test_a_method_that_was_asked_for_at_every_size_runs_though_it_is_not_faster(times):
    times({"sdpa": 4.97, "matmul": 4.95, SOFTMAX: 5.0, PROJECTIONS: 1.0})
    model = fresh("sd15")
    for options in ({}, {"min_tokens": 0}):
        handle = attngen.apply(model, AgentAttention(num_agents=4), **options)
        with handle.trace() as trace:
            HOSTS["sd15"](model, (16, 16))
        assert {row.kernel for row in trace.rows} == kernels_in(handle) == {"matmul"}


@torch.no_grad()
@pytest.mark.parametrize(("seconds", "kernel"), [({}, "matmul"), ({ABSORBED: 0.5}, ABSORBED)])
def test_the_report_and_the_trace_name_what_was_measured(times, seconds, kernel):
    times({**FAST, **seconds})
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    with handle.trace() as trace:
        HOSTS["sd15"](model, (16, 16))
    assert {row.kernel for row in trace.rows} == kernels_in(handle) == {kernel}
    handle = attngen.apply(model, AgentAttention(num_agents=4), kernel="table")
    assert kernels_in(handle) == {"sdpa"}


def test_a_model_with_learned_mediators_has_no_softmax_attention_to_stay_with(times):
    times({**FAST, "sdpa": 20.0, "matmul": 20.0, ABSORBED: 30.0})
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 16}
    model = attngen.SiTTransformer2DModel(attention="mediator", num_mediators=4, **config).eval()
    want = HOSTS["sit"](model, attention_kwargs={"kernel": "sdpa"})
    torch.testing.assert_close(HOSTS["sit"](model), want)


def test_processes_that_compute_together_do_not_decide_apart(times, monkeypatch):
    times({"sdpa": 6.0, "matmul": 9.0, SOFTMAX: 5.0, ABSORBED: 30.0})
    monkeypatch.setattr(measured, "is_shared_job", lambda: True)
    handle = attngen.apply(fresh("sd15"), AgentAttention(num_agents=4))
    assert kernels_in(handle) == {"sdpa"}


def test_a_real_measurement_of_a_model(tmp_path):
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    first = str(handle.report())
    files = {Path(path).name for path in tmp_path.iterdir()}
    assert files and str(handle.report()) == first
    with torch.no_grad(), handle.trace() as trace:
        HOSTS["sd15"](model, (16, 16))
    assert {row.kernel for row in trace.rows} == {layer.stages[0].kernel or EXACT for layer in handle.report().patched}


# On a GPU


@pytest.mark.gpu
def test_a_gpu_is_measured_eagerly_and_as_a_graph():
    device = torch.device("cuda:0")
    shape = Shape("agent", "bfloat16", 2, 8, 1024, 1024, 16, 64, False, channels=512)
    found = measured._measured(shape, device)
    assert found.keys() == {"eager", "graph"}
    for seconds in found.values():
        assert seconds.keys() >= {"sdpa", "matmul", SOFTMAX, ABSORBED} and min(seconds.values()) > 0


@pytest.mark.gpu
def test_a_capture_takes_the_kernel_of_graphs(monkeypatch):
    device = torch.device("cuda:0")
    query = torch.ones(1, 2, 64, 8, device=device)
    F.agent_attention(query, query, query, query[:, :, :4])
    (key,) = measured._known
    measured._known[key] = measured._choices({"eager": FAST, "graph": {**FAST, "matmul": 3.0}})
    assert find(key[1], device).kernel == "matmul"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.agent_attention(query, query, query, query[:, :, :4])
    assert find(key[1], device) == Choice("sdpa", 5.0, here=True)
