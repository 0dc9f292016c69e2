"""SiTTransformer2DModel: golden outputs, elastic mediators, and the contracts diffusers has for models."""

from __future__ import annotations

import argparse
import copy
import math

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)
from peft import LoraConfig
from safetensors.torch import save_file
from torch.nn import functional as F

from attngen import SiTTransformer2DModel
from attngen.kernels.absorbed import absorbed_agent_attention
from attngen.layers import route
from attngen.sit.checkpoints import PATCH_SIZES, SIZES
from attngen.sit.model import position_embedding
from tests import oracles
from tests.golden_cases import golden_cases, state

KINDS = ("softmax", "mediator", "linear")
SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 10,
    "num_mediators": 4,
}


def build(kind: str = "softmax", **config) -> SiTTransformer2DModel:
    """A small model in which no weight is zero, so that every part matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiTTransformer2DModel(**{**SMALL, "attention": kind, **config})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(height: int = 8, width: int = 8, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "class_labels": torch.arange(batch),
    }


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.mark.parametrize("name,tensors,meta", [*golden_cases("sit_model_*"), *golden_cases("sit_mediator_model_*")])
def test_golden_models(name, tensors, meta):
    heads = meta["config"]["num_heads"]
    model = SiTTransformer2DModel.from_original(state(tensors), num_attention_heads=heads).eval()
    output = model(tensors["x"], tensors["t"], tensors["y"]).sample
    torch.testing.assert_close(output, tensors["out"], atol=1e-5, rtol=0)
    both = model(tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"]).sample
    conditional, unconditional = both.chunk(2)
    guided = unconditional[:, :3] + meta["cfg_scale"] * (conditional[:, :3] - unconditional[:, :3])
    want = torch.cat([torch.cat([guided, guided]), both[:, 3:]], dim=1)
    torch.testing.assert_close(want, tensors["cfg_out"], atol=1e-5, rtol=0)


def test_checkpoints_from_files(tmp_path):
    name, tensors, meta = next(iter(golden_cases("sit_mediator_model_*")))
    weights, heads = state(tensors), meta["config"]["num_heads"]
    want = SiTTransformer2DModel.from_original(weights, num_attention_heads=heads).state_dict()
    save_file(weights, tmp_path / "sit.safetensors")
    torch.save({"ema": weights, "model": {}, "args": argparse.Namespace(model="SiT")}, tmp_path / "sit.pt")
    loaded = SiTTransformer2DModel.from_original(tmp_path / "sit.safetensors")
    assert all(torch.equal(want[key], value) for key, value in loaded.state_dict().items())
    loaded = SiTTransformer2DModel.from_original(tmp_path / "sit.pt", allow_pickle=True)
    assert all(torch.equal(want[key], value) for key, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="allow_pickle=True"):
        SiTTransformer2DModel.from_original(tmp_path / "sit.pt")
    half = {key: value.half() for key, value in weights.items()}
    assert SiTTransformer2DModel.from_original(half).dtype == torch.float16


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint file"):
        SiTTransformer2DModel.from_original(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match="cut.safetensors"):
        SiTTransformer2DModel.from_original(tmp_path / "cut.safetensors")
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    with pytest.raises(ValueError, match="evil.pt"):
        SiTTransformer2DModel.from_original(tmp_path / "evil.pt", allow_pickle=True)
    with pytest.raises(ValueError, match="no tensor 'x_embedder.proj.weight'"):
        SiTTransformer2DModel.from_original({"something": torch.ones(1)})
    _, tensors, _ = next(iter(golden_cases("sit_model_*")))
    with pytest.raises(ValueError, match="num_attention_heads"):
        SiTTransformer2DModel.from_original(state(tensors))
    weights = state(tensors)
    weights.pop("final_layer.linear.bias")
    with pytest.raises((ValueError, RuntimeError), match="proj_out.bias"):
        SiTTransformer2DModel.from_original(weights, num_attention_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_compiled_and_distributed_models(prefix):
    _, tensors, meta = next(iter(golden_cases("sit_mediator_model_*")))
    named = {prefix + name: tensor for name, tensor in state(tensors).items()}
    named = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in named.items()}
    model = SiTTransformer2DModel.from_original({"ema": named}, num_attention_heads=meta["config"]["num_heads"])
    output = model.eval()(tensors["x"], tensors["t"], tensors["y"]).sample
    torch.testing.assert_close(output, tensors["out"], atol=1e-5, rtol=0)


TABLE = "y_embedder.embedding_table.weight"


@pytest.mark.parametrize(
    "known", [{"num_classes": 10}, {"class_dropout_prob": 0.0}, {"num_classes": 10, "class_dropout_prob": 0.2}]
)
def test_checkpoints_trained_without_label_dropout_have_all_their_classes(known, tmp_path):
    """The reference's table has a row for the null class only with label dropout: labels 0 to 9 give the same."""
    _, tensors, _ = next(iter(golden_cases("sit_model_*")))
    weights = state(tensors)
    whole = SiTTransformer2DModel.from_original(weights, num_attention_heads=4).eval()
    assert len(weights[TABLE]) == 11 and whole.config.num_classes == 10 and whole.config.class_dropout_prob == 0.1
    model = SiTTransformer2DModel.from_original({**weights, TABLE: weights[TABLE][:10]}, num_attention_heads=4, **known)
    model.eval().save_pretrained(tmp_path)
    for loaded in (model, SiTTransformer2DModel.from_pretrained(tmp_path).eval()):
        assert loaded.config.num_classes == 10
        assert loaded.config.class_dropout_prob == known.get("class_dropout_prob", 0.0)
        labels, x, t = torch.arange(10), tensors["x"][:1].expand(10, -1, -1, -1), tensors["t"][:1].expand(10)
        torch.testing.assert_close(loaded(x, t, labels).sample, whole(x, t, labels).sample, atol=1e-6, rtol=0)
        # The null class is there for fine-tuning with label dropout, and starts without a direction.
        assert loaded.class_embedder.weight.shape[0] == 11 and not loaded.class_embedder.weight[10].any()


def test_which_row_is_the_null_class():
    _, tensors, _ = next(iter(golden_cases("sit_model_*")))

    def classes(rows, **config):
        weights = {**state(tensors), TABLE: torch.randn(rows, 48)}
        model = SiTTransformer2DModel.from_original(weights, num_attention_heads=4, **config)
        assert torch.equal(model.class_embedder.weight[: len(weights[TABLE])], weights[TABLE])
        return model.config.num_classes, model.config.class_dropout_prob

    assert classes(11) == (10, 0.1)  # as published, and as ever where nothing is known
    assert classes(1001) == (1000, 0.1)
    assert classes(1000) == (1000, 0.0)  # ImageNet's classes, and no row more
    assert classes(1000, num_classes=999) == (999, 0.1)
    assert classes(1001, num_classes=1000, class_dropout_prob=0.0) == (1000, 0.0)  # fine-tuned without label dropout
    assert classes(11, class_dropout_prob=0.2) == (10, 0.2)
    for wrong in (9, 12):
        with pytest.raises(ValueError, match=f"num_classes={wrong} does not fit a table of 11 classes; pass 10 if"):
            classes(11, num_classes=wrong)


def reference_mediators(x, weights, prefix, heads, side):
    """Mediator attention as published (eq. 4 to 6, arXiv 2408.05710): pooled queries, biases in two parts."""
    batch, tokens, width = x.shape
    q, k, v = F.linear(x, weights[f"{prefix}qkv.weight"], weights[f"{prefix}qkv.bias"]).chunk(3, dim=-1)
    count = weights[f"{prefix}an_bias"].shape[1]
    image = q.transpose(1, 2).reshape(batch, width, side, side)
    agents = F.adaptive_avg_pool2d(image, math.isqrt(count)).flatten(2).transpose(1, 2)
    by_head = lambda z: z.unflatten(-1, (heads, -1)).transpose(1, 2)
    resized = lambda name: F.interpolate(weights[prefix + name], size=(side, side), mode="bilinear").flatten(2)[None]
    inward = resized("an_bias") + (weights[f"{prefix}ah_bias"] + weights[f"{prefix}aw_bias"]).flatten(3)
    outward = weights[f"{prefix}ha_bias"] + weights[f"{prefix}wa_bias"]
    outward = resized("na_bias").transpose(-1, -2) + outward.reshape(1, heads, tokens, count)
    scale = (width // heads) ** -0.5
    gathered = (by_head(agents) * scale @ by_head(k).transpose(-1, -2) + inward).softmax(-1) @ by_head(v)
    mixed = (by_head(q) * scale @ by_head(agents).transpose(-1, -2) + outward).softmax(-1) @ gathered
    values = v.transpose(1, 2).reshape(batch, width, side, side)
    local = F.conv2d(values, weights[f"{prefix}dwc.weight"], weights[f"{prefix}dwc.bias"], padding=1, groups=width)
    mixed = mixed.transpose(1, 2).flatten(2) + local.flatten(2).transpose(1, 2)
    return F.linear(mixed, weights[f"{prefix}proj.weight"], weights[f"{prefix}proj.bias"])


def original_mediator_weights(side, count, width=16, heads=2):
    """Official names and shapes of a model of two blocks on side x side tokens of 2 x 2 pixels."""
    shapes = {
        "pos_embed": (1, side * side, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        TABLE: (6, width),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for name, size in (("0", 256), ("2", width)):
        shapes |= {f"t_embedder.mlp.{name}.weight": (width, size), f"t_embedder.mlp.{name}.bias": (width,)}
    layers = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    tables = {
        "an_bias": (heads, count, 7, 7),
        "na_bias": (heads, count, 7, 7),
        "ah_bias": (1, heads, count, side, 1),
        "aw_bias": (1, heads, count, 1, side),
        "ha_bias": (1, heads, side, 1, count),
        "wa_bias": (1, heads, 1, side, count),
        "dwc.weight": (width, 1, 3, 3),
        "dwc.bias": (width,),
    }
    for block in ("blocks.0.", "blocks.1."):
        for name, (out, into) in layers.items():
            shapes |= {f"{block}{name}.weight": (out * width, into * width), f"{block}{name}.bias": (out * width,)}
        shapes |= {f"{block}attn.{name}": shape for name, shape in tables.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize(("side", "count"), [(2, 16), (2, 9), (1, 4), (3, 16), (4, 16), (4, 4), (8, 4)])
def test_mediators_of_a_checkpoint_equal_the_reference(side, count, tmp_path):
    """Also with more mediators than tokens, where the reference's pooling repeats tokens."""
    weights = original_mediator_weights(side, count)
    model = SiTTransformer2DModel.from_original(weights).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, side * side, 16, generator=torch.Generator().manual_seed(1))
    for loaded in (model, SiTTransformer2DModel.from_pretrained(tmp_path).eval()):
        for number, block in enumerate(loaded.transformer_blocks):
            want = reference_mediators(x, weights, f"blocks.{number}.attn.", 2, side)
            torch.testing.assert_close(block.attn(x, grid=(side, side)), want, atol=1e-5, rtol=1e-5)
        trained = loaded(**inputs(2 * side, 2 * side)).sample
        assert trained.isfinite().all()
        root = math.isqrt(count)
        assert torch.equal(loaded(**inputs(2 * side, 2 * side), num_mediators=(root, root)).sample, trained)
        # Other counts and sizes are the model's as ever.
        assert loaded(**inputs(2 * side, 2 * side), num_mediators=1).sample.isfinite().all()
        assert loaded(**inputs(12, 8)).sample.isfinite().all()


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_the_published_sizes(size, patch_size):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset(f"SiT-{size}/{patch_size}")
    # Table 1 of arXiv 2212.09748: depth and width; weights in millions for patch size 2.
    depth, width, millions = {"S": (12, 384, 33), "B": (12, 768, 130), "L": (24, 1024, 458), "XL": (28, 1152, 675)}[
        size
    ]
    assert len(model.transformer_blocks) == depth and model.proj_out.in_features == width
    assert model.config.patch_size == patch_size
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert patch_size != 2 or math.isclose(count, millions, rel_tol=0.02)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="SiT-XL/2"):
        SiTTransformer2DModel.from_preset("SiT-XXL/2")
    with pytest.raises(ValueError, match="softmax, mediator, linear"):
        build("sofmax")
    with pytest.raises(ValueError, match="elu, relu"):
        build("linear", feature_map="exp")
    with pytest.raises(ValueError, match="9 x 8"):
        build()(**inputs(9, 8))
    with pytest.raises(ValueError, match="5 x 1 mediators do not fit a grid of 4 x 4"):
        build("mediator")(**inputs(), num_mediators=(5, 1))
    with pytest.raises(ValueError, match="num_agents must be a whole number >= 1, got 0"):
        build("mediator")(**inputs(), num_mediators=0)


def test_mediators_equal_the_oracle():
    """A whole mediator layer against the definition in float64, at a count and a grid it was not made for."""
    model = build("mediator").double()
    attn, x = model.transformer_blocks[0].attn, torch.randn(2, 24, 16, dtype=torch.float64)
    grid, mediators = (6, 4), (3, 2)
    mixer = attn.mixer
    query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    agents = oracles.pool_tokens(query, grid, mediators)
    heads = lambda z: z.unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = oracles.agent_attention(
        heads(query),
        heads(key),
        heads(value),
        heads(agents),
        aggregation_bias=mixer.aggregation_bias(mediators, grid),
        broadcast_bias=mixer.broadcast_bias(mediators, grid).transpose(-1, -2),
    )
    image = value.transpose(1, 2).unflatten(2, grid)
    conv = torch.nn.functional.conv2d(image, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=16)
    want = attn.to_out[0](mixed.transpose(1, 2).flatten(2) + conv.flatten(2).transpose(1, 2))
    got = attn(x, grid=grid, num_mediators=mediators)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("convolution", ["values", "input"])
@pytest.mark.parametrize("size", [(16, 16), (8, 28)])
def test_absorbed_projections_give_the_same_numbers_and_gradients(size, convolution, monkeypatch):
    """Few mediators for the head size: the short way is taken, and is the long way's in float64."""
    call = {key: value.double() if value.is_floating_point() else value for key, value in inputs(*size).items()}
    taken = []

    def run(**attention_kwargs):
        model = build("mediator", attention_head_dim=32, convolution=convolution).double()
        for block in model.transformer_blocks:
            torch.nn.init.normal_(block.attn.mixer.dwc.weight, generator=torch.Generator().manual_seed(7))
        output = model(**call, num_mediators=2, attention_kwargs=attention_kwargs).sample
        output.square().sum().backward()
        return output, [parameter.grad for parameter in model.parameters()]

    monkeypatch.setattr(
        route, "absorbed_agent_attention", lambda *a, **k: taken.append(1) or absorbed_agent_attention(*a, **k)
    )
    short, short_gradients = run()
    assert len(taken) == SMALL["num_layers"]
    long, long_gradients = run(kernel="sdpa")
    assert len(taken) == SMALL["num_layers"]
    torch.testing.assert_close(short, long, atol=1e-12, rtol=1e-12)
    for one, other in zip(short_gradients, long_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def test_elastic_mediators():
    model, call = build("mediator", sample_size=16, num_mediators=16), inputs(16, 16)
    trained = model(**call).sample
    assert torch.equal(model(**call, num_mediators=16).sample, trained)
    assert torch.equal(model(**call, num_mediators=(4, 4)).sample, trained)
    for count in (1, 4, 9, 25, 64):
        output = model(**call, num_mediators=count).sample
        assert output.isfinite().all() and not torch.equal(output, trained)


def test_biases_of_neighbouring_counts_are_neighbours():
    """A table that grows from mediator to mediator still does at any other count, over the same range."""
    bias = build("mediator", sample_size=16, num_mediators=16).transformer_blocks[0].attn.mixer.aggregation_bias
    for table in (bias.map, bias.row, bias.column):
        table.zero_()
    bias.column += torch.arange(4.0).repeat_interleave(4)[None, :, None]  # the mediator's row: 0, 1, 2, 3
    for rows in (1, 2, 3, 4, 5, 8):
        means = bias((rows, 4), (8, 8)).view(2, rows, 4, -1).mean(dim=(0, 2, 3))
        want = (torch.arange(rows) + 0.5) * 4 / rows - 0.5  # the centre of each cell
        assert (means - want.clamp(0, 3)).abs().max() < 0.25
        assert rows == 1 or (means.diff() > 0).all()


def test_position_bias_between_its_sizes():
    bias = build("mediator", sample_size=16, num_mediators=16).transformer_blocks[0].attn.mixer.aggregation_bias
    for table in (bias.map, bias.row, bias.column):
        table.fill_(0.25)
    for mediators in ((1, 1), (2, 3), (4, 4), (7, 5)):
        for grid in ((8, 8), (5, 11), (16, 3)):
            out = bias(mediators, grid)
            assert out.shape == (1, 2, math.prod(mediators), math.prod(grid))
            torch.testing.assert_close(out, torch.full_like(out, 0.75))
    bias.map.zero_(), bias.column.zero_()
    bias.row.copy_(torch.arange(8.0).expand_as(bias.row))
    rows = bias((4, 4), (16, 8)).view(2, 16, 16, 8)
    assert torch.equal(rows, rows[..., :1].expand_as(rows))  # a row term does not depend on the column
    assert (rows[0, 0, 1:, 0] >= rows[0, 0, :-1, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_aspect_ratio(kind):
    model = build(kind)
    for height, width in ((8, 8), (4, 14), (10, 6), (2, 26)):
        assert model(**inputs(height, width)).sample.shape == (2, 4, height, width)
    assert model(**inputs(8, 8)).sample.ne(model(**inputs(8, 8) | {"class_labels": torch.tensor([5, 6])}).sample).any()


def test_a_transposed_picture_is_another_picture():
    """Rows and columns are told apart: position embedding and patches of a wide grid."""
    model, call = build(), inputs(4, 12)
    turned = {**call, "hidden_states": call["hidden_states"].transpose(2, 3).contiguous()}
    assert (model(**turned).sample.transpose(2, 3) - model(**call).sample).abs().max() > 1e-3
    embedding = position_embedding((3, 5), 16).view(3, 5, 16)
    assert torch.equal(embedding[0, :, :8], embedding[2, :, :8]) and torch.equal(
        embedding[:, 0, 8:], embedding[:, 4, 8:]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_call_conventions(kind):
    model, call = build(kind), inputs()
    output = model(**call).sample
    assert torch.equal(model(**call, return_dict=False)[0], output)
    assert torch.equal(model(*call.values()).sample, output)
    single = model(call["hidden_states"][:1], call["timestep"][0], call["class_labels"][:1]).sample
    torch.testing.assert_close(single, output[:1], atol=1e-6, rtol=0)
    null = model(call["hidden_states"], 0.5).sample
    assert torch.equal(null, model(call["hidden_states"], 0.5, torch.full((2,), 10)).sample)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    call = inputs()
    model = copy.deepcopy(build(kind)).to(dtype)
    output = model(call["hidden_states"].to(dtype), call["timestep"], call["class_labels"]).sample
    assert output.dtype == dtype
    assert (output.float() - build(kind)(**call).sample).norm() < 0.02 * output.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, call = build(kind), inputs()
    for options in ({}, {"max_shard_size": "20KB"}, {"variant": "fp16"}):
        model.save_pretrained(tmp_path / str(len(options)), **options)
        load = {key: value for key, value in options.items() if key == "variant"}
        loaded = SiTTransformer2DModel.from_pretrained(tmp_path / str(len(options)), **load).eval()
        assert torch.equal(loaded(**call).sample, model(**call).sample)
    assert loaded.config.num_mediators == 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    def gradients(model):
        model(**inputs(6, 8)).sample.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    model = build(kind)
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    for plain, again in zip(gradients(model), gradients(checkpointed), strict=True):
        assert plain is not None and plain.abs().max() > 0
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


def test_label_dropout_in_training_and_gradient_of_the_null_class():
    model = build(class_dropout_prob=1.0)
    call = inputs()
    null = model(call["hidden_states"], call["timestep"]).sample
    assert torch.equal(model.train()(**call).sample, null)
    assert not torch.equal(model.eval()(**call).sample, null)
    dropped = model(**call, drop_labels=torch.tensor([True, False])).sample
    assert torch.equal(dropped[:1], null[:1]) and torch.equal(dropped[1:], model(**call).sample[1:])


def test_a_fresh_model_predicts_zero():
    model = SiTTransformer2DModel(**SMALL).eval()
    assert not model(**inputs()).sample.any()


@pytest.mark.parametrize("kind", KINDS)
def test_fused_projections_and_lora(kind):
    model, call = build(kind), inputs()
    output = model(**call).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**call).sample, output, atol=1e-6, rtol=0)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**call).sample, output)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    assert (model(**call).sample - output).abs().max() > 1e-3
    torch.testing.assert_close(model(**call, attention_kwargs={"scale": 0.0}).sample, output, atol=1e-6, rtol=0)
    model.delete_adapters("default")
    torch.testing.assert_close(model(**call).sample, output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_caches_and_layer_skip(kind):
    call = inputs()
    output = build(kind)(**call).sample
    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    for config in (broadcast, FirstBlockCacheConfig(threshold=0.1), TaylorSeerCacheConfig(cache_interval=2)):
        model = build(kind)
        model.enable_cache(config)
        with model.cache_context("cond"):
            assert torch.equal(model(**call).sample, output)
        model.disable_cache()
        assert torch.equal(model(**call).sample, output)
    model = build(kind)
    apply_layer_skip(model, LayerSkipConfig(indices=[0]))
    assert (model(**call).sample - output).abs().max() > 1e-3


@pytest.mark.parametrize(
    "kind", ["mediator", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "mediator")]
)
def test_compile_without_graph_breaks(kind):
    torch._dynamo.reset()
    model = build(kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for height, width in ((8, 8), (12, 8), (6, 10)):
        call = inputs(height, width)
        torch.testing.assert_close(compiled(**call).sample, model(**call).sample, atol=1e-6, rtol=0)
    regional = build(kind)
    regional.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(regional(**inputs()).sample, model(**inputs()).sample)


def test_layerwise_casting_and_export():
    model, call = build("mediator"), inputs()
    output = model(**call).sample
    exported = torch.export.export(model, args=tuple(call.values())).module()
    torch.testing.assert_close(exported(*call.values()).sample, output, atol=1e-6, rtol=0)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < (model(**call).sample - output).norm() < 0.1 * output.norm()


def test_attention_backends_reach_sit():
    model, call = build(), inputs()
    output = model(**call).sample
    before = torch.get_rng_state()
    for layer in model.transformer_blocks:
        layer.attn.set_attention_backend("_native_math")
    torch.testing.assert_close(model(**call).sample, output, atol=1e-6, rtol=0)
    assert torch.equal(before, torch.get_rng_state())
    assert set(model.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
