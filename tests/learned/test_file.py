"""Learned layers: what they compute, where their weights are, and the file that holds them."""

import copy
import dataclasses
import json
import math
import pickle
import struct
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import attngen
from attngen import (
    AgentAttention,
    AttnGenWarning,
    LearnedLayers,
    LearnedLinear,
    LearnedMediators,
    LinearAttention,
    Plan,
    Stage,
)
from attngen.learned.modules import HiddenModule
from tests import oracles
from tests.builders.hosts import HOSTS, fresh, normal, self_attention, slim, snapshot
from tests.hosts.numbers import assert_close, project, recorded

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

NAMES = ("sd15", "dit", "sit")
METHODS = {
    "mediator": LearnedMediators(4),
    "mediator-input": LearnedMediators(4, convolution="input"),
    "mediator-own": LearnedMediators(4, own_projections=True),
    "mediator-plain": LearnedMediators(4, maps="none"),
    "linear": LearnedLinear(),
    "linear-elu": LearnedLinear("elu", "heads", convolution=False),
    "linear-input": LearnedLinear("elu", "input", reduction=2),
    "linear-own": LearnedLinear("relu", "none", convolution=False, own_projections=True),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def learned(model, method, seed=0, spread=0.3):
    """Layers with random numbers in all their weights, as if they had been trained."""
    layers = LearnedLayers.create(model, method)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        layer: {n: t + spread * torch.randn(t.shape, generator=generator) for n, t in weights.items()}
        for layer, weights in layers.tensors.items()
    }
    return dataclasses.replace(layers, tensors=tensors)


# What they compute


def biases(weights, which, heads):
    """The mediator layer's tables under the names that the oracle knows."""
    tables = {part: weights[f"mixer.{which}_bias.{part}"] for part in ("map", "row", "column")}
    grid = (tables["row"].shape[2], tables["column"].shape[2])
    out = oracles.bilinear(tables["map"], grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            out[:, :, i, j] += tables["row"][:, :, i].double() + tables["column"][:, :, j].double()
    return out.flatten(2)


def wanted_mediators(attn, method, weights, x, grid, size):
    """The output (B, N, C) of a layer of learned mediators, as in the class's formula."""

    def projected(name, module, tokens):
        own = f"projections.{name}"
        return oracles.linear(tokens, weights, own) if method.own_projections else project(module, tokens)

    query, key, value = (projected(n, getattr(attn, n), x) for n in ("to_q", "to_k", "to_v"))
    by_head = [oracles.split_heads(tokens, attn.heads) for tokens in (query, key, value)]
    out = torch.zeros_like(by_head[2])
    for h in range(attn.heads):
        scale = (query.shape[2] // attn.heads) ** -0.5
        one = [tokens[:, h : h + 1] for tokens in by_head]
        if method.maps == "heads":  # the scales stand before the maps, as their square roots on queries
            half = float(weights["log_broadcast"][h].double()) / 2
            rest = float(weights["log_aggregation"][h].double()) - half
            for i, (which, factor) in enumerate((("query_map", half), ("key_map", rest))):
                scaled = one[i] * math.exp(factor)
                one[i] = scaled + scaled @ weights[f"{which}.weight"][h].double() + weights[f"{which}.bias"][h].double()
        one.append(oracles.pool_tokens(one[0][:, 0], grid, size)[:, None])
        exponents = [0 if method.maps == "heads" else weights[n][h] for n in ("log_aggregation", "log_broadcast")]
        out[:, h : h + 1] = oracles.agent_attention(
            *one,
            scale=scale * math.exp(exponents[0]),
            broadcast_scale=scale * math.exp(exponents[1]),
            aggregation_bias=biases(weights, "aggregation", attn.heads)[h],
            broadcast_bias=biases(weights, "broadcast", attn.heads)[h].T,
        )
    mixed = oracles.join_heads(out)
    convolution = (grid, weights["mixer.dwc.weight"], weights["mixer.dwc.bias"])
    if method.convolution == "values":
        mixed = mixed + oracles.depthwise_conv(value, *convolution)
    else:
        convolved = oracles.depthwise_conv(x, *convolution)
        mixed = mixed + projected("to_v", attn.to_v, convolved) - projected("to_v", attn.to_v, 0 * convolved)
    return projected("to_out", attn.to_out[0], mixed)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "absorbed"])
@pytest.mark.parametrize("which", ["mediator", "mediator-input", "mediator-own", "mediator-plain"])
def test_mediators_against_the_formula(name, which, kernel):
    host, model, method = HOSTS[name], fresh(name), METHODS[which]
    layers = learned(model, method)
    with attngen.apply(model, layers, kernel=kernel) as handle, recorded(model, layers.sizes) as calls:
        host(model, batch=1)
        kernels = {layer.stages[0].kernel for layer in handle.report().patched}
    assert kernels == {"auto": kernels, "sdpa": {"sdpa"}, "absorbed": {"absorbed"}}[kernel]
    for layer, sizes in layers.sizes.items():
        if sizes.grid[0] * sizes.grid[1] <= 64:
            attn, call = model.get_submodule(layer), calls[layer]
            want = wanted_mediators(attn, method, layers.tensors[layer], call["x"], sizes.grid, (2, 2))
            assert_close(call["out"], want)


def hedgehog(x):
    exponents = torch.exp(x)
    others = torch.exp(-x)
    return torch.cat([exponents / exponents.sum(-1, keepdim=True), others / others.sum(-1, keepdim=True)], -1)


def branch(weights, name, x):
    """W2 leaky_relu(layer_norm(W1 x)), LinFusion's network, by its numbered parts."""
    hidden = oracles.linear(x, weights, f"{name}.0")
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights[f"{name}.1.weight"].double() + weights[f"{name}.1.bias"].double()
    return oracles.linear(torch.where(normed > 0, normed, 0.01 * normed), weights, f"{name}.3")


def wanted_linear(attn, method, weights, x, grid):
    def projected(name, module, tokens):
        own = f"projections.{name}"
        return oracles.linear(tokens, weights, own) if method.own_projections else project(module, tokens)

    inputs = {"to_q": x.double(), "to_k": x.double(), "to_v": x.double()}
    if method.maps == "input":
        inputs["to_q"] = inputs["to_q"] + branch(weights, "query_map", x)
        inputs["to_k"] = inputs["to_k"] + branch(weights, "key_map", x)
    tokens = {n: projected(n, getattr(attn, n), value) for n, value in inputs.items()}
    query, key, value = (oracles.split_heads(tokens[n], attn.heads) for n in ("to_q", "to_k", "to_v"))
    if method.maps == "heads":
        for which, y in (("query_map", query), ("key_map", key)):
            weight, bias = weights[f"{which}.weight"].double(), weights[f"{which}.bias"].double()
            for h in range(attn.heads):
                y[:, h] = y[:, h] + y[:, h] @ weight[h] + bias[h]
    feature_map = hedgehog if method.feature_map == "hedgehog" else method.feature_map
    mixed = oracles.join_heads(oracles.linear_attention(query, key, value, feature_map, eps=method.eps))
    if method.convolution:
        mixed = mixed + oracles.depthwise_conv(tokens["to_v"], grid, weights["dwc.weight"], weights["dwc.bias"])
    return projected("to_out", attn.to_out[0], mixed)


@pytest.mark.parametrize("which", ["linear", "linear-elu", "linear-input", "linear-own"])
def test_linear_attention_against_the_formula(name, which):
    host, model, method = HOSTS[name], fresh(name), METHODS[which]
    layers = learned(model, method)
    with attngen.apply(model, layers), recorded(model, layers.sizes) as calls:
        host(model, batch=1)
    for layer, sizes in layers.sizes.items():
        if sizes.grid[0] * sizes.grid[1] <= 64:
            call = calls[layer]
            want = wanted_linear(model.get_submodule(layer), method, layers.tensors[layer], call["x"], sizes.grid)
            assert_close(call["out"], want, 1e-4)


@pytest.mark.parametrize(
    ("start", "same"),
    [("plain", AgentAttention(4, broadcast_exponent=1.0, shortcut=0.0)), ("agent", AgentAttention(4))],
)
def test_new_mediators_are_agent_attention(name, start, same):
    host, model = HOSTS[name], fresh(name)
    with attngen.apply(model, same):
        want = host(model)
    with attngen.apply(model, LearnedLayers.create(model, LearnedMediators(4), start=start)):
        assert (host(model) - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("which", ["mediator", "linear-input"])
@pytest.mark.parametrize("host_name", sorted(set(HOSTS) - {"sd3", "sd3-norm", "sd35", "flux"}))
def test_every_model_of_image_tokens_can_have_them(host_name, which):
    host, model = HOSTS[host_name], fresh(host_name)
    exact, clean = host(model), snapshot(model)
    layers = learned(model, METHODS[which])
    assert set(layers.sizes) == set(self_attention(model))
    with attngen.apply(model, layers):
        out = host(model)
    assert out.shape == exact.shape and torch.isfinite(out).all() and not torch.equal(out, exact)
    assert snapshot(model) == clean and torch.equal(host(model), exact)


@pytest.mark.parametrize("maps", ["heads", "input", "none"])
def test_new_linear_layers_are_linear_attention(name, maps):
    host, model = HOSTS[name], fresh(name)
    with attngen.apply(model, LinearAttention("elu")):
        want = host(model)
    method = LearnedLinear("elu", maps, eps=1e-6)
    with attngen.apply(model, LearnedLayers.create(model, method)):
        assert (host(model) - want).abs().max() <= 2e-5 * want.abs().max()


def test_own_projections_start_as_the_models(name):
    host, model = HOSTS[name], fresh(name)
    layers = [LearnedLayers.create(model, LearnedMediators(4, own_projections=own)) for own in (False, True)]
    with attngen.apply(model, layers[0]):
        want = host(model)
    with attngen.apply(model, layers[1]):
        assert torch.equal(host(model), want)
        for attn in self_attention(model).values():  # and then the model's own are not read
            for part in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
                part.weight.zero_()
        assert torch.equal(host(model), want)


def test_any_number_of_mediators_and_any_size(name):
    host, model = HOSTS[name], fresh(name)
    layers = learned(model, LearnedMediators(4))
    outputs = []
    for count in (1, 4, 6):
        other = dataclasses.replace(layers, method=dataclasses.replace(layers.method, num_mediators=count))
        with attngen.apply(model, other) as handle:
            outputs.append(host(model))
            assert max(layer.stages[0].agents or 0 for layer in handle.report().patched) == count
            if not host.square:
                assert torch.isfinite(host(model, (8, 24), batch=1)).all()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("which", ["mediator", "mediator-input", "mediator-own", "mediator-plain"])
def test_the_gradients_do_not_depend_on_the_path(which):
    host, grads = HOSTS["sit"], {}
    for kernel in ("reference", "absorbed"):
        model = fresh("sit")
        handle = attngen.apply(model, learned(model, METHODS[which]), kernel=kernel)
        for core in handle.learned.values():
            core.requires_grad_(True)
        with torch.enable_grad():
            host(model).square().sum().backward()
        grads[kernel] = {f"{n} {p}": t.grad for n, core in handle.learned.items() for p, t in core.named_parameters()}
    for key, grad in grads["reference"].items():
        assert grad is not None, key
        if key.endswith(("to_k.bias", "key_map.bias")):  # a softmax does not see what all keys share
            assert grad.abs().max() <= 1e-3 and grads["absorbed"][key].abs().max() <= 1e-3
            continue
        assert grad.abs().max() > 0, key
        assert (grads["absorbed"][key] - grad).abs().max() <= 2e-4 * max(0.1, float(grad.abs().max())), key


def test_an_attention_backend_is_for_exact_layers():
    host, model = HOSTS["sit"], fresh("sit")
    handle = attngen.apply(model, learned(model, LearnedMediators(4)), kernel="sdpa")
    want = host(model)
    for attn in self_attention(model).values():
        attn.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    assert torch.equal(host(model), want)
    assert {layer.stages[0].kernel for layer in handle.report().patched} == {"sdpa"}


def test_fused_projections_give_the_same():
    for which in ("mediator-input", "linear-input"):
        host, model = HOSTS["sd15"], fresh("sd15")
        layers = learned(model, METHODS[which])
        with attngen.apply(model, layers):
            want = host(model)
        model.fuse_qkv_projections()
        with attngen.apply(model, layers, kernel="sdpa"):
            assert (host(model) - want).abs().max() <= 1e-4 * want.abs().max()


# Where the weights are


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


@pytest.mark.share(4)
@pytest.mark.parametrize("sequential", [False, True])
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


@pytest.mark.parametrize("which", ["mediator", "linear", "linear-input"])
def test_compiled_in_one_graph(which):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    host, model, eager = HOSTS["sit"], slim("sit"), slim("sit")
    layers = learned(model, METHODS[which])
    attngen.apply(eager, layers)
    attngen.apply(model, layers)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for time in (0.9, 0.1):
        assert (host(compiled, time=time) - host(eager, time=time)).abs().max() <= 1e-5
    assert len(graphs) == 1
    torch.compiler.reset()


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


def test_the_report_counts_them(name, method):
    host, model = HOSTS[name], fresh(name)
    layers = learned(model, method)
    handle = attngen.apply(model, layers)
    host(model)
    report = handle.report()
    assert report.learned_weights == layers.num_weights == report.to_dict()["learned_weights"]
    assert {layer.name for layer in report.patched if layer.learned_weights} == set(layers.sizes)
    assert f"learned weights: {layers.num_weights:,} beside {len(layers.sizes)} layers" in str(report)
    assert all(layer.stages[0].method == method.kind for layer in report.patched if layer.learned_weights)
    assert all(stage.flops > 0 for layer in report.patched for stage in layer.stages)
    with attngen.apply(model, AgentAttention(4)) as other:
        assert other.report().learned_weights == 0 and "learned" not in str(other.report())


def test_flops_by_hand():
    from attngen.methods.base import LayerShape

    shape = LayerShape((8, 8), channels=32, width=32, num_heads=2)
    projections = 4 * 2 * 64 * 32 * 32
    # keys and values summed and read: 2 · 2 · N · C · features; maps: 2 · 2 · N · C · D; convolution: 2 · 9 · N · C
    hedgehog = 4 * 64 * 32 * 32 + 3 * 64 * 32 + 4 * 64 * 32 * 16 + 18 * 64 * 32
    assert LearnedLinear().flops(shape) == projections + hedgehog
    linfusion = 4 * 64 * 32 * 16 + 3 * 64 * 32 + 2 * (2 * 2 * 64 * 32 * 16)
    assert LearnedLinear("elu", "input", 2, convolution=False).flops(shape) == projections + linfusion
    mediators = 4 * 32 * 4 * 2 * 64 + 3 * 64 * 32 + 20 * 64 * 32 + 4 * 64 * 32 * 16
    assert LearnedMediators(4).flops(shape) == projections + mediators
    assert LearnedMediators(4, convolution="input").flops(shape) == projections + mediators + 2 * 64 * 32 * 32


@pytest.mark.parametrize("convolution", ["values", "input"])
def test_flops_of_absorbed_layers_by_hand(convolution):
    """Products with M · H columns, the mediators' own projections, and those of all tokens that a convolution keeps."""
    model, tokens, channels, width, count = fresh("sit"), 64, 32, 32, 4
    layers = learned(model, LearnedMediators(count, convolution=convolution))
    with attngen.apply(model, layers, kernel="absorbed") as handle:
        (stage,) = handle.report().patched[0].stages
    kept = {
        "values": 2 * tokens * width * channels,
        "input": channels * width * channels + tokens * channels * channels,
    }[convolution]
    products = 4 * count * 2 * tokens * channels + 5 * count * channels * width + kept
    assert stage.kernel == "absorbed"
    assert stage.flops == 2 * products + 18 * tokens * width + 4 * channels * width * 16


def test_joint_layers_have_none():
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no layer of image tokens alone"):
        LearnedLayers.create(fresh("sd3"), LearnedMediators(4))


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


# The file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layers.safetensors"


def test_round_trip(name, method, path):
    host, model = HOSTS[name], fresh(name)
    layers = learned(model, method)
    with attngen.apply(model, layers):
        want = host(model)
    layers.save(path, {"steps": 3})
    again = LearnedLayers.load(path)
    assert again.method == method and again.sizes == layers.sizes and again.model_class == type(model).__name__
    for how in (path, str(path), again):
        with attngen.apply(model, how):
            assert torch.equal(host(model), want)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"attngen"}
        content = json.loads(file.metadata()["attngen"])
    assert content["format"] == "attngen-layers" and content["version"] == 1 and content["note"] == {"steps": 3}
    assert content["model"]["class"] == type(model).__name__ and len(content["model"]["config_hash"]) == 64
    assert set(content["versions"]) == {"attngen", "torch", "diffusers"} and content["date"].startswith("20")
    assert set(content["layers"]) == set(layers.sizes)
    assert path.stat().st_mode & 0o777 == 0o644


def test_trained_weights_are_saved(path):
    host, model = HOSTS["sit"], fresh("sit")
    layers = learned(model, LearnedMediators(4))
    handle = attngen.apply(model, layers)
    cores = {name: HiddenModule(core) for name, core in handle.learned.items()}
    for core in handle.learned.values():
        core.log_broadcast += 0.5
    want = host(model)
    layers.with_cores(cores).save(path)
    handle.remove()
    attngen.apply(model, path)
    assert torch.equal(host(model), want)


def test_each_apply_has_weights_of_its_own():
    one, two = fresh("sit"), fresh("sit")
    layers = learned(one, LearnedMediators(4))
    before = {n: {k: t.clone() for k, t in weights.items()} for n, weights in layers.tensors.items()}
    first, second = attngen.apply(one, layers), attngen.apply(two, layers)
    for core in first.learned.values():
        core.log_broadcast += 1
    for name, weights in before.items():
        assert all(torch.equal(layers.tensors[name][k], t) for k, t in weights.items())
        assert torch.equal(second.learned[name].log_broadcast, weights["log_broadcast"])


def test_pipelines_and_other_models_of_them(path):
    """The layers go to the models that they were made for, and a pipeline's others stay as they are."""
    import diffusers

    unet, controlnet = fresh("sd15"), fresh("controlnet")
    learned(unet, LearnedMediators(4)).save(path)

    class Pipe:
        pass

    pipe = Pipe()
    pipe.unet, pipe.controlnet = unet, controlnet
    before = snapshot(controlnet)
    handle = attngen.apply(pipe, path)
    assert {layer.model for layer in handle.report().layers} == {"unet"}
    assert snapshot(controlnet) == before
    assert all(name.startswith("unet.") for name in handle.learned)
    assert isinstance(unet, diffusers.UNet2DConditionModel)


def rewritten(path, change):
    """The file with its content changed by `change(tensors, content)`."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["attngen"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, content)
    save_file(tensors, path, {"attngen": json.dumps(content)})


def drop(tensors, content):
    del tensors[next(iter(tensors))]


def add(tensors, content):
    tensors[f"{next(iter(content['layers']))}.attngen_core.extra"] = torch.zeros(1)


def stray(tensors, content):
    tensors["elsewhere.weight"] = torch.zeros(1)


def reshape(tensors, content):
    name = next(n for n in tensors if n.endswith("dwc.weight"))
    tensors[name] = tensors[name][:-1].clone()


def poison(tensors, content):
    name = next(n for n in tensors if n.endswith("dwc.weight"))
    tensors[name][0] = float("nan")


def entry(*keys, value):
    def change(tensors, content):
        place = content
        for key in keys[:-1]:
            place = place[key] if key is not Ellipsis else next(iter(place.values()))
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "is missing"),
        (add, "has a weight extra that learned-mediator does not have"),
        (stray, "the tensor elsewhere.weight belongs to none of its layers"),
        (reshape, "has shape"),
        (poison, "not finite numbers"),
        (entry("version", value=2), "version 2 of learned layers is not supported; this attngen reads 1"),
        (entry("version", value=True), "version True"),
        (entry("format", value="other"), 'no "format": "attngen-layers"'),
        (entry("layers", value={}), 'no "layers"'),
        (entry("model", value=None), 'for what "model"'),
        (entry("method", value={"method": "agent"}), "learned-mediator, learned-linear"),
        (entry("method", "wings", value=2), "no option 'wings'"),
        (entry("method", "num_mediators", value=0), "num_mediators must be a whole number >= 1, got 0"),
        (entry("method", "convolution", value="both"), "unknown convolution 'both'"),
        (entry("method", "maps", value="input"), "unknown maps 'input'"),
        (entry("method", "own_projections", value="yes"), "own_projections must be true or false"),
        (entry("layers", ..., "num_heads", value=-1), "num_heads of"),
        (entry("layers", ..., "num_heads", value=5), "5 heads of"),
        (entry("layers", ..., "grid", value=[4]), "the grid of"),
        (entry("layers", ..., "grid", value=[0, 4]), "grid height of"),
        (entry("layers", ..., "grid", value=[10**9, 10**9]), "has shape"),
        (entry("layers", ..., "qkv_bias", value=1), "qkv_bias of"),
        (entry("layers", ..., "colour", value=1), "the sizes of"),
    ],
)
def test_a_file_that_is_wrong_is_named(path, change, message):
    host, model = HOSTS["sd15"], fresh("sd15")
    exact, clean = host(model), snapshot(model)
    learned(model, LearnedMediators(4)).save(path)
    rewritten(path, change)
    with pytest.raises(ValueError) as error:
        attngen.apply(model, path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(model) == clean and torch.equal(host(model), exact)


def test_a_damaged_or_foreign_file_is_named(path, tmp_path):
    model = fresh("sd15")
    with pytest.raises(ValueError, match=f"cannot read the learned layers in {path}"):
        attngen.apply(model, path)
    learned(model, LearnedMediators(4)).save(path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for content in (b"", whole[:5], whole[: length // 2], whole[:-10], b"not a file of tensors", whole[:8] + whole[9:]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            attngen.apply(model, str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path}: this holds no learned layers"):
        attngen.apply(model, path)
    save_file({"weight": torch.zeros(2)}, path, {"attngen": "{"})
    with pytest.raises(ValueError, match=f"{path}: its metadata is not JSON"):
        attngen.apply(model, path)


def test_another_model_is_refused_before_anything_changes(path):
    model = fresh("sd15")
    learned(model, LearnedMediators(4)).save(path)
    other = fresh("dit")
    clean = snapshot(other)
    with pytest.raises(ValueError, match=f"{path} was made for a UNet2DConditionModel, and this is a DiT"):
        attngen.apply(other, path)
    assert snapshot(other) == clean
    xl = fresh("sdxl")
    clean = snapshot(xl)
    with pytest.raises(ValueError) as error:
        attngen.apply(xl, path)
    message = str(error.value)
    assert message.startswith(f"{path} does not fit UNet2DConditionModel: ") and message.count("it has no layer") >= 1
    assert snapshot(xl) == clean
    wide = fresh("sit")
    layers = learned(wide, LearnedMediators(4))
    sizes = {n: s._replace(num_heads=4) for n, s in layers.sizes.items()}
    with pytest.raises(ValueError, match="num_heads of transformer_blocks.0.attn is 2, not 4"):
        attngen.apply(wide, dataclasses.replace(layers, sizes=sizes))


def test_a_layer_with_another_processor_is_refused(path):
    model = fresh("sd15")
    learned(model, LearnedMediators(4)).save(path)

    class Other:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    next(iter(self_attention(model).values())).set_processor(Other())
    with pytest.raises(ValueError, match="cannot have learned weights: its processor is Other"):
        attngen.apply(model, path)


def test_another_configuration_is_warned_of(path):
    model = fresh("sit")
    layers = learned(model, LearnedMediators(4))
    layers.save(path)
    larger = type(model).from_config({**model.config, "sample_size": 32}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnGenWarning)
        attngen.apply(larger, path)
    other = type(model).from_config({**model.config, "num_classes": 11}).eval()
    with pytest.warns(AttnGenWarning, match="another configuration"):
        attngen.apply(other, path)


def test_methods_without_weights_are_refused():
    model = fresh("sit")
    for method in (LearnedMediators(4), Plan((Stage(1.0, {"*": LearnedLinear()}),))):
        with pytest.raises(ValueError, match="needs weights: apply"):
            attngen.apply(model, method)
    with pytest.raises(ValueError, match="saved as .safetensors"):
        learned(model, LearnedMediators(4)).save("layers.bin")
    with pytest.raises(ValueError, match="unknown start 'best'"):
        LearnedLayers.create(model, LearnedMediators(4), start="best")
    with pytest.raises(ValueError, match="nothing to learn"):
        LearnedLinear(maps="none", convolution=False)
    for wrong in ({"feature_map": "x"}, {"maps": "x"}, {"reduction": 0}, {"eps": -1.0}, {"convolution": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LearnedLinear(**wrong)


# LinFusion's published weights


def published(model, hidden=None, seed=0):
    """Tensors and config of LinFusion's layout for a UNet, with random numbers: a layer a number, in its own order."""
    modules, tensors = [], {}
    generator = torch.Generator().manual_seed(seed)

    def put(key, *shape):
        tensors[key] = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    for number, (name, attn) in enumerate(self_attention(model).items()):
        width = attn.inner_dim
        mid = width if hidden is None else (hidden if hidden == -1 else width // hidden)
        modules.append(
            {
                "module_name": name,
                "dim_n": width,
                "heads": attn.heads,
                "projection_mid_dim": None if hidden is None else mid,
            }
        )
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            put(f"{number}.{part}.weight", width, width)
        put(f"{number}.to_out.0.bias", width)
        for part in ("to_q_", "to_k_") if mid != -1 else ():
            put(f"{number}.{part}.0.weight", mid, width)
            put(f"{number}.{part}.0.bias", mid)
            put(f"{number}.{part}.1.weight", mid)
            put(f"{number}.{part}.1.bias", mid)
            put(f"{number}.{part}.3.weight", width, mid)
            put(f"{number}.{part}.3.bias", width)
    return tensors, {"_class_name": "LinFusion", "modules_list": modules}


def put_published(folder, tensors, config):
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return path


def linfusion_layer(tensors, number, count, x):
    """q = Wq (x + Fq(x)), k = Wk (x + Fk(x)), v = Wv x, features elu + 1, O = phi(q) (phi(k)^T v / N) / z."""
    part = {key.removeprefix(f"{number}."): t for key, t in tensors.items() if key.startswith(f"{number}.")}
    x = x.double()
    with_branch = "to_q_.0.weight" in part
    query, key = (
        oracles.split_heads(oracles.linear(x + branch(part, f"{n}_", x) if with_branch else x, part, n), count)
        for n in ("to_q", "to_k")
    )
    value = oracles.split_heads(oracles.linear(x, part, "to_v"), count)
    query, key = oracles.elu_plus_one(query), oracles.elu_plus_one(key)
    z = query @ key.mean(2, keepdim=True).transpose(2, 3) + 1e-4
    mixed = query @ (key.transpose(2, 3) @ value / x.shape[1]) / z
    return oracles.linear(oracles.join_heads(mixed), part, "to_out.0")


@pytest.mark.parametrize("hidden", [None, 4, -1])
def test_linfusion_against_its_formula(tmp_path, hidden):
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    tensors, config = published(model, hidden)
    path = put_published(tmp_path, tensors, config)
    layers = LearnedLayers.load(path)
    with attngen.apply(model, path) as handle, recorded(model, layers.sizes) as calls:
        host(model, batch=1)
        assert len(layers.sizes) == len(self_attention(model)) == len(handle.learned)
    for number, module in enumerate(config["modules_list"]):
        call = calls[module["module_name"]]
        assert_close(call["out"], linfusion_layer(tensors, number, module["heads"], call["x"]), 1e-4)
    assert torch.equal(host(model), exact)
    layers.save(tmp_path / "ours.safetensors")  # and as a file of ours
    with attngen.apply(model, tmp_path / "ours.safetensors"):
        again = host(model)
    with attngen.apply(model, path):
        assert torch.equal(host(model), again)


def test_linfusion_that_is_not_whole_is_named(tmp_path):
    model = fresh("sd15")
    tensors, config = published(model)
    path = put_published(tmp_path, tensors, config)

    def refused(message):
        with pytest.raises(ValueError) as error:
            attngen.apply(model, path)
        assert str(path) in str(error.value) and message in str(error.value), str(error.value)

    (tmp_path / "config.json").unlink()
    refused("need their config.json beside them")
    (tmp_path / "config.json").write_text("{}")
    refused("need their config.json beside them")
    put_published(tmp_path, tensors, {"modules_list": config["modules_list"][:-1]})
    refused("belongs to none of the 6 layers")
    put_published(tmp_path, {k: t for k, t in tensors.items() if k != "0.to_k.weight"}, config)
    refused("the weight projections.to_k.weight of down_blocks.0")
    mixed = copy.deepcopy(config)
    mixed["modules_list"][0]["projection_mid_dim"] = 2
    put_published(tmp_path, tensors, mixed)
    refused("different shares")
    zero = copy.deepcopy(config)
    zero["modules_list"][0]["heads"] = 0
    put_published(tmp_path, tensors, zero)
    refused("does not list LinFusion's layers")
    put_published(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="does not fit|made for a UNet2DConditionModel"):
        attngen.apply(fresh("dit"), path)


def test_the_hidden_module_hides_and_moves():
    hidden = HiddenModule(nn.Linear(2, 2))
    assert not list(hidden.parameters()) and not list(hidden.children()) and not hidden.state_dict()
    assert hidden.to(torch.float64).content.weight.dtype == torch.float64
