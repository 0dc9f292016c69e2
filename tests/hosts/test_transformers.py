"""Joint attention: image queries go by the method, text queries stay exact; SD3 and FLUX layers by definition."""

import pytest
import torch

import attngen
from attngen import AgentAttention, DownsampledKV, FocalAttention, LinearAttention, Plan, Stage, TokenMerging
from tests import oracles
from tests.builders.hosts import HOSTS, flux_ids, fresh, normal
from tests.hosts.numbers import assert_close, heads, project, recorded, rotate, wanted
from tests.hosts.test_unet import Spy, seen  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
MADE = AgentAttention(9, agents="merged", gain=0.7, correction="nystrom")
PRESETS = [
    AgentAttention(4),
    AgentAttention(9, 1.0, 0.0),
    DownsampledKV(2),
    MADE,
    FocalAttention(2, 1, 4),
    LinearAttention("elu"),
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def text_of(attn, states):
    """Queries, keys and values of the text by its own projections."""
    return (
        heads(attn, attn.add_q_proj, attn.norm_added_q, states),
        heads(attn, attn.add_k_proj, attn.norm_added_k, states),
        heads(attn, attn.add_v_proj, None, states),
    )


def image_of(attn, x):
    return (
        heads(attn, attn.to_q, attn.norm_q, x),
        heads(attn, attn.to_k, attn.norm_k, x),
        heads(attn, attn.to_v, None, x),
    )


def exact_text(text, image):
    """Text queries over all keys."""
    key, value = (torch.cat([t, i], 2) for t, i in zip(text[1:], image[1:], strict=True))
    return oracles.join_heads(oracles.softmax_attention(text[0], key, value))


@pytest.mark.parametrize("method", PRESETS, ids=repr)
@pytest.mark.parametrize(("size", "grid"), [((16, 16), (8, 8)), ((8, 24), (4, 12))])
@pytest.mark.parametrize("name", ["sd3", "sd3-norm", "sd35"])
def test_sd3_layers_by_definition(name, size, grid, method):
    if grid != (8, 8) and isinstance(method, AgentAttention):
        method = AgentAttention(12)
    host, model = HOSTS[name], fresh(name)
    layers = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    attngen.apply(model, method)
    with recorded(model, layers) as calls:
        host(model, size)
    for layer in layers:
        attn, call = model.get_submodule(layer), calls[layer]
        image_out, text_out = call["out"]
        text = text_of(attn, call["kwargs"]["encoder_hidden_states"])
        mixed = wanted(attn, method, call["x"], grid, text=text)
        assert_close(image_out, project(attn.to_out[0], mixed))
        mixed_text = exact_text(text, image_of(attn, call["x"]))
        if not isinstance(method, DownsampledKV):
            assert_close(text_out, mixed_text if attn.context_pre_only else project(attn.to_add_out, mixed_text))


def test_sd35_second_attention_by_definition():
    model, layer, method = fresh("sd35"), "transformer_blocks.0.attn2", AgentAttention(4)
    attngen.apply(model, method)
    with recorded(model, [layer]) as calls:
        HOSTS["sd35"](model)
    attn, call = model.get_submodule(layer), calls[layer]
    assert_close(call["out"], project(attn.to_out[0], wanted(attn, method, call["x"], (8, 8))))


def test_the_layers_of_sd35_that_share_a_processor_get_their_own():
    model = fresh("sd35")
    block = model.transformer_blocks[0]
    assert block.attn.processor is block.attn2.processor
    shared = block.attn.processor
    handle = attngen.apply(model, AgentAttention(4))
    assert block.attn.processor is not block.attn2.processor
    handle.remove()
    assert block.attn.processor is block.attn2.processor is shared


@pytest.mark.parametrize("method", PRESETS[:4], ids=repr)
@pytest.mark.parametrize("grid", [(8, 8), (4, 12), (12, 4)])
def test_flux_layers_by_definition(grid, method):
    if grid != (8, 8) and isinstance(method, AgentAttention):
        method = AgentAttention(12)
    host, model = HOSTS["flux"], fresh("flux")
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
    attngen.apply(model, method)
    with recorded(model, [double, single]) as calls:
        host(model, grid)
    text_rows = torch.arange(5)

    attn, call = model.get_submodule(double), calls[double]
    tables = call["kwargs"]["image_rotary_emb"]
    image_out, text_out = call["out"][:2]
    query, key, value = text_of(attn, call["kwargs"]["encoder_hidden_states"])
    text = (rotate(query, tables, text_rows), rotate(key, tables, text_rows), value)
    mixed = wanted(attn, method, call["x"], grid, text=text, tables=tables, text_length=5)
    assert_close(image_out, project(attn.to_out[0], mixed))
    rows = torch.arange(5, 5 + grid[0] * grid[1])
    image_query, image_key, image_value = image_of(attn, call["x"])
    if not isinstance(method, DownsampledKV):
        mixed_text = exact_text(text, (image_query, rotate(image_key, tables, rows), image_value))
        assert_close(text_out, project(attn.to_add_out, mixed_text))

    attn, call = model.get_submodule(single), calls[single]
    tables = call["kwargs"]["image_rotary_emb"]
    states, image = call["x"][:, :5], call["x"][:, 5:]
    query, key, value = image_of(attn, states)
    text = (rotate(query, tables, text_rows), rotate(key, tables, text_rows), value)
    mixed = wanted(attn, method, image, grid, text=text, tables=tables, text_length=5)
    assert_close(call["out"][:, 5:], mixed)
    image_query, image_key, image_value = image_of(attn, image)
    if not isinstance(method, DownsampledKV):
        assert_close(call["out"][:, :5], exact_text(text, (image_query, rotate(image_key, tables, rows), image_value)))


@pytest.mark.parametrize(
    "name,method",
    [
        *((name, AgentAttention(4)) for name in ("sd3", "sd35", "flux")),
        *((name, LinearAttention("elu")) for name in ("sd3", "sd35")),  # it does not fit FLUX's rotary positions
    ],
    ids=str,
)
def test_text_queries_stay_exact(name, method):
    """The text's output of the first layer is that of the unpatched layer where the method keeps all image keys."""
    host, model = HOSTS[name], fresh(name)
    layer = "transformer_blocks.0.attn"
    outputs = []
    for patch in ("softmax", method):
        attngen.apply(model, patch)
        with recorded(model, [layer]) as calls:
            host(model)
        outputs.append(calls[layer]["out"])
    assert not torch.allclose(outputs[0][0], outputs[1][0], atol=1e-4)
    assert_close(outputs[1][1], outputs[0][1].double())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_merging_with_no_loss_where_tokens_repeat(name):
    """Image tokens that are the same in each 2 x 2 cell merge without a change, except that they weigh less."""
    host, model = HOSTS[name], fresh(name)
    attngen.apply(model, TokenMerging(0.5))
    out = host(model)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("size", [(16, 16), (4, 24), (24, 4), (10, 6), (2, 34), (14, 22)])
@pytest.mark.parametrize("name", ["pixart", "sd3", "sd35", "flux", "sit"])
def test_every_layer_gets_the_grid(name, size, seen):  # noqa: F811
    host, model = HOSTS[name], fresh(name)
    attngen.apply(model, Spy(4))
    host(model, size, batch=3)
    grid = (size[0] // host.patch, size[1] // host.patch)
    layers = attngen.apply(model, "softmax").report().patched
    assert seen == [("", grid, grid[0] * grid[1])] * len(layers)


@pytest.mark.parametrize(("time", "label"), [(1.0, "a"), (0.7, "a"), (0.5, "b"), (0.3, "b"), (0.25, "c"), (0.0, "c")])
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_every_layer_gets_its_stage(name, time, label, seen):  # noqa: F811
    host, model = HOSTS[name], fresh(name)
    starts = (1.0, 0.5, 0.25)
    plan = Plan(tuple(Stage(s, {"*": Spy(4, label=x)}) for s, x in zip(starts, "abc", strict=True)))
    attngen.apply(model, plan)
    host(model, time=time)
    assert {entry[0] for entry in seen} == {label}


def test_flux_reads_new_positions_of_the_same_size(seen):  # noqa: F811
    """One call after the other with other shapes of the same number of tokens, and ids that are freed in between."""
    host, model = HOSTS["flux"], fresh("flux")
    attngen.apply(model, Spy(4))
    for grid in ((8, 8), (4, 16), (16, 4), (8, 8), (2, 32)):
        seen.clear()
        host(model, grid)
        assert {entry[1] for entry in seen} == {grid}
    seen.clear()
    host.forward(model, normal(2, 4, 4, 16), torch.full((2,), 0.5), img_ids=flux_ids(4, 16).expand(2, -1, -1)[0])
    assert {entry[1] for entry in seen} == {(4, 16)}


def test_pixart_text_mask_reaches_cross_attention_only():
    host, model = HOSTS["pixart"], fresh("pixart")
    attngen.apply(model, AgentAttention(4))
    latents, time = normal(1, 4, 8, 24), host.clock(0.4, 1)
    text = normal(1, 5, 16)
    added = {"resolution": None, "aspect_ratio": None}

    def call(text):
        mask = torch.tensor([[1.0, 1, 1, 0, 0]])
        return model(latents, text, time, encoder_attention_mask=mask, added_cond_kwargs=added).sample

    hidden = text.clone()
    hidden[:, 3:] = 7.0
    assert (call(text) - call(hidden)).abs().max() < 1e-5
