"""Layers whose projections go into the agents: the same numbers as with projections, and only where that can be."""

import copy

import pytest
import torch
from peft import LoraConfig

import attngen
from attngen import AgentAttention, TokenMerging
from attngen.layers import route
from attngen.layers.call import Call
from tests.builders.hosts import HOSTS, fresh

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
SINGLE = ["sd15", "sd21", "sdxl", "controlnet", "dit", "pixart", "sit"]
PLAIN, SHORTCUT = AgentAttention(4, broadcast_exponent=1.0, shortcut=0.0), AgentAttention(9)


@pytest.fixture
def absorbed_calls(monkeypatch):
    """Shapes of the inputs of absorbed layers, one entry a call."""
    calls = []
    run = route.absorbed_agent_attention
    monkeypatch.setattr(
        route, "absorbed_agent_attention", lambda *args, **options: calls.append(args[0].shape) or run(*args, **options)
    )
    return calls


def outputs(name, model, method, size=(16, 16), **call):
    """The model's output by projections and absorbed."""
    found = []
    for kernel in ("sdpa", "absorbed"):
        with attngen.apply(model, method, kernel=kernel):
            found.append(HOSTS[name](model, size, **call))
    return found


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", [PLAIN, SHORTCUT], ids=repr)
@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_the_same_picture(name, method, size, absorbed_calls):
    size = (16, 16) if HOSTS[name].square else size
    with torch.no_grad():
        projected, absorbed = outputs(name, fresh(name), method, size)
    assert absorbed_calls
    assert not torch.equal(projected, absorbed)
    assert (projected - absorbed).norm() <= 3e-6 * projected.norm()


@pytest.mark.parametrize("name", SINGLE)
def test_a_layer_in_float64(name):
    """Where only rounding could differ, to 1e-12; with gradients of the input and of all weights."""
    model = fresh(name)
    handle = attngen.apply(model, SHORTCUT)
    layer = max(handle.report().patched, key=lambda layer: layer.tokens)
    attn = copy.deepcopy(model.get_submodule(layer.name)).double()
    call = Call("0", layer.grid)
    found = []
    for kernel in ("sdpa", "absorbed"):
        spec = attn.attngen
        attn.attngen = type(spec)(**{**vars(spec), "kernel": kernel})
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, layer.tokens, attn.to_q.in_features, generator=generator, dtype=torch.float64)
        x.requires_grad_()
        out = attn.processor(attn, x, attngen=call)
        weights = [p for p in attn.parameters() if p.requires_grad]
        used = torch.autograd.grad(out.square().sum(), [x, *weights], allow_unused=True)
        found.append([out, *(torch.zeros(()) if grad is None else grad for grad in used)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-12 * max(1.0, one.norm().item())


def test_lora_is_absorbed_with_its_layer(absorbed_calls):
    model = fresh("sd15")
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.1)  # random factors of full size make large logits, where rounding hides what is tested
        projected, absorbed = outputs("sd15", model, SHORTCUT)
        model.disable_adapters()
        without, _ = outputs("sd15", model, SHORTCUT)
    assert absorbed_calls and (projected - without).norm() > 1e-3 * projected.norm()
    assert (projected - absorbed).norm() <= 3e-6 * projected.norm()


def test_fused_projections_are_absorbed(absorbed_calls):
    model = fresh("sd15")
    model.fuse_qkv_projections()
    with torch.no_grad():
        projected, absorbed = outputs("sd15", model, SHORTCUT)
    assert absorbed_calls and (projected - absorbed).norm() <= 3e-6 * projected.norm()


def reasons(model, method=SHORTCUT):
    handle = attngen.apply(model, method, kernel="absorbed")
    stages = [layer.stages[0] for layer in handle.report().patched if layer.is_active]
    assert any(stage.kernel for stage in stages) and all(stage.kernel != "absorbed" for stage in stages)
    return {stage.why_not_kernel for stage in stages if stage.kernel}


def test_what_cannot_be_absorbed_says_why(absorbed_calls):
    model = fresh("sd15")
    assert reasons(model, TokenMerging(0.25, 4, 0.9)) == {"token-merging attention has no path 'absorbed' here"}

    hooked = fresh("sd15")
    for layer in attngen.apply(hooked, SHORTCUT).report().patched:
        hooked.get_submodule(layer.name).to_v.register_forward_hook(lambda module, args, out: out + 1)
    assert reasons(hooked) == {"a projection is not a plain linear layer"}

    normed = fresh("dit")
    for layer in attngen.apply(normed, SHORTCUT).report().patched:
        normed.get_submodule(layer.name).norm_q = torch.nn.LayerNorm(16)
    assert reasons(normed) == {"queries and keys are normalised"}
    with torch.no_grad():
        for name, changed in (("sd15", hooked), ("dit", normed)):
            HOSTS[name](changed)
    assert not absorbed_calls


def test_a_chosen_backend_is_not_overruled(absorbed_calls):
    model = fresh("sd15")
    handle = attngen.apply(model, SHORTCUT, kernel="absorbed")
    model.set_attention_backend("native")
    with torch.no_grad():
        HOSTS["sd15"](model)
    assert not absorbed_calls
    (stage,) = handle.report().patched[0].stages
    assert (stage.kernel, stage.why_not_kernel) == ("native", "an attention backend was chosen")


def test_chosen_by_itself_where_it_pays(absorbed_calls, monkeypatch):
    """Four agents for heads of 16 pay on the CPU, as measured; one agent less than a head's size does not."""
    model = fresh("dit")
    handle = attngen.apply(model, AgentAttention(num_agents=2, shortcut=0.0))
    layer = handle.report().patched[0]
    assert layer.stages[0].kernel == "absorbed"
    with torch.no_grad():
        HOSTS["dit"](model)
    assert len(absorbed_calls) == len(handle.report().patched)
    absorbed_calls.clear()
    attngen.apply(model, AgentAttention(num_agents=30, shortcut=0.0))
    with torch.no_grad():
        HOSTS["dit"](model)
    assert not absorbed_calls
    attngen.apply(model, AgentAttention(num_agents=30, shortcut=0.0), kernel="absorbed")
    with torch.no_grad():
        HOSTS["dit"](model)
    assert absorbed_calls


def test_operations_of_an_absorbed_layer():
    model = fresh("dit")
    direct = attngen.apply(model, PLAIN, kernel="sdpa").report().patched[0]
    absorbed = attngen.apply(model, PLAIN, kernel="absorbed").report().patched[0]
    tokens, agents, heads, width = 64, 4, 2, 32
    products = 4 * agents * heads * tokens * width + 5 * agents * width * width
    assert absorbed.stages[0].flops == 2 * products < direct.stages[0].flops
