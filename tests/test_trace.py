"""The trace: what really ran, and that the report agrees with it on every host, method, kernel and mode."""

import contextlib
import json

import diffusers
import pytest
import torch

import attngen
from attngen import (
    AgentAttention,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    Plan,
    SoftmaxAttention,
    Stage,
    TokenMerging,
)
from attngen.layers.route import EXACT
from tests.builders.hosts import HOSTS, fresh

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

METHODS = {
    "softmax": SoftmaxAttention(),
    "agents": AgentAttention(num_agents=4),
    "agents without a shortcut": AgentAttention(num_agents=4, shortcut=0.0),
    "corrected agents": AgentAttention(num_agents=4, correction="nystrom"),
    "merged agents": AgentAttention(num_agents=4, agents="merged"),
    "merging": TokenMerging(0.5),
    "merging with agents": TokenMerging(0.25, 4, 0.9),
    "keys": DownsampledKV(2),
    "focal": FocalAttention(4, 1, 4),
    "linear": LinearAttention(),
}
KERNELS = ("auto", "reference", "sdpa", "matmul", "absorbed")
MODES = ("eval", "grad", "autocast")


@contextlib.contextmanager
def mode(name):
    with torch.set_grad_enabled(name == "grad"), torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        yield


def ran(trace):
    return {(row.layer, row.start): (row.kernel, row.agents, row.why) for row in trace.rows}


def reported(report):
    return {
        (layer.name, stage.start): (
            EXACT if stage.why_exact is not None else stage.kernel,
            stage.agents,
            stage.why_exact,
        )
        for layer in report.patched
        for stage in layer.stages
    }


CASES = [(method, kernel, "eval") for method in METHODS for kernel in KERNELS]
CASES += [(method, "auto", other) for method in METHODS for other in MODES[1:]]
QUICK = 12
"""Each host takes every twelfth case, beginning with another one, so that together they take all."""


def check_agreement(host, cases):
    model = fresh(host)
    for method, kernel, name in cases:
        with attngen.apply(model, METHODS[method], kernel=kernel) as handle, mode(name):
            with handle.trace() as trace:
                HOSTS[host](model, (16, 16))
            report = handle.report()
        assert ran(trace) == reported(report), (method, kernel, name)
        assert trace.calls == {"": 1} and all(row.calls == 1 for row in trace.rows)


@pytest.mark.parametrize("host", HOSTS)
def test_the_report_agrees(host):
    check_agreement(host, CASES[list(HOSTS).index(host) % QUICK :: QUICK])


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_the_report_agrees_everywhere(host):
    check_agreement(host, CASES)


def test_every_stage_is_counted_by_itself():
    plan = Plan((Stage(1.0, {"*": AgentAttention(4)}), Stage(0.5, {"*": DownsampledKV(2)}), Stage(0.1, {})))
    model = fresh("dit")
    handle = attngen.apply(model, plan)
    with torch.no_grad(), handle.trace() as trace:
        for timestep in (900, 800, 300, 50):
            HOSTS["dit"](model, (16, 16), time=timestep / 1000)
    layers = len(handle.report().patched)
    calls = {start: [row.calls for row in trace.rows if row.start == start] for start in plan.starts}
    assert calls == {1.0: [2] * layers, 0.5: [1] * layers, 0.1: [1] * layers}
    assert {row.why for row in trace.rows if row.start == 0.1} == {"the plan asks for softmax attention"}


def test_a_mask_is_decided_per_call():
    model = fresh("pixart")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    with torch.no_grad(), handle.trace() as trace:
        HOSTS["pixart"](model, (16, 16), attention_mask=torch.ones(2, 64))
        assert {row.why for row in trace.rows} == {"an attention mask was given"}
        assert all(s.why_exact.startswith("decided per call") for row in handle.report().patched for s in row.stages)
        HOSTS["pixart"](model, (16, 16))
    assert {row.kernel for row in trace.rows} == {EXACT, "absorbed"}
    assert all(stage.why_exact is None for row in handle.report().patched for stage in row.stages)


def test_text_and_json_and_stopping():
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    with torch.no_grad():
        HOSTS["sd15"](model, (16, 16))
        trace = handle.trace()
        assert trace.calls == {"": 0} and trace.rows == [] and handle.trace() is trace
        HOSTS["sd15"](model, (16, 16))
        HOSTS["sd15"](model, (16, 16))
        trace.stop()
        HOSTS["sd15"](model, (16, 16))
    assert not trace.is_running and trace.calls == {"": 2}
    assert "model: 2 calls" in str(trace) and "absorbed (4 agents)" in str(trace)
    assert len(str(trace).splitlines()) < len(trace.rows), "equal layers share a line"
    assert json.loads(trace.to_json()) == json.loads(json.dumps(trace.to_dict()))
    assert handle.trace() is not trace
    handle.remove()
    with torch.no_grad():
        HOSTS["sd15"](model, (16, 16))


def test_processors_that_another_tool_replaced_are_not_counted():
    model = fresh("dit")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    for attn in (block.attn1 for block in model.transformer_blocks):
        attn.set_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    with torch.no_grad(), handle.trace() as trace:
        HOSTS["dit"](model, (16, 16))
    assert trace.calls == {"": 1} and trace.rows == []


@pytest.mark.parametrize("host", ["sit", "dit", "sd3"])
def test_compiled_code_notes_what_it_runs_without_a_graph_break(host):
    model = fresh(host)
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = HOSTS[host](compiled, (16, 16))
        with handle.trace() as trace:
            after = HOSTS[host](compiled, (16, 16))
            HOSTS[host](compiled, (16, 16))
    assert torch.equal(before, after)
    assert trace.calls == {"": 2} and {row.calls for row in trace.rows} == {None}
    assert ran(trace) == reported(handle.report())
