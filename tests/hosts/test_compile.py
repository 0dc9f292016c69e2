"""torch.compile on patched models, without a graph break; and gradient checkpointing."""

import copy

import pytest
import torch

import attngen
from attngen import AgentAttention, DownsampledKV, LinearAttention, Plan, Stage, TokenMerging
from attngen.hosts.backend import BackendAttention
from attngen.hosts.families import FAMILIES
from attngen.hosts.hooks import INNER_HOOK
from tests.builders.hosts import ACTIVE, HOSTS, fresh, slim, snapshot
from tests.builders.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
AGENTS = AgentAttention(num_agents=4)
PLAN = Plan((Stage(1.0, {"*": AGENTS}), Stage(0.6, {"*": DownsampledKV(2)}), Stage(0.3, {"*": TokenMerging(0.5)})))
TIMES = (0.9, 0.5, 0.1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def by_block(model, backend):
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    return model


def close(got, want, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max())


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("sd15", by_block),
        ("sit", whole),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sd15", whole), ("flux", in_place))),
    ],
)
def test_a_graph_for_each_stage_and_no_more(name, compiled):
    host, model, eager, backend = HOSTS[name], slim(name), slim(name), Counter()
    attngen.apply(eager, PLAN)
    attngen.apply(model, PLAN)
    run = compiled(model, backend)
    with torch.no_grad():
        for time in TIMES:
            close(host(run, time=time), host(eager, time=time))
        assert backend.graphs == len(TIMES)
        for time in (0.95, 0.45, 0.05):  # other times of the same stages
            close(host(run, time=time), host(eager, time=time))
        assert backend.graphs == len(TIMES)


@pytest.mark.parametrize("name", ["sit", pytest.param("sd15", marks=pytest.mark.slow)])
def test_sizes_share_graphs(name):
    """The second size compiles anew with sizes as variables; from then on none does."""
    host, model, eager, backend = HOSTS[name], slim(name), slim(name), Counter()
    plan = Plan((Stage(1.0, {"*": AGENTS}),))
    attngen.apply(eager, plan)
    attngen.apply(model, plan)
    run = whole(model, backend)
    with torch.no_grad():
        for size in ((16, 16), (8, 24), (24, 12), (12, 32)):
            close(host(run, size), host(eager, size))
    assert backend.graphs <= 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("agents", "merging", "downsampled", "focal", "linear-elu") else pytest.mark.slow
        )
        for name in (*ACTIVE, "agentsd", "softmax")
    ],
)
def test_every_method_in_one_graph(name):
    method = ACTIVE.get(name, name)
    host, model, eager = HOSTS["pixart"], slim("pixart"), slim("pixart")
    attngen.apply(eager, method)
    attngen.apply(model, method)
    with torch.no_grad():
        close(host(whole(model, "eager")), host(eager))


@pytest.mark.parametrize("name", ["dit", "sd3", pytest.param("sd35", marks=pytest.mark.slow)])
def test_every_model_in_one_graph(name):
    host, model, eager = HOSTS[name], slim(name), slim(name)
    for method in (AGENTS, TokenMerging(0.5)):
        attngen.apply(eager, method)
        attngen.apply(model, method)
        with torch.no_grad():
            close(host(whole(model, "eager")), host(eager))


@pytest.mark.parametrize(
    ("name", "compiled"), [("flux", in_place), pytest.param("sd15", whole, marks=pytest.mark.slow)]
)
def test_patching_a_compiled_model_and_taking_it_back(name, compiled):
    host, model, eager = HOSTS[name], slim(name), slim(name)
    run = compiled(model, "eager")
    with torch.no_grad():
        exact = host(run)
        clean = snapshot(model)  # the compiler has its own attributes there
        close(exact, host(eager))
        for method in (AGENTS, AgentAttention(num_agents=9), TokenMerging(0.5)):
            handle = attngen.apply(run, method)
            attngen.apply(eager, method)
            close(host(run), host(eager))
        handle.remove()
        assert torch.equal(host(run), exact)
        attngen.apply(run, AGENTS)
        attngen.apply(eager, AGENTS)
        close(host(run), host(eager))
        attngen.remove(run)
        assert torch.equal(host(run), exact)
    assert snapshot(model) == clean


def test_inductor():
    host, model, eager = HOSTS["sit"], slim("sit"), slim("sit")
    plan = Plan(PLAN.stages[:1])
    attngen.apply(eager, plan)
    attngen.apply(model, plan)
    run = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for time in TIMES[:2]:
            close(host(run, time=time), host(eager, time=time), 1e-4)


# Core hosts


def core_run(name, model, time=0.9):
    """Qwen-Image without its mask of text, which its pipeline leaves out where no text is padded."""
    tiny = ZOO[name]
    inputs = {**tiny.inputs(tiny.grids[0], 1), FAMILIES[name].time: torch.tensor([time])}
    if "Qwen" in name:
        inputs["encoder_hidden_states_mask"] = None
    return tiny.drawn(model(**inputs))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("Flux2Transformer2DModel", "aot_eager"),
        ("QwenImageTransformer2DModel", "aot_eager"),
        ("WanTransformer3DModel", "aot_eager"),
        ("ZImageTransformer2DModel", "aot_eager"),
        ("WanTransformer3DModel", "inductor"),
    ],
)
@pytest.mark.slow
def test_core_hosts_in_one_graph_a_stage(name, backend):
    model, plan = ZOO[name].model(), Plan((Stage(1.0, {"*": AGENTS}), Stage(0.5, {"*": DownsampledKV(2)})))
    scale = 1000 if "Wan" in name else 1
    times = (scale * 0.9, scale * 0.8, scale * 0.2)
    with torch.no_grad(), attngen.apply(model, plan, kernel="sdpa"):
        eager = [core_run(name, model, time) for time in times]
        assert not torch.equal(eager[0], core_run(name, ZOO[name].model(), times[0]))
        run = whole(model, backend)
        for time, want in zip(times, eager, strict=True):
            close(core_run(name, run, time), want, 1e-4 if backend == "inductor" else 1e-5)


# Gradients


def gradients(model, run):
    model.zero_grad()
    run().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit", "pixart", "sd3", "sd35", "flux", "sit"])
def test_checkpointing_recomputes_each_call_as_it_was(name):
    """Two calls with other grids of as many tokens, in other stages, before one backward."""
    host, model = HOSTS[name], fresh(name)
    sizes = [(16, 16)] * 2 if host.square else [(8, 32), (32, 8)]
    attngen.apply(model, Plan(PLAN.stages[:2] + (Stage(0.3, {"*": TokenMerging(0.5, random=True)}),)))

    def run():
        outputs = [
            host(model, size, time, batch=1) for size, time in zip(sizes * 2, (0.9, 0.4, 0.2, 0.05), strict=True)
        ]
        return sum(i * out.square().mean() for i, out in enumerate(outputs, 1))

    plain = gradients(model, run)
    model.enable_gradient_checkpointing()
    again = gradients(model, run)
    assert plain.keys() == again.keys() and len(plain) > 10
    for weight, gradient in plain.items():
        torch.testing.assert_close(again[weight], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for n, m in ACTIVE.items() if n != "linear-identity"], ids=repr)
def test_gradients_reach_every_projection(method):
    host, model = HOSTS["pixart"], fresh("pixart")
    attngen.apply(model, method)
    grads = gradients(model, lambda: host(model).square().mean())
    for name, gradient in grads.items():
        assert torch.isfinite(gradient).all()
        if "attn1.to_" in name and name.endswith("weight"):
            assert gradient.abs().max() > 0, name


def test_a_compiled_copy_is_independent():
    host, model = HOSTS["sit"], slim("sit")
    attngen.apply(model, AGENTS)
    other = copy.deepcopy(model)
    attngen.apply(other, LinearAttention("elu"))
    with torch.no_grad():
        first, second = whole(model, "eager"), whole(other, "eager")
        a, b = host(first), host(second)
        close(a, host(model))
        close(b, host(other))
        assert not torch.allclose(a, b)


def test_nothing_tells_blocks_alike_apart():
    """Compilers of torch 2.10 compare numbers of hooks, and hash what is called before its fields are there."""
    model = fresh("sd15")
    attngen.apply(model, PLAN)
    hooks = [m._forward_pre_hooks for name, m in model.named_modules() if name and m._forward_pre_hooks]
    assert hooks and all(list(found) == [INNER_HOOK] for found in hooks)
    assert hash(object.__new__(BackendAttention)) is not None
