"""Faults that users of patches like this one report, as kinds: other tools' wrappers, quantised weights, half-patched
pipelines, reference images."""

import copy

import diffusers
import pytest
import torch
from torch import nn

import attngen
from attngen import AgentAttention, Plan, SoftmaxAttention, Stage, TokenMerging
from attngen.hosts import hooks
from tests.builders.hosts import HOSTS, flux_ids, fresh, normal
from tests.builders.zoo import ZOO

quiet = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class OnlyLinear(torch.Tensor):
    """A quantised weight: it multiplies, and every other operation on it fails, as torchao's do for many."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.weight = weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *rest = args
            return function(x, weight.weight, *rest)
        if function in (torch.Tensor.detach, torch.Tensor.requires_grad_):
            return args[0]
        if getattr(function, "__name__", "") in ("__get__", "__set__", "size", "dim", "__repr__", "is_floating_point"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise NotImplementedError(f"{function} of a quantised weight")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of a quantised weight")


def quantised(model):
    for attn in (m for m in model.modules() if hasattr(m, "set_processor")):
        for linear in (m for m in attn.modules() if type(m) is nn.Linear):
            linear.weight = nn.Parameter(OnlyLinear(linear.weight.detach()), requires_grad=False)
    return model


@quiet
@pytest.mark.parametrize("host", ["sd15", "dit", "sd3", "flux"])
@pytest.mark.parametrize("method", [TokenMerging(0.5), AgentAttention(num_agents=4), SoftmaxAttention()], ids=repr)
def test_quantised_weights_are_no_sample_of_the_activations(host, method):
    plain, model = fresh(host), quantised(copy.deepcopy(fresh(host)))
    with attngen.apply(plain, method):
        want = HOSTS[host](plain, (16, 16))
    handle = attngen.apply(model, method)
    assert str(handle.report())
    # Absorbed layers need matrices, so there the quantised model projects.
    torch.testing.assert_close(HOSTS[host](model, (16, 16)), want, rtol=1e-4, atol=1e-4)
    assert all(stage.kernel != "absorbed" for layer in handle.report().patched for stage in layer.stages)


def test_a_report_that_fails_ends_nobodys_work(monkeypatch):
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    monkeypatch.setattr(hooks.root_hook(model), "review", lambda *_: 1 / 0)
    with pytest.warns(attngen.AttnGenWarning, match="could not be reviewed.*ZeroDivisionError"):
        HOSTS["sd15"](model, (16, 16))
    handle.remove()


@quiet
@pytest.mark.parametrize("host", ["sd15", "sdxl", "controlnet", "pixart"])
def test_methods_that_another_tool_wrapped(host):
    """DeepCache and others put functions that take anything in the place of `forward`."""
    plain, model = fresh(host), fresh(host)

    def wrap(module):
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    for module in model.modules():
        if type(module).__name__ in ("Transformer2DModel", "BasicTransformerBlock") or hasattr(module, "set_processor"):
            wrap(module)
    wrap(model)
    for method in (TokenMerging(0.5), AgentAttention(num_agents=4)):
        with attngen.apply(plain, method), attngen.apply(model, method):
            assert torch.equal(HOSTS[host](plain, (16, 16)), HOSTS[host](model, (16, 16)))
    assert torch.equal(HOSTS[host](plain, (16, 16)), HOSTS[host](model, (16, 16)))


def state_of(models):
    """What a patch changes: attributes, processors and hooks of all modules."""
    return [
        (
            name,
            sorted(vars(m)),
            id(getattr(m, "processor", None)),
            [type(h).__name__ for h in m._forward_pre_hooks.values()],
        )
        for model in models
        for name, m in model.named_modules()
    ]


@quiet
def test_all_or_nothing(monkeypatch):
    """What fails halfway leaves an older patch as it was, on every model."""
    models = [fresh("sd15"), fresh("controlnet")]

    class Pipe:
        unet, controlnet = models

    handle = attngen.apply(Pipe(), AgentAttention(num_agents=4))
    before = [HOSTS["sd15"](models[0], (16, 16)), HOSTS["controlnet"](models[1], (16, 16))]
    state = state_of(models)
    add = hooks.add_hook

    failed = []

    def fail(module, hook):
        if isinstance(hook, hooks.RootHook) and isinstance(module, diffusers.ControlNetModel) and not failed:
            failed.append(module)
            raise KeyboardInterrupt
        add(module, hook)

    with monkeypatch.context() as patched:
        patched.setattr(hooks, "add_hook", fail)
        with pytest.raises(KeyboardInterrupt):
            attngen.apply(Pipe(), TokenMerging(0.5))
    assert handle.is_applied
    assert not [pair for pair in zip(state, state_of(models), strict=True) if pair[0] != pair[1]]
    assert torch.equal(HOSTS["sd15"](models[0], (16, 16)), before[0])
    assert torch.equal(HOSTS["controlnet"](models[1], (16, 16)), before[1])
    handle.remove()
    assert not any("attngen" in vars(m) for x in models for m in x.modules())


def pipeline(**components):
    pipe = diffusers.DiffusionPipeline()
    pipe.register_modules(**components)
    return pipe


def test_parts_that_stay_exact_are_named_once():
    """A pipeline's second transformer, ControlNets and containers of unknown classes."""
    unknown = ZOO["SanaTransformer2DModel"].model()
    pipe = pipeline(transformer=fresh("sd3"), transformer_2=unknown)
    with pytest.warns(attngen.AttnGenWarning, match="transformer_2 stays exact: SanaTransformer2DModel") as warned:
        handle = attngen.apply(pipe, "agent", min_tokens=0)
    assert sum("transformer_2" in str(w.message) for w in warned) == 1
    (row,) = [row for row in handle.report().layers if row.model == "transformer_2"]
    assert row.name == "" and "SanaTransformer2DModel" in row.left_alone
    assert "unchanged: transformer_2: SanaTransformer2DModel" in str(handle.report())
    handle.remove()
    with pytest.raises(ValueError, match="SanaTransformer2DModel: its attention over the image is linear already"):
        attngen.apply(pipeline(transformer=unknown), "agent")
    attngen.remove(pipeline(transformer=unknown))


@quiet
def test_a_controlnet_of_another_kind_is_named():
    other = ZOO["SanaControlNetModel"].model()
    handle = attngen.apply(pipeline(transformer=fresh("sd3"), controlnet=other), "agent", min_tokens=0)
    assert [row.model for row in handle.report().layers if not row.name] == ["controlnet"]


@quiet
def test_reasons_are_the_true_ones():
    for name, reason in (
        ("UNet2DConditionModel@kandinsky22", "image and text are keys of one softmax in its AttnAddedKVProcessor2_0"),
        ("UNet2DConditionModel@if", "image and text are keys of one softmax in its AttnAddedKVProcessor2_0"),
    ):
        with pytest.raises(ValueError, match=reason):
            attngen.apply(ZOO[name].model(), "agent")


@quiet
@pytest.mark.parametrize("image,reference", [((16, 16), (8, 32)), ((8, 6), (3, 5)), ((6, 8), (12, 4))])
@pytest.mark.parametrize("method", [AgentAttention(num_agents=4), TokenMerging(0.5), SoftmaxAttention()], ids=repr)
def test_reference_images_are_context(image, reference, method):
    """The grid is that of the image alone, also where both would fill one together (16 x 16 and 8 x 32: 16 x 32)."""
    model = fresh("flux")
    ids = flux_ids(*image)
    others = flux_ids(*reference)
    others[:, 0] = 1
    tokens = normal(1, len(ids) + len(others), 4, seed=5)

    def call(latents):
        return model(
            hidden_states=latents,
            encoder_hidden_states=normal(1, 5, 16, seed=1),
            pooled_projections=normal(1, 8, seed=2),
            timestep=torch.tensor([0.4]),
            img_ids=torch.cat([ids, others]),
            txt_ids=torch.zeros(5, 3),
            guidance=torch.ones(1),
        ).sample

    exact = call(tokens)
    handle = attngen.apply(model, Plan((Stage(1.0, {"*": method}),)))
    with handle.trace() as trace:
        changed = call(tokens)
    report = handle.report()
    assert {layer.grid for layer in report.patched} == {image}
    assert {layer.tokens for layer in report.patched} == {image[0] * image[1]}
    if isinstance(method, SoftmaxAttention):
        assert torch.equal(changed, exact)
        return
    assert {row.kernel for row in trace.rows} == {stage.kernel for layer in report.patched for stage in layer.stages}
    error = (changed - exact).norm() / exact.norm()
    assert 0 < error < 1
    # One agent a token but one: nearly exact, which a wrong order of image and references would not be.
    handle.remove()
    attngen.apply(model, TokenMerging(ratio=1 / len(ids) + 1e-6, stride=2))
    nearly = (call(tokens) - exact).norm() / exact.norm()
    assert 0 < nearly < 0.2 * error or nearly < 0.05
