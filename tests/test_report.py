"""The report: its rows, its grids, its operations, and that it never says what is not so."""

import functools
import json
import re

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import attngen
from attngen import PRESETS, AgentAttention, DownsampledKV, LinearAttention, Plan, SoftmaxAttention, Stage, TokenMerging
from tests.builders.hosts import _UNET, ACTIVE, HOSTS, flux_ids, fresh, normal, randomised, self_attention

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")
SIZES = {"dit": (16, 16)}
TWO = Plan((Stage(1.0, {"*": AgentAttention(num_agents=4)}), Stage(0.25, {"*": DownsampledKV(2)})))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


def cross_attention(model):
    return {n for n, m in model.named_modules() if hasattr(m, "set_processor")} - set(self_attention(model))


def test_rows(name):
    model = fresh(name)
    handle = attngen.apply(model, TWO)
    HOSTS[name](model, SIZES.get(name, (12, 16)))
    report = handle.report()
    assert [layer.name for layer in report.patched] == list(self_attention(model))
    assert {layer.name for layer in report.layers if layer.left_alone} == cross_attention(model)
    assert report.starts == (1.0, 0.25)
    for layer in report.patched:
        attn = model.get_submodule(layer.name)
        assert layer.model == "" and layer.heads == attn.heads and layer.head_dim == attn.inner_dim // attn.heads
        assert layer.tokens == layer.grid[0] * layer.grid[1]
        assert [(s.start, s.method, s.agents) for s in layer.stages if s.why_exact is None] == [
            entry
            for entry in ((1.0, "agent", 4), (0.25, "downsampled-kv", None))
            if layer.tokens > 8 or entry[2] is None
        ]
    for layer in report.layers:
        if layer.left_alone:
            assert layer.grid is None and layer.stages == () and not layer.is_active
            assert "cross-attention" in layer.left_alone
    assert report.flops_exact == sum(layer.flops_exact for layer in report.patched)
    assert report.flops == tuple(sum(layer.stages[i].flops for layer in report.patched) for i in (0, 1))


def is_named(layer, names):
    """Whether a layer is among those that a line of the report names: `*` for a part, `a|b` for either, commas."""
    parts = layer.split(".")
    for pattern in names.split(", "):
        words = [word.split("|") for word in pattern.split(".")]
        if len(words) == len(parts) and all(w == ["*"] or p in w for w, p in zip(words, parts, strict=True)):
            return True
    return False


@pytest.mark.parametrize("when", ["before", "after", "given"])
def test_text_and_json(name, when):
    model = fresh(name)
    handle = attngen.apply(model, TWO)
    if when == "after":
        HOSTS[name](model)
    report = handle.report(grid=(16, 16)) if when == "given" else handle.report()
    text = str(report)
    rows = [re.split(r"  +", line) for line in text[: text.index("attention layers:")].splitlines()[1:]]
    for names, number, grid, tokens, *_ in rows:
        alike = [layer for layer in report.patched if f"{layer.grid[0]}x{layer.grid[1]}" == grid]
        assert sum(is_named(layer.name, names) for layer in alike) >= int(number), names
        assert {layer.tokens for layer in alike} == {int(tokens)}
    assert sum(int(number) for _, number, *_ in rows) == len(report.patched)
    for reason in {layer.left_alone for layer in report.layers if layer.left_alone}:
        assert reason in text
    assert "GFLOP" in text and "%" in text and "\n" in text
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))
    assert len(report.to_dict()["layers"]) == len(report.layers)


def real_grids(model, host, size):
    """(height, width) in front of every layer, seen from outside."""
    grids, hooks = {}, []
    for name, module in model.named_modules():
        if type(module).__name__ == "Transformer2DModel":

            def record(module, args, kwargs, name=name):
                shape = (args[0] if args else kwargs["hidden_states"]).shape
                grids.update({f"{name}.{n}": tuple(shape[-2:]) for n in self_attention(module)})

            hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
    host(model, size, batch=1)
    for hook in hooks:
        hook.remove()
    return grids or dict.fromkeys(self_attention(model), (size[0] // host.patch, size[1] // host.patch))


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (9, 15), (11, 13), (17, 4), (30, 6)])
def test_grids_are_the_real_ones(name, size):
    host = HOSTS[name]
    if host.square or host.patch > 1:
        size = tuple(side // host.patch * host.patch for side in size)
    if host.square:
        size = (size[0], size[0])
    model = fresh(name)
    want = real_grids(model, host, size)
    handle = attngen.apply(model, TWO)
    host(model, size, batch=1)
    assert {layer.name: layer.grid for layer in handle.report().patched} == want


def test_grid_before_the_first_call_and_of_choice(name):
    host, model = HOSTS[name], fresh(name)
    handle = attngen.apply(model, TWO)
    grids = {layer.name: layer.grid for layer in handle.report().patched}
    size = (64, 64) if name in ("flux", "controlnet") else (16, 16)
    side = size[0] // host.patch
    chosen = {layer.name: layer.grid for layer in handle.report(grid=(side, side)).patched}
    assert grids == chosen
    host(model)
    assert {layer.name: layer.grid for layer in handle.report((side, side)).patched} == chosen


def test_layers_with_equal_rows_share_a_line():
    model = fresh("sd15")
    handle = attngen.apply(model, TWO)
    rows = [line.split()[:3] for line in str(handle.report()).splitlines()[1:4]]
    assert rows == [
        ["down_blocks|up_blocks.*.attentions.*.transformer_blocks.0.attn1", "3", "16x16"],
        ["down_blocks|up_blocks.1.attentions.*.transformer_blocks.0.attn1", "3", "8x8"],
        ["mid_block.attentions.0.transformer_blocks.0.attn1", "1", "4x4"],
    ]


# Operations


def counted(model, host, size):
    """Operations of each layer for one picture, counted by PyTorch with every product in the open."""
    counter = FlopCounterMode(display=False, depth=None)
    with counter, sdpa_kernel(SDPBackend.MATH):
        host(model, size, batch=1)
    totals = {key.partition(".")[2]: sum(value.values()) for key, value in counter.get_flop_counts().items()}
    return {name: totals[name] for name in self_attention(model)}


@functools.cache
def stock_count(name, size):
    return counted(fresh(name), HOSTS[name], size)


@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_exact_operations_are_what_pytorch_counts(name, size):
    size = (16, 16) if HOSTS[name].square else size
    model = fresh(name)
    handle = attngen.apply(model, "softmax")
    HOSTS[name](model, size, batch=1)
    report = handle.report()
    assert {layer.name: layer.flops_exact for layer in report.patched} == stock_count(name, size)
    assert all(layer.stages[0].flops == layer.flops_exact for layer in report.patched)


@pytest.mark.parametrize("method", ["agents", "downsampled", "focal", "linear-elu", "merging", "merging-agents"])
def test_operations_of_methods_are_what_pytorch_counts(name, method):
    """Up to what is not a product of matrices (pooling, the shortcut, a normaliser): a few operations a channel."""
    model, host = fresh(name), HOSTS[name]
    handle = attngen.apply(model, ACTIVE[method])
    host(model, batch=1)
    want = counted(model, host, (16, 16))
    for layer in handle.report().patched:
        slack = 4 * layer.tokens * layer.heads * layer.head_dim
        assert 0 <= layer.stages[0].flops - want[layer.name] <= slack, layer.name


def test_agent_operations_by_hand():
    handle = attngen.apply(fresh("sd15"), AgentAttention(num_agents=4), kernel="sdpa")
    layer = handle.report(grid=(16, 16)).patched[0]
    tokens, width, agents = 256, 16, 4
    projections = 4 * 2 * tokens * width * width
    assert layer.flops_exact == projections + 2 * 2 * tokens * tokens * width
    two_softmaxes = 2 * (2 * 2 * agents * tokens * width)
    assert layer.stages[0].flops == projections + two_softmaxes + 3 * tokens * width


# It says what is so


def test_reasons_for_exact_layers():
    host, model = HOSTS["sd15"], fresh("sd15")
    plan = Plan(
        (
            Stage(
                1.0,
                {
                    "mid_block.*": AgentAttention(num_agents=16),
                    "down_blocks.0.*": SoftmaxAttention(),
                    "*": TokenMerging(0.5, stride=8),
                },
            ),
        ),
        min_tokens=10,
    )
    handle = attngen.apply(model, plan)
    host(model, (8, 16))
    reasons = {layer.name.split(".attentions")[0]: layer.stages[0].why_exact for layer in handle.report().patched}
    assert reasons["down_blocks.0"] == "the plan asks for softmax attention"
    assert "8 x 8 do not fit a grid of 4 x 8" in reasons["down_blocks.1"]
    assert "below 10 tokens" in reasons["mid_block"]
    assert reasons["up_blocks.2"] is None
    host(model, (16, 16))
    reasons = {layer.name.split(".attentions")[0]: layer.stages[0].why_exact for layer in handle.report().patched}
    assert "agents are too many for 16 tokens" in reasons["mid_block"]


def test_every_layer_that_is_reported_active_is():
    """Against the layers' outputs on the same input."""
    for name in ("sd15", "sd35", "flux", "pixart"):
        host, model = HOSTS[name], fresh(name)
        calls = {}

        def note(attn, args, kwargs, out, calls=calls):
            calls[attn] = (args, kwargs, out)

        for attn in self_attention(model).values():
            attn.register_forward_hook(note, with_kwargs=True)
        plan = Plan.of(AgentAttention(num_agents=8), min_tokens=20)
        handle = attngen.apply(model, plan)
        host(model)
        report, seen = handle.report(), dict(calls)
        handle.remove()
        for layer in report.patched:
            attn = model.get_submodule(layer.name)
            args, kwargs, out = seen[attn]
            exact = attn(*args, **{k: v for k, v in kwargs.items() if k != "attngen"})
            first, stock = (x[0] if isinstance(x, tuple) else x for x in (out, exact))
            assert torch.equal(first, stock) == (not layer.is_active), layer.name


def test_attention_over_pictures_is_not_reported_as_patched_and_active():
    """Some UNet blocks give an attention layer (B, C, H, W); it stays exact and the report has to say so."""
    types = ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    model = randomised(diffusers.UNet2DConditionModel(**{**_UNET, "down_block_types": types}))
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    HOSTS["sd15"](model)
    row = next(layer for layer in handle.report().layers if layer.name == "down_blocks.1.attentions.0")
    assert not row.is_active and (row.left_alone or row.stages[0].why_exact)


def test_tokens_beyond_the_grid_are_not_reported_active():
    """FLUX with the tokens of a reference picture behind the image's: exact, and the report has to say so."""
    host, model = HOSTS["flux"], fresh("flux")
    ids = torch.cat([flux_ids(8, 8), flux_ids(8, 8) + torch.tensor([1.0, 0, 0])])
    latents, time = normal(1, 4, 16, 8), torch.full((1,), 0.5)
    exact = host.forward(model, latents, time, img_ids=ids)
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    patched = host.forward(model, latents, time, img_ids=ids)
    assert torch.equal(patched, exact) == (not any(layer.is_active for layer in handle.report().layers))


def test_a_replaced_processor_is_not_reported_active():
    class Other:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    model = fresh("dit")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    model.transformer_blocks[1].attn1.set_processor(Other())
    rows = {}
    for layer in handle.report().layers:
        assert layer.name not in rows, "one row a layer"
        rows[layer.name] = layer
    assert rows["transformer_blocks.0.attn1"].is_active
    assert not rows["transformer_blocks.1.attn1"].is_active
    model = fresh("sd15")
    handle = attngen.apply(model, AgentAttention(num_agents=4))
    model.set_attention_slice(1)
    assert not any(layer.is_active for layer in handle.report().layers)


def test_a_custom_processor_is_listed_with_its_class():
    class Other:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    model = fresh("dit")
    model.transformer_blocks[1].attn1.set_processor(Other())
    report = attngen.apply(model, AgentAttention(num_agents=4)).report()
    row = next(layer for layer in report.layers if layer.name == "transformer_blocks.1.attn1")
    assert "Other" in row.left_alone and "Other" in str(report)


def test_attention_of_image_prompts_is_not_a_layer_of_the_grid():
    from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection

    projection = IPAdapterPlusImageProjection(
        embed_dims=8, output_dims=16, hidden_dims=8, depth=1, dim_head=4, heads=2, num_queries=4
    )
    model = fresh("sd15")
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    report = attngen.apply(model, AgentAttention(num_agents=4)).report()
    assert not [layer.name for layer in report.patched if layer.name.startswith("encoder_hid_proj")]


# It can be asked at any time


def test_after_remove():
    handle = attngen.apply(fresh("dit"), "agent")
    handle.remove()
    report = handle.report()
    assert report.patched == [] and isinstance(str(report), str)
    assert json.loads(report.to_json())["flops_exact"] == 0


@pytest.mark.parametrize("later", ["tome", "agentsd", "softmax"])
@pytest.mark.parametrize("earlier", ["tome", "agentsd", "softmax"])
def test_of_a_handle_that_was_replaced(earlier, later):
    """It may say that nothing of it is left, but neither fails nor shows the other patch as its own."""
    model = fresh("sd15")
    old = attngen.apply(model, earlier)
    new = attngen.apply(model, later)
    report = old.report()
    assert isinstance(str(report), str)
    if report.patched and earlier != later:
        assert report.patched[0].stages[0].method != new.report().patched[0].stages[0].method
    assert new.report().starts == PRESETS[later].starts


@pytest.mark.parametrize("grid", [(0, 5), (-3, 5), (5,), 5, "ab", (2.5, 4), (True, 4)])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        attngen.apply(fresh("dit"), "agent").report(grid=grid)


def test_a_report_of_several_models():
    class Pipe:
        unet, controlnet = fresh("sd15"), diffusers.MultiControlNetModel([fresh("controlnet"), fresh("controlnet")])

    handle = attngen.apply(Pipe, AgentAttention(num_agents=4))
    report = handle.report()
    assert {layer.model for layer in report.layers} == {"unet", "controlnet.nets.0", "controlnet.nets.1"}
    assert "controlnet.nets.1.down_blocks.0" in str(report) and "unet.mid_block" in str(report)
    attngen.remove(Pipe)
    assert not handle.is_applied


def test_linear_attention_is_exact_on_rotary_layers():
    report = attngen.apply(fresh("flux"), LinearAttention()).report()
    assert all("rotary" in layer.stages[0].why_exact for layer in report.patched)
