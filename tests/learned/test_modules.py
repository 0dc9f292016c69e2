"""The modules of learned layers: where their weights are, and what moves, copies and restores them."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import attngen
from attngen import AgentAttention, LearnedLayers, LearnedMediators
from attngen.learned.modules import HiddenModule
from tests.builders.hosts import HOSTS, fresh, normal, snapshot
from tests.builders.learned import METHODS, learned
from tests.cases import share

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def test_nothing_of_it_shows_or_stays(name, method, tmp_path):
    host, model = HOSTS[name], fresh(name)
    exact, clean, state = host(model), snapshot(model), model.state_dict()
    parameters = [id(parameter) for parameter in model.parameters()]
    handle = attngen.apply(model, learned(model, method))
    assert not torch.equal(host(model), exact)
    assert list(model.state_dict()) == list(state)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    model.load_state_dict(state, strict=True)
    copy.deepcopy(model).save_pretrained(tmp_path)  # which writes into the configuration
    handle.remove()
    assert snapshot(model) == clean
    assert torch.equal(host(model), exact)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(host(again.eval()), exact)
    assert set(load_file(next(tmp_path.glob("*.safetensors")))) == set(state)


def test_paused_is_exact_and_reapply_brings_the_same_weights_back():
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    handle = attngen.apply(model, learned(model, LearnedMediators(4)))
    patched = host(model)
    with handle.paused():
        assert torch.equal(host(model), exact)
    assert torch.equal(host(model), patched)
    model.set_attention_slice(1)
    assert (host(model) - exact).norm() <= 1e-5 * exact.norm()
    for _ in range(2):
        handle.reapply()
        assert (host(model) - patched).norm() <= 1e-5 * patched.norm()  # cross-attention is still sliced
        handle.remove()
        assert (host(model) - exact).norm() <= 1e-5 * exact.norm()


def test_another_patch_replaces_the_weights():
    host, model = HOSTS["sd15"], fresh("sd15")
    with attngen.apply(model, AgentAttention(4)):
        want = host(model)
    attngen.apply(model, learned(model, LearnedMediators(4)))
    attngen.apply(model, AgentAttention(4))
    assert torch.equal(host(model), want)
    assert not any(isinstance(module, HiddenModule) for module in model.modules())


def test_moves_reach_the_weights(name, method):
    host, model = HOSTS[name], fresh(name)
    handle = attngen.apply(model, learned(model, method))
    want = host(model)

    def found(what):
        return {getattr(p, what) for core in handle.learned.values() for p in core.parameters()}

    model.to(torch.bfloat16)
    assert found("dtype") == {torch.bfloat16}
    model.to(torch.float64)
    assert found("dtype") == {torch.float64}
    assert str(found("device")) == "{device(type='cpu')}"
    again = fresh(name)
    double = attngen.apply(again.to(torch.bfloat16), learned(fresh(name), method))
    assert {p.dtype for core in double.learned.values() for p in core.parameters()} == {torch.bfloat16}
    model = fresh(name)
    handle = attngen.apply(model, learned(model, method))
    assert torch.equal(host(model), want)
    model.to("meta")
    assert found("device") == {torch.device("meta")}


def test_weights_left_behind_follow_the_input():
    """As when a tool moves the layers' parameters by itself: what it does not know of comes along at the next call."""
    host, model = HOSTS["sit"], fresh("sit")
    handle = attngen.apply(model, learned(model, LearnedMediators(4)))
    want = host(model)
    for core in handle.learned.values():
        core.to(torch.float64)
    assert (host(model) - want).abs().max() <= 1e-5
    assert {p.dtype for core in handle.learned.values() for p in core.parameters()} == {torch.float32}


def test_weights_left_behind_follow_to_another_device():
    model = fresh("sit")
    handle = attngen.apply(model, learned(model, LearnedMediators(4)))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    devices = [{p.device.type for core in handle.learned.values() for p in core.parameters()}]
    model(torch.empty(2, 4, 16, 16, device="meta"), 0.5, torch.zeros(2, dtype=torch.long, device="meta"))
    devices.append({p.device.type for core in handle.learned.values() for p in core.parameters()})
    assert devices == [{"cpu"}, {"meta"}]


def test_half_precision_and_autocast(name, method):
    host, model = HOSTS[name], fresh(name)
    attngen.apply(model, learned(model, method, spread=0.1))
    want = host(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = host(model)
    assert (mixed - want).norm() <= 0.05 * want.norm()
    model.to(torch.bfloat16)
    if name == "sit":
        out = model(normal(2, 4, 16, 16, seed=4).bfloat16(), torch.full((2,), 0.6), torch.arange(2)).sample
        assert out.dtype == torch.bfloat16 and (out.float() - want).norm() <= 0.1 * want.norm()


@pytest.mark.parametrize(("method", "sequential"), share(4, METHODS, [False, True]))
def test_offloading(method, sequential):
    import accelerate

    host, model, plain = HOSTS["sd15"], fresh("sd15"), fresh("sd15")
    layers = learned(model, method)
    attngen.apply(plain, layers)
    want = host(plain)
    attngen.apply(model, layers)
    if sequential:
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    for _ in range(2):
        assert (host(model) - want).norm() <= 1e-5 * want.norm()
    attngen.remove(model)
    assert torch.equal(host(model), host(fresh("sd15")))


def test_group_offloading_and_layerwise_casting(method):
    host, plain = HOSTS["sit"], fresh("sit")
    layers = learned(plain, method)
    attngen.apply(plain, layers)
    want = host(plain)
    model, cpu = fresh("sit"), torch.device("cpu")
    attngen.apply(model, layers)
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    assert (host(model) - want).norm() <= 1e-5 * want.norm()
    model = fresh("sit")
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    handle = attngen.apply(model, layers)
    assert {p.dtype for core in handle.learned.values() for p in core.parameters()} <= {torch.float32, torch.bfloat16}
    assert (host(model) - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(how):
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    handle = attngen.apply(model, learned(model, LearnedMediators(4)))
    want = host(model)
    other = how(model)
    assert torch.equal(host(other), want)
    for core in handle.learned.values():
        for parameter in core.parameters():
            parameter.zero_()
    assert torch.equal(host(other), want) and not torch.equal(host(model), want)
    attngen.remove(other)
    assert torch.equal(host(other), exact)


def test_gradient_checkpointing_gives_the_same_gradients(method):
    host, grads = HOSTS["sit"], []
    for checkpointed in (False, True):
        model = fresh("sit")
        if checkpointed:
            model.enable_gradient_checkpointing()
        handle = attngen.apply(model, learned(model, method))
        for core in handle.learned.values():
            core.requires_grad_(True)
        with torch.enable_grad():
            host(model).square().sum().backward()
        grads.append([p.grad for core in handle.learned.values() for p in core.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_lora_on_the_projections_counts():
    from peft import LoraConfig

    host, model = HOSTS["sd15"], fresh("sd15")
    handle = attngen.apply(model, learned(model, LearnedMediators(4)))
    want = host(model)
    with torch.random.fork_rng():
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(host(model), want)
    model.delete_adapters("default")
    assert handle.is_applied and (host(model) - want).abs().max() <= 1e-5


def test_the_global_random_state_is_not_touched(tmp_path, global_rng_untouched):
    model = fresh("sit")
    for method in METHODS.values():
        LearnedLayers.create(model, method).save(tmp_path / "a.safetensors")
        attngen.apply(model, tmp_path / "a.safetensors")


def test_seeds_make_the_weights():
    model = fresh("sit")
    method = METHODS["linear-input"]
    one, two, three = (LearnedLayers.create(model, method, seed=seed).tensors for seed in (0, 0, 1))
    layer, weight = next(iter(one)), "query_map.0.weight"
    assert torch.equal(one[layer][weight], two[layer][weight])
    assert not torch.equal(one[layer][weight], three[layer][weight])
    assert not torch.equal(one[layer][weight], one[layer]["key_map.0.weight"])


def test_the_hidden_module_hides_and_moves():
    hidden = HiddenModule(nn.Linear(2, 2))
    assert not list(hidden.parameters()) and not list(hidden.children()) and not hidden.state_dict()
    assert hidden.to(torch.float64).content.weight.dtype == torch.float64
