"""Core hosts under diffusers' attention backends: products are caught in its dispatcher, exact parts run there."""

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import attngen
from attngen import AgentAttention, DownsampledKV, Plan
from attngen.hosts.backend import CaughtBackend
from tests.builders.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

# Text first, text last, a mask of text, image tokens alone, and a processor that names no backend.
NAMES = [
    "Flux2Transformer2DModel",
    "ZImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
]
AGENTS = AgentAttention(num_agents=4)


@pytest.fixture(autouse=True)
def _as_before():
    active = _AttentionBackendRegistry._active_backend
    with torch.no_grad():
        yield
    _AttentionBackendRegistry._active_backend = active


class Flash:
    """Stands in for a backend that is not torch's: it computes its product without torch's function, and counts."""

    def __init__(self):
        self.shapes = []

    def __call__(self, query, key, value, attn_mask=None, scale=None, enable_gqa=False, _parallel_config=None):
        self.shapes.append((query.shape[1], key.shape[1]))
        query, key, value = (x.transpose(1, 2).double() for x in (query, key, value))
        weights = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.ndim == 4 else attn_mask[:, None, None]
            hidden = attn_mask.dtype == torch.bool
            weights = weights.masked_fill(~attn_mask, -torch.inf) if hidden else weights + attn_mask
        return (weights.softmax(3) @ value).transpose(1, 2).float()


@pytest.fixture
def flash(monkeypatch):
    """Registered under the name of flash attention, whose package is not needed for that."""
    backend, name = Flash(), AttentionBackendName.FLASH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, backend)
    arguments = {"query", "key", "value", "attn_mask", "scale", "enable_gqa", "_parallel_config"}
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, arguments)
    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda name: None)
    return backend


def run(name, model, **changed):
    tiny = ZOO[name]
    return tiny.drawn(model(**{**tiny.inputs(tiny.grids[1], 2), **changed}))


def close(got, want, tolerance=1e-5):
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False], ids=["set before", "set after"])
def test_the_users_backend_computes_all_parts(name, before, flash):
    plain, model = ZOO[name].model(), ZOO[name].model()
    with attngen.apply(plain, AGENTS):
        want = run(name, plain)
    if before:
        model.set_attention_backend("flash")
    handle = attngen.apply(model, AGENTS)
    if not before:
        run(name, model)
        model.set_attention_backend("flash")
    flash.shapes.clear()
    with handle.trace() as trace:
        got = run(name, model)
    close(got, want)
    assert {row.kernel for row in trace.rows} == {"flash"} and {row.agents for row in trace.rows} == {4}
    assert {stage.kernel for layer in handle.report().patched for stage in layer.stages} == {"flash"}
    assert min(queries for queries, _ in flash.shapes) == 4
    # Exact layers are those of the backend alone, bit for bit.
    handle.remove()
    exact = run(name, model)
    for method in ("softmax", AgentAttention(num_agents=4096)):
        with attngen.apply(model, method):
            assert torch.equal(run(name, model), exact)
    with attngen.apply(model, AGENTS) as handle, handle.paused():
        assert torch.equal(run(name, model), exact)


@pytest.mark.parametrize("name", [*NAMES, "CosmosTransformer3DModel"])
def test_a_backend_of_a_context_and_no_other(name, flash):
    model = ZOO[name].model()
    with attngen.apply(model, DownsampledKV(2)):
        want = run(name, model)
        with diffusers.attention_backend("flash"):
            flash.shapes.clear()
            close(run(name, model), want)
            assert flash.shapes
        flash.shapes.clear()
        assert torch.equal(run(name, model), want) and not flash.shapes


def test_the_registry_is_as_it_was_once_no_model_is_patched(flash):
    name, backends = NAMES[0], _AttentionBackendRegistry._backends
    before, other = dict(backends), ZOO[NAMES[0]].model()
    first, second = ZOO[name].model(), ZOO[name].model()
    handles = [attngen.apply(model, AGENTS) for model in (first, second)]
    assert dict(backends) == before
    for model in (first, second):
        run(name, model)
    assert isinstance(backends[AttentionBackendName.FLASH], CaughtBackend)
    assert not isinstance(backends[AttentionBackendName.NATIVE], CaughtBackend)
    want = run(name, other)
    other.set_attention_backend("flash")  # a model without a patch is that of the backend alone
    flash.shapes.clear()
    close(run(name, other), want)
    assert {queries == keys for queries, keys in flash.shapes} == {True}
    handles[0].remove()
    assert isinstance(backends[AttentionBackendName.FLASH], CaughtBackend)
    handles[1].remove()
    assert dict(backends) == before


@pytest.mark.parametrize("backend", ["flex", "_native_math", "_native_efficient", "_native_flash"])
def test_real_backends(backend):
    name = "WanTransformer3DModel"
    model = ZOO[name].model()
    with attngen.apply(model, DownsampledKV(2)) as handle:
        want = run(name, model)
        model.set_attention_backend(backend)
        try:
            model_alone = ZOO[name].model()
            model_alone.set_attention_backend(backend)
            run(name, model_alone)
        except RuntimeError as error:  # no such kernel on this machine, with attngen or without
            pytest.skip(str(error))
        with handle.trace() as trace:
            close(run(name, model), want)
        assert {row.kernel for row in trace.rows} == {backend}


@pytest.mark.parametrize("plan", ["softmax", Plan.of(AGENTS, min_tokens=4096)], ids=["softmax", "min_tokens"])
def test_exact_layers_are_left_alone(plan):
    """After the first call, which the report needs, nothing is between the layer and torch."""
    name = "WanTransformer3DModel"
    model, depths = ZOO[name].model(), []
    want = run(name, model)
    for block in model.blocks:
        block.attn1.to_q.register_forward_hook(lambda *_: depths.append(torch._C._len_torch_function_stack()))
    with attngen.apply(model, plan) as handle, handle.trace() as trace:
        run(name, model)
        assert set(depths) == {1} and {layer.tokens for layer in handle.report().patched}
        depths.clear()
        assert torch.equal(run(name, model), want) and set(depths) == {0}
    assert {(row.kernel, row.calls) for row in trace.rows} == {("exact", 2)}
    with attngen.apply(model, AGENTS, kernel="sdpa"):
        run(name, model)
        depths.clear()
        run(name, model)
        assert set(depths) == {1}


def test_context_parallelism_is_exact_and_says_so():
    name = "WanTransformer3DModel"
    model = ZOO[name].model()
    want = run(name, model)
    handle = attngen.apply(model, AGENTS)
    run(name, model)

    class Config:
        context_parallel_config = None

    processors = [block.attn1.processor for block in model.blocks]
    reason = "context parallelism splits its tokens between devices"
    for processor in processors:
        processor._parallel_config = Config()
    assert {stage.why_exact for layer in handle.report().patched for stage in layer.stages} == {reason}
    # The product itself needs several processes.
    with handle.trace() as trace, pytest.raises((AttributeError, ValueError)):
        run(name, model)
    assert {row.why for row in trace.rows} == {reason}
    for processor in processors:
        processor._parallel_config = None
    with attngen.apply(model, "softmax"):
        assert torch.equal(run(name, model), want)


def test_a_processor_that_computes_by_itself_is_named():
    name = "WanTransformer3DModel"
    model = ZOO[name].model()

    class OwnProcessor:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    for block in model.blocks:
        block.attn1.processor = OwnProcessor()
    want = run(name, model)
    with attngen.apply(model, AGENTS) as handle, handle.trace() as trace:
        assert torch.equal(run(name, model), want)
        reasons = {stage.why_exact for layer in handle.report().patched for stage in layer.stages}
    assert {row.why for row in trace.rows} == reasons == {"its processor OwnProcessor computes its product by itself"}


def test_arguments_of_a_backends_own_stay_with_it(flash):
    """Nobody but the backend can tell what they do to the product."""
    name = "WanTransformer3DModel"
    model = ZOO[name].model()
    _AttentionBackendRegistry._supported_arg_names[AttentionBackendName.FLASH].add("window")
    original = flash.__call__
    windows = []

    def windowed(window=None, **given):
        windows.append(window)
        return original(**given)

    _AttentionBackendRegistry._backends[AttentionBackendName.FLASH] = windowed
    dispatch = diffusers.models.attention_dispatch.dispatch_attention_fn
    module = diffusers.models.transformers.transformer_wan
    model.set_attention_backend("flash")
    want = run(name, model)
    with pytest.MonkeyPatch.context() as patch, attngen.apply(model, AGENTS) as handle, handle.trace() as trace:
        patch.setattr(
            module, "dispatch_attention_fn", lambda *a, **kw: dispatch(*a, **kw, attention_kwargs={"window": 3})
        )
        assert torch.equal(run(name, model), want)
    assert 3 in windows and {row.why for row in trace.rows} == {"its flash attention gets arguments of its own"}
