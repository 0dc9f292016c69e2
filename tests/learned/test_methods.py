"""Methods with learned weights: what they compute, their gradients, operations and options."""

import dataclasses

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import attngen
from attngen import AgentAttention, LearnedLayers, LearnedLinear, LearnedMediators, LinearAttention, Plan, Stage
from tests.builders.hosts import HOSTS, fresh, self_attention, slim, snapshot
from tests.builders.learned import METHODS, learned
from tests.hosts.numbers import assert_close, recorded
from tests.learned.formulas import wanted_linear, wanted_mediators

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


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


def test_exact_layers_read_the_models_projections_whatever_the_backend(name):
    """Where learned layers are exact, and the backend that the user chose computes them."""
    host, model = HOSTS[name], fresh(name)
    model.set_attention_backend("native")
    want = host(model)
    with attngen.apply(model, learned(model, METHODS["mediator-own"]), min_tokens=10_000) as handle:
        model.set_attention_backend("native")
        assert not any(layer.is_active for layer in handle.report().layers)
        assert_close(host(model), want.double(), 1e-6)


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


def test_the_report_counts_them(name, method):
    host, model = HOSTS[name], fresh(name)
    layers = learned(model, method)
    handle = attngen.apply(model, layers)
    host(model)
    report = handle.report()
    assert report.learned_weights == layers.num_weights == report.to_dict()["learned_weights"]
    assert {layer.name for layer in report.patched if layer.learned_weights} == set(layers.sizes)
    assert f"learned weights: {layers.num_weights:,} in {len(layers.sizes)} layers" in str(report)
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
