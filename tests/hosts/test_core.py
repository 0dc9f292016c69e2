"""Hosts, without knowing a class: one matrix over all rows of the table and tiny models of every class."""

import collections
import copy
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import attngen
from attngen import AgentAttention, DownsampledKV, Plan, SoftmaxAttention, TokenMerging
from attngen.hosts.families import FAMILIES
from attngen.layers.layer import Selection
from attngen.layers.route import EXACT, Route
from attngen.methods.base import AttentionMethod, with_context
from attngen.tokens import join_heads
from tests.builders.zoo import APART, ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

ALL = {**ZOO, **APART}
# Containers have a row by the ControlNets inside.
REFUSED = ("UNet2DConditionModel@kandinsky22", "UNet2DConditionModel@if")
ROWS = [name for name, tiny in ALL.items() if name not in REFUSED and (tiny.cls in FAMILIES or "Multi" in name)]


def core_of(name):
    """Where the image is, of a row of the core host."""
    cls = ALL[name].cls.replace("Multi", "") if "Multi" in name else ALL[name].cls
    return FAMILIES[cls].core


# A row that stays exact in a call like this, and why.
EXACT_ROWS = {
    "Lumina2Transformer2DModel@ragged": "an attention mask was given",
    "SkyReelsV2Transformer3DModel@causal": "an attention mask was given",
}
ACTING = [name for name in ROWS if name not in EXACT_ROWS]
# Layers before the patched ones have mixed the tokens: the corner's has changed most, or one beside it.
MIXED_BEFORE = ("Lumina2", "ZImage", "HunyuanVideo15Transformer3DModel@image", "BriaFibo2", "Transformer2DModel")
MIXED_BEFORE += (
    "UNet",
    "ControlNet",
    "MultiControlNet",
    "Sparse",
    "I2VGen",
    "Kandinsky3",
    "Stable",
    "DreamLite",
    "UVit",
)


@dataclass(frozen=True)
class Same(AttentionMethod):
    """Exact attention computed through the route, and a record of what it was given."""

    kind: ClassVar[str] = "same"
    seen: ClassVar[list[tuple]] = []

    def route(self, layer, call, like):
        return Route(self._run, "same")

    def _run(self, layer, hidden_states, call):
        query, key, value = layer.project(Selection(hidden_states, hidden_states))
        self.seen.append((query, key, value, layer.context, call.grid))
        mixed = layer.attention(query, *with_context(key, value, layer.context))
        return layer.output(join_heads(mixed).to(query.dtype))

    def flops(self, shape, kernel=""):
        return shape.exact_flops()


@dataclass(frozen=True)
class Kept(Same):
    """Softmax over every third image key and all others, and a record of the result."""

    kind: ClassVar[str] = "kept"
    ran: ClassVar[list[tuple]] = []

    def _run(self, layer, hidden_states, call):
        positions = torch.arange(0, hidden_states.shape[1], 3)
        query, key, value = layer.project(
            Selection(hidden_states, hidden_states[:, positions], key_positions=positions)
        )
        mixed = layer.attention(query, *with_context(key, value, layer.context))
        self.ran.append((layer.attn, call.context, positions, mixed[..., : layer.head_dim]))
        return layer.output(join_heads(mixed).to(query.dtype))


@pytest.fixture(autouse=True)
def _no_gradients():
    Same.seen.clear()
    Kept.ran.clear()
    with torch.no_grad():
        yield


@functools.cache
def model_of(name):
    return ALL[name].model()


def predicted(name, grid, batch=1, model=None, **changed):
    tiny = ALL[name]
    return tiny.drawn((model_of(name) if model is None else model)(**{**tiny.inputs(grid, batch), **changed}))


def state_of(model):
    return [
        (n, sorted(vars(m)), id(getattr(m, "processor", None)), list(m._forward_pre_hooks), list(m._forward_hooks))
        for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", ROWS)
def test_exact_when_asked_to_be_and_restored_bit_for_bit(name):
    model, grid = model_of(name), ALL[name].grids[0]
    want, state = predicted(name, grid), state_of(model)
    for method in ("softmax", AgentAttention(num_agents=4)):
        handle = attngen.apply(model, method)
        got = predicted(name, grid)
        if method == "softmax":
            assert torch.equal(got, want)
        assert str(handle.report())
        handle.remove()
        assert state_of(model) == state and torch.equal(predicted(name, grid), want)


@pytest.mark.parametrize("name", ACTING)
def test_a_method_that_keeps_everything_changes_nothing(name):
    """Order of text, image and references, masks, scales, grouped heads: all of it is in this number."""
    for place, batch in ((0, 1), (1, 2)):
        grid = ALL[name].grids[place]
        want = predicted(name, grid, batch)
        with attngen.apply(model_of(name), Same()) as handle:
            got = predicted(name, grid, batch)
            reported = {tall(layer.grid) for layer in handle.report().patched}
        assert (got - want).norm() <= 1e-5 * want.norm(), (place, batch)
        grids = {tall(seen[4]) for seen in Same.seen}
        assert {math.prod(one) for one in grids} == {seen[0].shape[2] for seen in Same.seen}
        assert grids <= levels(name, grid) and grids <= reported <= levels(name, grid)
        Same.seen.clear()


def test_frames_are_an_axis_of_the_grid():
    name = "WanTransformer3DModel"
    model, grid = model_of(name), ALL[name].grids[0]
    with attngen.apply(model, DownsampledKV(2), kernel="sdpa") as handle:
        got = predicted(name, grid)
        assert {layer.grid for layer in handle.report().patched} == {grid} and min(grid) > 1
        assert "x".join(map(str, grid)) in str(handle.report())
        other = handle.report(grid=(2, 8, 8)).patched
        assert {(layer.grid, layer.tokens) for layer in other} == {((2, 8, 8), 128)}
        for wrong in (8, (2, 8, 8, 8), (2, 0, 8)):
            with pytest.raises(ValueError, match="grid"):
                handle.report(grid=wrong)
    # Every second frame as well is another method, and one tall image of all frames would be another.
    with attngen.apply(model, DownsampledKV(2, frames=2), kernel="sdpa"):
        assert not torch.equal(predicted(name, grid), got)


def tall(grid):
    """Rows, those of all frames together, and columns."""
    return math.prod(grid[:-1]), grid[-1]


def levels(name, grid):
    """Grids that layers can have: that of the row, and halves of it in UNets; frames above each other or apart."""
    frames, height, width = grid
    width *= 2 if name.startswith("DreamLiteUNet") else 1  # with a reference beside it
    grids = {(many * height, width) for many in (1, frames)}
    return grids | {(-(-h // k), -(-w // k)) for h, w in grids for k in (2, 4) if "Net" in name}


@pytest.mark.parametrize("name", [name for name in ACTING if core_of(name) is not None])
def test_a_layers_product_over_fewer_keys_is_that_of_the_definition(name, monkeypatch):
    """In float64, from the queries, keys, values and masks of the unpatched model."""
    grid, model = ALL[name].grids[1], model_of(name)
    asked = asked_by(name, grid, monkeypatch)
    with attngen.apply(model, Kept()):
        predicted(name, grid, 2)
    attn, context, positions, got = Kept.ran[0]
    tokens = got.shape[2]
    query, key, value, mask, scale = next(one for one in asked[id(attn)] if one[0].shape[2] >= tokens)
    start = core_of(name).in_front(key.shape[2], tokens, context)
    image = torch.arange(start, start + tokens)
    others = torch.ones(key.shape[2], dtype=torch.bool)
    others[image] = False
    kept = torch.cat([image[positions], others.nonzero().flatten()])
    query = query if query.shape[2] == tokens else query[:, :, image]
    scores = query.double() @ key[:, :, kept].double().mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        rows = mask if mask.shape[2] in (1, tokens) else mask[:, :, image]
        rows = rows[..., kept]
        scores = scores.masked_fill(~rows, -math.inf) if rows.dtype == torch.bool else scores + rows.double()
    want = scores.softmax(dim=-1) @ value[:, :, kept].double()
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def asked_by(name, grid, monkeypatch):
    """Products of the unpatched model by the id of its attention module."""
    asked, inside, original = collections.defaultdict(list), [], nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if inside and not is_causal:
            key_, value_ = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            asked[inside[-1]].append((query, key_, value_, attn_mask, scale))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    hooks = []
    for module in model_of(name).modules():
        if hasattr(module, "processor"):
            hooks.append(module.register_forward_pre_hook(lambda attn, args: inside.append(id(attn))))
            hooks.append(module.register_forward_hook(lambda attn, args, out: inside.remove(id(attn))))
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", spy)
        predicted(name, grid, 2)
    for hook in hooks:
        hook.remove()
    return asked


@pytest.mark.parametrize("name", ACTING)
def test_methods_act_and_the_trace_agrees_with_the_report(name):
    model, grid = model_of(name), ALL[name].grids[1]
    want = predicted(name, grid, 2)
    for method in (AgentAttention(num_agents=4), DownsampledKV(2)):
        with attngen.apply(model, method) as handle, handle.trace() as trace:
            got = predicted(name, grid, 2)
            report = handle.report()
        assert got.isfinite().all() and not torch.equal(got, want)
        acting = {layer.name for layer in report.patched if layer.is_active}
        ran = {row.layer for row in trace.rows if row.kernel != EXACT}
        assert ran and ran <= acting


@pytest.mark.parametrize("name", ACTING)
@pytest.mark.parametrize("last", [False, True])
def test_a_corner_of_the_latents_is_the_token_that_the_row_says(name, last):
    """A wrong order of text and image keeps everything exact; this notices it."""
    tiny, model, grid = ALL[name], model_of(name), ALL[name].grids[0]
    inputs = tiny.inputs(grid, 1)
    changed = tiny.corner(copy.deepcopy(inputs[tiny.latents]), grid, last)
    first = []
    with attngen.apply(model, Same()):
        for latents in (inputs[tiny.latents], changed):
            Same.seen.clear()
            predicted(name, grid, 1, **{tiny.latents: latents})
            first.append(Same.seen[0])
    (before, *_, place), (after, *_) = first
    place = tall(place)
    differs = (before - after).abs().amax(dim=(1, 3)).flatten()  # frames may be samples of their own
    corner = differs.numel() - 1 if last else 0
    if not name.startswith(MIXED_BEFORE):
        assert differs.nonzero().flatten().tolist() == [corner]
        return
    if name.startswith("DreamLiteUNet"):
        corner = place[0] * place[1] - 1 - place[1] // 2 if last else 0  # the reference is right of it
    height, width = (-(-grid[1] * place[1] // grid[2]), place[1]) if place[0] != grid[0] * grid[1] else grid[1:]
    most = int(differs.argmax())
    assert most // (height * width) == corner // (height * width)
    for side, size in ((width, width), (height, height)):
        assert abs(most % size - corner % size) <= 2, (most, corner, place)
        most, corner = most // side, corner // side


@pytest.mark.parametrize("name", EXACT_ROWS)
def test_what_cannot_act_stays_exact_and_says_why(name):
    model, grid = model_of(name), ZOO[name].grids[1]
    want = predicted(name, grid, 2)
    with attngen.apply(model, AgentAttention(num_agents=4)) as handle, handle.trace() as trace:
        assert torch.equal(predicted(name, grid, 2), want)
    assert {row.kernel for row in trace.rows} <= {EXACT}


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"])
def test_methods_that_need_the_layers_input_say_so(name):
    model, grid = model_of(name), ZOO[name].grids[0]
    handle = attngen.apply(model, TokenMerging(0.5))
    want = predicted(name, grid)
    reasons = {stage.why_exact for layer in handle.report().patched for stage in layer.stages}
    assert any("needs the layer's input" in reason for reason in reasons)
    handle.remove()
    assert torch.equal(predicted(name, grid), want)


def test_stages_copies_and_gradients():
    """Stages by the model's own timestep; a deep copy is patched for itself; gradient checkpointing sees its call."""
    name = "WanTransformer3DModel"
    model, grid = ZOO[name].model(), ZOO[name].grids[0]
    plan = Plan((attngen.Stage(1.0, {"*": DownsampledKV(2)}), attngen.Stage(0.5, {"*": SoftmaxAttention()})))
    exact = [predicted(name, grid, model=model, timestep=torch.tensor([t])) for t in (900.0, 100.0)]
    handle = attngen.apply(model, plan)
    got = [predicted(name, grid, model=model, timestep=torch.tensor([t])) for t in (900.0, 100.0)]
    assert not torch.equal(got[0], exact[0]) and torch.equal(got[1], exact[1])
    copied = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(predicted(name, grid, model=copied, timestep=torch.tensor([900.0])), got[0])
    attngen.remove(copied)
    assert torch.equal(predicted(name, grid, model=copied, timestep=torch.tensor([900.0])), exact[0])
    with torch.enable_grad(), attngen.apply(model, AgentAttention(num_agents=4)):
        grads = []
        for checkpointing in (False, True):
            model.train()
            model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
            model.zero_grad()
            predicted(name, grid, model=model).square().sum().backward()
            grads.append(model.blocks[0].attn1.to_q.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "Flux2Transformer2DModel", "ZImageTransformer2DModel"])
def test_one_graph(name):
    model, grid = ZOO[name].model(), ZOO[name].grids[0]
    torch._dynamo.reset()
    with attngen.apply(model, AgentAttention(num_agents=4)):
        want = predicted(name, grid, model=model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = predicted(name, grid, model=compiled)
        assert (got - want).norm() <= 1e-5 * want.norm()
