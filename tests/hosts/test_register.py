"""`attngen.register_model`: a class that nobody knows, and rows that an example shows to be wrong."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import attngen
from attngen import AgentAttention
from attngen.hosts.check import check_row
from attngen.hosts.families import FAMILIES
from tests.builders.zoo import APART, ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

NAME = "MyTransformer2DModel"


class MyAttention(nn.Module):
    processor = None

    def __init__(self):
        super().__init__()
        self.to_qkv, self.heads = nn.Linear(8, 24), 2

    def forward(self, tokens):
        heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in self.to_qkv(tokens).chunk(3, dim=2)]
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class MyTransformer2DModel(nn.Module):
    """Self-attention over a grid after three text tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([MyAttention()])

    def forward(self, latents, when, text):
        tokens = torch.cat([text, latents.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens[:, text.shape[1] :]


@pytest.fixture
def example():
    with torch.random.fork_rng():
        model = MyTransformer2DModel().eval()
        inputs = {"latents": torch.randn(2, 8, 6, 8), "when": 0.5, "text": torch.randn(2, 3, 8)}
    yield model, inputs
    FAMILIES.pop(NAME, None)


def row(**changed):
    right = {
        "grid": lambda model, given: given["latents"].shape[-2:],
        "layers": "blocks.*",
        "text": "first",
        "sample": "latents",
        "time": "when",
        "clock": "times",
        "rotary": False,
    }
    return {**right, **changed}


@torch.no_grad()
def test_a_model_that_nobody_knows(example):
    model, inputs = example
    with pytest.raises(ValueError, match="register_model"):
        attngen.apply(model, "agent")
    want = model(**inputs)
    attngen.register_model(NAME, **row(), example=example)
    assert torch.equal(model(**inputs), want) and not model._forward_pre_hooks
    with attngen.apply(model, AgentAttention(num_agents=4), kernel="sdpa") as handle:
        assert not torch.equal(model(**inputs), want)
        assert {layer.grid for layer in handle.report().patched} == {(6, 8)}
    with pytest.raises(ValueError, match="has a row already"):
        attngen.register_model(NAME, **row())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": "last"}, "corner of latents changes token .* text='last' puts the image elsewhere"),
        ({"text": "none"}, "no product of MyTransformer2DModel is over its image"),
        ({"layers": "layers.*"}, "layers='layers.\\*' matches no self-attention module .* it has blocks.0"),
        ({"grid": lambda model, given: given["latents"].shape[:-3:-1]}, "grid has its sides exchanged"),
        ({"grid": lambda model, given: (6, 9)}, "are not the 54 tokens of the image"),
        ({"grid": lambda model, given: given["image"]}, "grid: its grid cannot be read: KeyError"),
        ({"sample": "hidden_states"}, "'hidden_states' is no argument .* which has latents, when, text"),
        ({"text": "middle"}, "text"),
        ({"clock": "seconds"}, "clock"),
        ({"grid": (6, 8)}, "grid"),
    ],
)
def test_a_wrong_row_is_named_and_not_kept(example, changed, message):
    model, inputs = example
    want = model(**inputs)
    with pytest.raises(ValueError, match=message):
        attngen.register_model(NAME, **row(**changed), example=example)
    assert NAME not in FAMILIES and torch.equal(model(**inputs), want)


def test_an_example_of_another_class(example):
    with pytest.raises(ValueError, match="must be a model of Another .* got a MyTransformer2DModel"):
        attngen.register_model("Another", **row(), example=example)
    assert "Another" not in FAMILIES


CHECKED = (
    "Flux2Transformer2DModel@references",
    "QwenImage21Transformer2DModel@edit",
    "ZImageTransformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "WanTransformer3DModel",
    "UNetSpatioTemporalConditionModel",
    "UVit2DModel",
)


def tried(name):
    tiny = {**ZOO, **APART}[name]
    check_row(tiny.model(), tiny.inputs(tiny.grids[0], 1))


@pytest.mark.parametrize("name", CHECKED)
def test_rows_of_the_table_are_right(name):
    tried(name)


@pytest.mark.parametrize("name", CHECKED[1:4])
def test_their_text_at_another_place_is_found(name, monkeypatch):
    cls = name.partition("@")[0]
    family = FAMILIES[cls]
    other = "first" if family.core.text == "last" else "last"
    monkeypatch.setitem(FAMILIES, cls, replace(family, core=replace(family.core, text=other)))
    with pytest.raises(ValueError, match="puts the image elsewhere|no product of"):
        tried(name)


def test_exchanged_sides_are_found(monkeypatch):
    family = FAMILIES["WanTransformer3DModel"]

    def exchanged(model, given):
        frames, height, width = family.grid(model, given)
        return frames, width, height

    monkeypatch.setitem(FAMILIES, "WanTransformer3DModel", replace(family, grid=exchanged))
    with pytest.raises(ValueError, match="its sides exchanged"):
        tried("WanTransformer3DModel")
