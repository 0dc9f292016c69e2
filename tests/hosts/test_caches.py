"""Core hosts beside diffusers' caches, guiders, offloading and weights of other kinds."""

import copy
import threading

import diffusers
import pytest
import torch
from diffusers import hooks

import attngen
from attngen import AgentAttention, DownsampledKV, Plan, SoftmaxAttention, Stage
from tests.builders.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

FLUX2, QWEN, WAN, Z_IMAGE = (
    f"{name}Transformer{dimensions}DModel"
    for name, dimensions in (("Flux2", 2), ("QwenImage", 2), ("Wan", 3), ("ZImage", 2))
)
AGENTS = AgentAttention(num_agents=4)
PLAN = Plan((Stage(1.0, {"*": AGENTS}), Stage(0.5, {"*": DownsampledKV(2)})))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def run(name, model, batch=1, **changed):
    tiny = ZOO[name]
    return tiny.drawn(model(**{**tiny.inputs(tiny.grids[0], batch), **changed}))


def close(got, want, tolerance=1e-5):
    assert (got - want).norm() <= tolerance * want.norm()


# Caches

RANGES = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (100, 900),
    "spatial_attention_block_identifiers": ("blocks", "transformer_blocks", "single_transformer_blocks", "layers"),
    "current_timestep_callback": lambda: 500,
}
CACHES = {
    "first block": (hooks.FirstBlockCacheConfig(threshold=10.0), (QWEN, WAN)),
    "taylor": (
        hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
        (FLUX2, QWEN),
    ),
    "magnitudes": (
        hooks.MagCacheConfig(threshold=10.0, retention_ratio=0.0, num_inference_steps=4, mag_ratios=[1.0] * 4),
        (FLUX2, QWEN, WAN),
    ),
    "spectrum": (
        hooks.SeaCacheConfig(
            threshold=100.0,
            residual_order=0,
            retention_steps=1,
            cache_end_steps=0,
            raw_vision_callback=lambda model, args, kwargs: list(kwargs["hidden_states"]),
        ),
        (WAN,),
    ),
    "broadcast": (hooks.PyramidAttentionBroadcastConfig(**RANGES), (FLUX2, WAN, "CogVideoXTransformer3DModel")),
    "faster": (
        hooks.FasterCacheConfig(**RANGES, tensor_format="BFCHW"),
        ("CogVideoXTransformer3DModel",),
    ),
}


def steps(name, model, number=4):
    """The same call again and again, with noise that hardly changes: caches give back what they have."""
    found = []
    for step in range(number):
        with model.cache_context("only", step_index=step, sigma=0.9 - 0.2 * step, num_inference_steps=number):
            found.append(run(name, model, 2, **{ZOO[name].latents: _latents(name)[step]}))
    return found


def _latents(name, number=4):
    tiny = ZOO[name]
    return [tiny.inputs(tiny.grids[0], 2)[tiny.latents] * (1 + 1e-3 * step) for step in range(number)]


@pytest.mark.parametrize(("cache", "name"), [(cache, name) for cache, (_, names) in CACHES.items() for name in names])
def test_a_cache_before_or_after(cache, name):
    config = CACHES[cache][0]

    def outputs(method, first):
        model, handle = ZOO[name].model(), None
        if first == "patch" and method is not None:
            handle = attngen.apply(model, method)
        model.enable_cache(copy.deepcopy(config))
        if first == "cache" and method is not None:
            handle = attngen.apply(model, method)
        found = steps(name, model)
        if handle is not None:
            handle.remove()
        model.disable_cache()
        found.append(run(name, model))
        return found

    plain = outputs(None, "cache")
    for method in ("softmax", AGENTS):
        found = [outputs(method, first) for first in ("cache", "patch")]
        for one, other, exact in zip(*found, plain, strict=True):
            assert torch.equal(one, other)
            assert method is AGENTS or torch.equal(one, exact)
        assert torch.equal(found[0][-1], plain[-1])
    assert not torch.equal(found[0][0], plain[0])
    # The cache acts on the patched model.
    with attngen.apply(model := ZOO[name].model(), AGENTS):
        every = [run(name, model, 2, **{ZOO[name].latents: latents}) for latents in _latents(name)]
    torch.testing.assert_close(found[0][0], every[0])
    assert any(not torch.equal(one, other) for one, other in zip(found[0][1:4], every[1:4], strict=True))


def test_the_trace_names_calls_that_a_cache_answers():
    model = ZOO[WAN].model()
    handle = attngen.apply(model, AGENTS)
    model.enable_cache(hooks.PyramidAttentionBroadcastConfig(**RANGES))
    with handle.trace() as trace:
        steps(WAN, model)
    assert {row.why for row in trace.rows} == {None, "a cache has its output"}
    assert {stage.why_exact for layer in handle.report().patched for stage in layer.stages} == {None}


# Guiders


@pytest.mark.parametrize(
    ("what", "name"),
    [("skip_attention", Z_IMAGE), ("skip_attention_scores", Z_IMAGE), ("skip_attention_scores", QWEN)],
)
def test_guiders_that_skip_layers(name, what):
    """A layer that is skipped is not a method's; the others are."""
    off = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
    blocks = "transformer_blocks" if name == QWEN else "layers"
    skip = hooks.LayerSkipConfig(indices=[0], fqn=blocks, **{**off, what: True})
    outputs = []
    for method in (None, Plan((Stage(1.0, {f"{blocks}.0.*": AGENTS}),)), AGENTS):
        model = ZOO[name].model()
        if method is not None:
            attngen.apply(model, method)
        hooks.apply_layer_skip(model, skip)
        outputs.append(run(name, model))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], run(name, ZOO[name].model()))


# Memory and weights


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind):
    model, plain, cpu = ZOO[FLUX2].model(), ZOO[FLUX2].model(), torch.device("cpu")
    with attngen.apply(plain, AGENTS):
        want = run(FLUX2, plain)
    attngen.apply(model, AGENTS)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(cpu, cpu, offload_type=kind, **blocks)
    assert torch.equal(run(FLUX2, model), want)


@pytest.mark.parametrize("sequential", [False, True])
def test_offloading_by_accelerate(sequential):
    import accelerate

    model, plain = ZOO[WAN].model(), ZOO[WAN].model()
    exact = run(WAN, plain)
    with attngen.apply(plain, AGENTS):
        want = run(WAN, plain)
    attngen.apply(model, AGENTS)
    if sequential:
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(run(WAN, model), want)
    attngen.remove(model)
    assert torch.equal(run(WAN, model), exact)


def test_layerwise_casting():
    outputs = []
    for method in (None, "softmax", AGENTS):
        model = ZOO[WAN].model()
        if method is not None:
            attngen.apply(model, method)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        outputs.append(run(WAN, model))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert outputs[2].isfinite().all()


@pytest.mark.parametrize("name", [FLUX2, QWEN, WAN, Z_IMAGE])
def test_lora_before_and_after(name):
    from peft import LoraConfig

    def add(model):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            targets = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]
            model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="lora")
        return model

    before, after, plain, alone = add(ZOO[name].model()), ZOO[name].model(), ZOO[name].model(), add(ZOO[name].model())
    attngen.apply(before, AGENTS)
    handle = attngen.apply(after, AGENTS)
    add(after)
    with attngen.apply(plain, AGENTS):
        without = run(name, plain)
    want = run(name, before)
    assert torch.equal(run(name, after), want) and not torch.equal(want, without)
    for model in (before, after):
        model.disable_adapters()
    close(run(name, before), without)
    handle.remove()
    after.enable_adapters()
    assert torch.equal(run(name, after), run(name, alone))


@pytest.mark.parametrize("name", [FLUX2, QWEN, WAN])
def test_fused_projections(name):
    model = ZOO[name].model()
    with attngen.apply(model, AGENTS):
        want = run(name, model)
        model.fuse_qkv_projections()
        close(run(name, model), want)
        model.unfuse_qkv_projections()
        close(run(name, model), want)
    model.fuse_qkv_projections()
    with attngen.apply(model, AGENTS):
        close(run(name, model), want)


def test_projections_of_another_kind_are_called_as_modules():
    """As quantised weights are: the model's own processor calls the module, whatever it is."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    wrapped, scaled = ZOO[WAN].model(), ZOO[WAN].model()
    for one, other in zip(wrapped.blocks, scaled.blocks, strict=True):
        one.attn1.to_v = Doubled(one.attn1.to_v)
        for parameter in other.attn1.to_v.parameters():
            parameter.mul_(2)
    for method in (AGENTS, DownsampledKV(2)):
        with attngen.apply(wrapped, method), attngen.apply(scaled, method):
            close(run(WAN, wrapped), run(WAN, scaled))


@pytest.mark.parametrize("name", [FLUX2, QWEN, Z_IMAGE])
def test_gradient_checkpointing(name):
    model = ZOO[name].model().train()
    grads = []
    with torch.enable_grad(), attngen.apply(model, AGENTS):
        for checkpointing in (False, True):
            model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
            model.zero_grad()
            run(name, model).square().mean().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_threads_on_one_model():
    """Two threads in different stages and sizes, step by step against each other."""
    model = ZOO[FLUX2].model()
    tiny, times = ZOO[FLUX2], (0.9, 0.2)
    attngen.apply(model, PLAN)

    def call(place):
        inputs = tiny.inputs(tiny.grids[place], 1 + place)
        return tiny.drawn(model(**{**inputs, "timestep": torch.full((1 + place,), times[place])}))

    want, got, barrier = [call(0), call(1)], [[], []], threading.Barrier(2)

    def work(place):
        barrier.wait()
        with torch.no_grad():
            for _ in range(10):
                got[place].append(call(place))

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, want[place]) for place in (0, 1) for one in got[place])
    assert [len(found) for found in got] == [10, 10]


def test_half_precision_and_autocast():
    for name in (FLUX2, WAN):
        model = ZOO[name].model()
        with attngen.apply(model, AGENTS):
            want = run(name, model)
            with torch.autocast("cpu", torch.bfloat16):
                assert (run(name, model).float() - want).norm() < 0.1 * want.norm()
        with attngen.apply(model, Plan.of(SoftmaxAttention())):
            assert isinstance(model, diffusers.ModelMixin) and run(name, model).isfinite().all()
