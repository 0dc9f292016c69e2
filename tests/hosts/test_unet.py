"""Models whose layers see image tokens only: what a patched layer computes, and on which grid."""

import dataclasses
import functools
from typing import ClassVar

import pytest
import tomesd
import torch

import attngen
from attngen import PRESETS, AgentAttention, DownsampledKV, FocalAttention, LinearAttention, Plan, Stage, TokenMerging
from attngen.hosts.image import AttnGenProcessor
from attngen.layers.call import Call
from tests.builders.hosts import HOSTS, TEXT, fresh, normal, self_attention
from tests.cases import share
from tests.hosts.numbers import assert_close, project, recorded, wanted, wanted_merging

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
SINGLE = ["sd15", "sd21", "sdxl", "controlnet", "dit", "pixart", "sit"]
POOLING = [AgentAttention(4), AgentAttention(9, 1.0, 0.0), DownsampledKV(2), DownsampledKV(3)]
MADE = [
    AgentAttention(9, gain=0.6),
    AgentAttention(4, correction="nystrom"),
    AgentAttention(9, agents="merged", gain=1.2),
    AgentAttention(9, agents="merged", correction="nystrom"),
]
FOCAL = [FocalAttention(2, 1, 4), FocalAttention(3, 1, 9)]
LINEAR = [LinearAttention(name) for name in ("elu", "relu", "focused")]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def layers_at(model, host, tokens):
    """Two of the patched layers with this many tokens, at 16 x 16 latents."""
    handle = attngen.apply(model, "softmax")
    names = [
        layer.name for layer in handle.report((16 // host.patch, 16 // host.patch)).patched if layer.tokens == tokens
    ]
    handle.remove()
    return names[:: max(1, len(names) - 1)][:2]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", POOLING + MADE + FOCAL + LINEAR, ids=repr)
def test_a_layer_by_definition(name, method):
    host, model = HOSTS[name], fresh(name)
    names = layers_at(model, host, 64)
    assert names
    attngen.apply(model, method)
    with recorded(model, names) as calls:
        host(model, batch=1)
    for layer in names:
        attn, call = model.get_submodule(layer), calls[layer]
        mixed = wanted(attn, method, call["x"], (8, 8))
        assert_close(call["out"], project(attn.to_out[0], mixed))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", [TokenMerging(0.5), TokenMerging(0.25, 4, 0.9), TokenMerging(0.4, 2, 0.5)], ids=repr)
def test_a_merging_layer_by_definition(name, method):
    """Similarity is that of the block's input; in SiT, whose blocks are its own, of the layer's."""
    host, model = HOSTS[name], fresh(name)
    names = layers_at(model, host, 64)[:1]
    attngen.apply(model, method)
    with recorded(model, names) as calls:
        host(model, batch=1)
    attn, call = model.get_submodule(names[0]), calls[names[0]]
    metric = call["x"] if name == "sit" else call["metric"]
    assert_close(call["out"], wanted_merging(attn, method, call["x"], metric, (8, 8)))


@pytest.mark.parametrize(
    ("size", "grid", "method"),
    [
        ((8, 24), (4, 12), AgentAttention(12)),
        ((24, 8), (12, 4), AgentAttention(12)),
        ((9, 13), (5, 7), AgentAttention(6)),
        ((9, 13), (5, 7), DownsampledKV(2)),
        ((24, 8), (12, 4), DownsampledKV(4)),
    ],
)
def test_other_shapes_by_definition(size, grid, method):
    host, model = HOSTS["sd15"], fresh("sd15")
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    attngen.apply(model, method)
    with recorded(model, [layer]) as calls:
        host(model, size)
    attn = model.get_submodule(layer)
    assert_close(calls[layer]["out"], project(attn.to_out[0], wanted(attn, method, calls[layer]["x"], grid)))


# tomesd


SIZES = [(16, 16), (8, 24), (24, 10), (9, 15), (13, 11), (7, 8), (17, 5)]


@pytest.mark.parametrize(("name", "ratio", "size"), share(3, ["sd15", "sd21"], [0.5, 0.3, 0.75], SIZES))
def test_tome_gives_the_numbers_of_tomesd(name, size, ratio):
    host, ours, theirs = HOSTS[name], fresh(name), fresh(name)
    tomesd.apply_patch(theirs, ratio=ratio, max_downsample=1, use_rand=False)
    plan = PRESETS["tome"]
    if ratio != 0.5:
        plan = Plan.of(TokenMerging(ratio), max_levels=plan.max_levels)
    attngen.apply(ours, plan)
    want = host(theirs, size)
    assert not torch.equal(want, host(fresh(name), size))
    assert_close(host(ours, size), want, 1e-5)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_tome_on_all_levels_and_other_cells(stride):
    host, ours, theirs = HOSTS["sd15"], fresh("sd15"), fresh("sd15")
    tomesd.apply_patch(theirs, ratio=0.4, max_downsample=8, sx=stride, sy=stride, use_rand=False)
    attngen.apply(ours, TokenMerging(0.4, stride))
    for size in ((16, 16), (24, 16), (20, 32)):
        assert_close(host(ours, size), host(theirs, size), 1e-5)


def test_the_tome_preset_is_tomesds_defaults():
    assert PRESETS["tome"] == Plan.of(TokenMerging(ratio=0.5, stride=2), max_levels=1)


# The recipe of the paper


def test_agentsd_by_definition_and_its_switch():
    host, model = HOSTS["sd15"], fresh("sd15")
    finest = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    deeper = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    exact = {}
    for time in (0.61, 0.59):
        with recorded(model, [deeper]) as calls:
            host(model, time=time, batch=1)
        exact[time] = calls[deeper]["x"].shape
    attngen.apply(model, "agentsd")
    early, late = TokenMerging(0.4, 4, 0.95), TokenMerging(0.4, 2)
    for time, method in ((1.0, early), (0.61, early), (0.6, late), (0.59, late), (0.0, late)):
        with recorded(model, [finest, deeper]) as calls:
            host(model, time=time, batch=1)
        attn, call = model.get_submodule(finest), calls[finest]
        assert_close(call["out"], wanted_merging(attn, method, call["x"], call["metric"], (16, 16)), 5e-5)
        call = calls[deeper]
        stock = AttnGenProcessor  # deeper levels run the layer's own processor
        assert type(model.get_submodule(deeper).processor) is stock
        plain = type(model.get_submodule(deeper).attngen.original)()
        assert torch.equal(call["out"], plain(model.get_submodule(deeper), call["x"]))


def test_agentsd_counts_of_the_paper():
    """At 512 px: 2458 merged tokens and 256 agents, then 2458 tokens without agents."""
    early, late = (stage.method_for("") for stage in PRESETS["agentsd"].stages)
    assert early.agents_at((64, 64)) == 256 and late.agents_at((64, 64)) is None
    x, call = normal(1, 4096, 2), Call("0", (64, 64))
    selection = early.select(x, call)
    assert selection.queries.shape[1] == 2458 and selection.agents.shape[1] == 256
    selection = late.select(x, call)
    assert selection.queries.shape[1] == 2458 and selection.agents is None


# The grid and the stage that reach the layers


@dataclasses.dataclass(frozen=True)
class Spy(AgentAttention):
    """Agent attention that notes what it is given where it runs."""

    label: str = ""

    seen: ClassVar[list] = []

    def route(self, layer, call, like):
        route = super().route(layer, call, like)
        return route if route.run is None else route._replace(run=functools.partial(self._noted, run=route.run))

    def _noted(self, layer, hidden_states, call, *, run):
        self.seen.append((self.label, call.grid, hidden_states.shape[1]))
        return run(layer, hidden_states, call)


@pytest.fixture
def seen():
    Spy.seen.clear()
    yield Spy.seen
    Spy.seen.clear()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8), (9, 15), (11, 13), (31, 3), (23, 29), (2, 40)])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "controlnet"])
def test_every_layer_gets_its_exact_grid(name, size, batch, seen):
    """Levels round up: 9 x 15, 5 x 8, 3 x 4."""
    host, model = HOSTS[name], fresh(name)
    grids = [size]
    for _ in range(2):
        grids.append(tuple(-(-side // 2) for side in grids[-1]))
    attngen.apply(model, Spy(1))
    host(model, size, batch=batch)
    assert len(seen) == sum(
        2 < h * w for h, w in (grids[level_of(layer)] for layer in self_attention(model))
    )  # one agent would be too many for two tokens
    assert {grid for _, grid, _ in seen} == {
        grids[level_of(layer)]
        for layer in self_attention(model)
        if grids[level_of(layer)][0] * grids[level_of(layer)][1] > 2
    }
    assert all(grid[0] * grid[1] == tokens for _, grid, tokens in seen)


def level_of(layer):
    part, number = layer.split(".")[:2]
    return {"down_blocks": int(number), "up_blocks": 2 - int(number)}[part] if part != "mid_block" else 2


@pytest.mark.parametrize(("time", "label"), [(1.0, "a"), (0.7, "a"), (0.5, "b"), (0.3, "b"), (0.25, "c"), (0.0, "c")])
@pytest.mark.parametrize("name", SINGLE)
def test_every_layer_gets_its_stage(name, time, label, seen):
    host, model = HOSTS[name], fresh(name)
    starts = (1.0, 0.5, 0.25)
    plan = Plan(tuple(Stage(s, {"*": Spy(4, label=x)}) for s, x in zip(starts, "abc", strict=True)))
    attngen.apply(model, plan)
    host(model, time=time)
    assert {entry[0] for entry in seen} == {label} and len(seen) == len(self_attention(model))


def test_transposed_pictures_are_not_confused():
    """8 x 24 and 24 x 8 have as many tokens: the result on the transposed input is not that on the other grid."""
    host, model = HOSTS["sd15"], fresh("sd15")
    attngen.apply(model, AgentAttention(6))
    wide, tall = host(model, (8, 24)), host(model, (24, 8))
    again = host(model, (8, 24))
    assert torch.equal(wide, again) and wide.shape != tall.shape


def test_pictures_of_a_batch_do_not_touch_each_other():
    for name in SINGLE:
        host, model = HOSTS[name], fresh(name)
        latents = normal(3, 4, 16, 16, seed=9)
        for method in (AgentAttention(4), TokenMerging(0.5, random=True), LinearAttention("elu")):
            attngen.apply(model, method)
            if name in ("dit", "sit"):
                continue  # their batches have different classes
            together = host.forward(model, latents, host.clock(0.4, 3))
            for i in range(3):
                alone = host.forward(model, latents[i : i + 1], host.clock(0.4, 1))
                assert (together[i] - alone[0]).abs().max() < 1e-4


# Layers that must stay exact


def test_an_attention_mask_keeps_a_layer_exact():
    model, latents, text = fresh("sd15"), normal(2, 4, 16, 16), normal(2, 5, TEXT)
    mask = torch.ones(2, 256)
    mask[:, 200:] = 0
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = normal(2, 256, 16)
    bias = (1 - mask[:, None]) * -1e4
    exact = layer(x, attention_mask=bias)
    attngen.apply(model, AgentAttention(4))
    assert torch.equal(layer(x, attention_mask=bias), exact)
    assert torch.isfinite(model(latents, 5, text).sample).all()


def test_gligen_layers_are_left_alone():
    import diffusers

    from tests.builders.hosts import _UNET, randomised

    config = {**_UNET, "attention_type": "gated"}
    model = randomised(diffusers.UNet2DConditionModel(**config))
    report = attngen.apply(model, AgentAttention(4)).report()
    assert {layer.name for layer in report.layers if "objects" in (layer.left_alone or "")} == {
        name for name, _ in model.named_modules() if name.endswith("fuser.attn")
    }
    text = normal(2, 5, TEXT)
    gligen = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": normal(2, 3, TEXT), "masks": torch.ones(2, 3)}
    out = model(normal(2, 4, 16, 16), 5, text, cross_attention_kwargs={"gligen": gligen}).sample
    assert torch.isfinite(out).all()


def test_layers_called_by_hand_are_exact():
    """Without the denoiser around it a layer knows no grid."""
    model, x = fresh("sd15"), normal(2, 256, 16)
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    exact = layer(x)
    attngen.apply(model, AgentAttention(4))
    assert torch.equal(layer(x), exact)
