"""Warm starts: what is kept is exact, what is new is neutral, what does not fit is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.scheduler import InterpolantScheduler
from tests import oracles
from tests.golden_cases import golden_cases, state
from tests.sit.test_dit import diffusers_dit, from_diffusers, original_names
from train.loop.checkpoint import save_checkpoint
from train.warm.start import Source, format_changes, read_source, warm_start

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 6,
    "num_mediators": 16,
}


def build(seed: int = 0, **config) -> SiTTransformer2DModel:
    """A small model in which no weight is zero."""
    with torch.random.fork_rng(devices=[]):
        model = SiTTransformer2DModel(**{**SMALL, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def source_of(model: SiTTransformer2DModel, **options) -> Source:
    return Source(dict(model.state_dict()), dict(model.config), **options)


def call(size: int | tuple[int, int] = 16) -> dict[str, Tensor]:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "timestep": torch.tensor([0.1, 0.8]),
        "class_labels": torch.tensor([1, 4]),
    }


@pytest.fixture(autouse=True)
def _no_gradients(global_rng_untouched):
    with torch.no_grad():
        yield


def actions(changes) -> dict[str, str]:
    return {change.name: change.action for change in changes}


def assert_same_weights(model, other, *prefixes: str):
    """Equal in all tensors but those whose names hold one of the prefixes."""
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        if not any(prefix in name for prefix in prefixes):
            assert torch.equal(tensor, theirs[name]), name


# Attention


def test_a_mediator_model_starts_as_plain_mediator_attention():
    """Zero position biases, zero convolution: each layer is the definition on the source's projections, in float64."""
    source = build(attention="softmax")
    model = build(1, attention="mediator")
    changes = warm_start(model, source_of(source))
    assert_same_weights(model, source, ".mixer.")
    assert all(not tensor.any() for name, tensor in model.state_dict().items() if ".mixer." in name)
    found = actions(changes)
    assert found == {name: "new" if ".mixer." in name else "kept" for name in model.state_dict()}
    grid, mediators = (8, 8), (4, 4)
    hidden = torch.randn(2, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for before, after in zip(source.transformer_blocks, model.double().transformer_blocks, strict=True):
        attn = before.attn.double()
        query, key, value = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
        agents = oracles.pool_tokens(query, grid, mediators)
        heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (query, key, value, agents)]
        want = attn.to_out[0](oracles.agent_attention(*heads).transpose(1, 2).flatten(2))
        torch.testing.assert_close(after.attn(hidden, grid=grid), want, atol=1e-12, rtol=0)


def test_a_linear_model_starts_without_its_convolution():
    source, model = build(attention="softmax"), build(1, attention="linear")
    found = actions(warm_start(model, source_of(source)))
    assert found["transformer_blocks.0.attn.mixer.weight"] == "new"
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if ".mixer." in name)
    assert_same_weights(model, source, ".mixer.")


@pytest.mark.parametrize("kind", ["mediator", "linear"])
def test_softmax_from_another_attention_drops_what_it_lacks(kind):
    source, model = build(attention=kind), build(1, attention="softmax")
    changes = warm_start(model, source_of(source))
    assert_same_weights(model, source)
    dropped = {change.name for change in changes if change.action == "dropped"}
    assert dropped == {name for name in source.state_dict() if ".mixer." in name}
    assert all(
        change.after is None and "softmax attention" in change.note for change in changes if change.after is None
    )


def test_the_same_model_is_kept_whole():
    source, model = build(attention="mediator"), build(1, attention="mediator")
    changes = warm_start(model, source_of(source))
    assert_same_weights(model, source)
    assert set(actions(changes).values()) == {"kept"} and len(changes) == len(model.state_dict())


def test_a_convolution_of_something_else_starts_at_zero():
    source = build(attention="mediator")
    model = build(1, attention="mediator", convolution="input")
    changes = {change.name: change for change in warm_start(model, source_of(source))}
    change = changes["transformer_blocks.1.attn.mixer.dwc.weight"]
    assert change.action == "new" and "the source convolves its values, the model its input" in change.note
    assert not model.transformer_blocks[1].attn.mixer.dwc.weight.any()
    assert_same_weights(model, source, ".dwc.")


# Resolution and number of mediators


@pytest.mark.parametrize("size", [32, 64, 8, (16, 32), (24, 10)])
def test_another_size_equals_the_source_run_at_that_size(size):
    source = build(attention="mediator")
    model = build(1, attention="mediator", sample_size=size)
    changes = warm_start(model, source_of(source))
    # On another shape the same number of mediators lies otherwise.
    assert_same_weights(model, source, "_bias.row", "_bias.column", *(["_bias.map"] if isinstance(size, tuple) else []))
    arguments = call(size)
    torch.testing.assert_close(model(**arguments).sample, source(**arguments).sample, atol=1e-6, rtol=1e-5)
    mediators = model.transformer_blocks[0].attn.mixer.mediators
    for ours, theirs in zip(model.transformer_blocks, source.transformer_blocks, strict=True):
        grid = ours.attn.mixer.grid
        for bias in ("aggregation_bias", "broadcast_bias"):
            one, other = (getattr(block.attn.mixer, bias)(mediators, grid) for block in (ours, theirs))
            assert torch.equal(one, other)
    assert "resampled" in {change.action for change in changes}


@pytest.mark.parametrize("count, size", [(4, 16), (9, 16), (64, 16), (4, 32), (36, 64), (8, (16, 32))])
def test_another_number_of_mediators_equals_the_source_asked_for_it(count, size):
    source = build(attention="mediator")
    model = build(1, attention="mediator", sample_size=size, num_mediators=count)
    changes = warm_start(model, source_of(source))
    mixer = model.transformer_blocks[0].attn.mixer
    arguments = call(size)
    want = source(**arguments, num_mediators=mixer.mediators).sample
    torch.testing.assert_close(model(**arguments).sample, want, atol=1e-6, rtol=1e-5)
    theirs = source.transformer_blocks[1].attn.mixer.broadcast_bias(mixer.mediators, mixer.grid)
    assert torch.equal(model.transformer_blocks[1].attn.mixer.broadcast_bias(mixer.mediators, mixer.grid), theirs)
    change = next(c for c in changes if c.name == "transformer_blocks.0.attn.mixer.aggregation_bias.map")
    assert change.action == "resampled" and "4 x 4 mediators on 8 x 8 tokens → " in change.note


@pytest.mark.parametrize("count", [8, 7, 16])
def test_a_wide_source(count):
    """Its mediators lie in rows and columns of their own, not in a square."""
    source = build(attention="mediator", sample_size=(16, 32), num_mediators=count)
    for settings in (dict(source.config), {}):  # without a configuration the tables' sizes tell
        for size in ((32, 64), 16, (32, 16)):
            model = build(1, attention="mediator", sample_size=size, num_mediators=count)
            warm_start(model, Source(dict(source.state_dict()), settings))
            torch.testing.assert_close(model(**call(size)).sample, source(**call(size)).sample, atol=1e-6, rtol=1e-5)


def test_a_count_that_does_not_tell_its_rows():
    """5 mediators on 3 x 6 tokens become 2 x 2, 4 become 1 x 4."""
    source = build(attention="mediator", sample_size=(6, 12), num_mediators=5)
    model = build(1, attention="mediator", sample_size=(12, 24), num_mediators=5)
    warm_start(model, source_of(source))
    mediators = model.transformer_blocks[0].attn.mixer.mediators
    want = source(**call((12, 24)), num_mediators=mediators).sample
    torch.testing.assert_close(model(**call((12, 24))).sample, want, atol=1e-6, rtol=1e-5)
    with pytest.raises(
        ValueError, match="4 mediators do not tell their rows and columns on 3 x 6 tokens; give the num"
    ):
        warm_start(model, Source(dict(source.state_dict()), {}))


def test_a_chain_of_resolutions():
    """256 → 512 → 1024 pixels: every link equals the one before it run at the next size."""
    model = build(attention="mediator")
    for seed, size in ((1, 32), (2, 64)):
        larger = build(seed, attention="mediator", sample_size=size)
        warm_start(larger, source_of(model))
        torch.testing.assert_close(larger(**call(size)).sample, model(**call(size)).sample, atol=1e-6, rtol=1e-5)
        model = larger


@pytest.mark.parametrize("name, tensors, metadata", golden_cases("sit_mediator_model_*"))
def test_the_references_rule(name, tensors, metadata, tmp_path):
    """Rows and columns with aligned ends for each head and mediator, all else as it is, read as a larger model."""
    weights = state(tensors)
    save_file(weights, tmp_path / "low.safetensors")
    side = math.isqrt(weights["pos_embed"].shape[1])
    high = dict(weights, pos_embed=torch.zeros(1, (2 * side) ** 2, weights["pos_embed"].shape[2]))
    for key, table in weights.items():
        axis = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}.get(key.rpartition(".")[2])
        if axis is None:
            continue
        positions = torch.arange(2 * side, dtype=torch.float64) * (side - 1) / (2 * side - 1)
        low = positions.floor().long().clamp(max=side - 2)
        share = (positions - low).view(*[1] * axis, -1, *[1] * (table.ndim - axis - 1))
        picked = [table.double().index_select(axis, index) for index in (low, low + 1)]
        high[key] = ((1 - share) * picked[0] + share * picked[1]).float()
    with torch.random.fork_rng(devices=[]):
        want = SiTTransformer2DModel.from_original(high).eval()
        model, consistent = (SiTTransformer2DModel.from_config(want.config).eval() for _ in range(2))
    changes = warm_start(model, tmp_path / "low.safetensors", interpolation="reference")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[key], atol=1e-6, rtol=1e-6)
    arguments = call(2 * side * metadata["config"]["patch_size"])
    torch.testing.assert_close(model(**arguments).sample, want(**arguments).sample, atol=1e-5, rtol=1e-5)
    # and is not ours
    warm_start(consistent, tmp_path / "low.safetensors")
    assert (consistent(**arguments).sample - want(**arguments).sample).abs().max() > 1e-4
    found = actions(changes)
    assert found["transformer_blocks.0.attn.mixer.aggregation_bias.map"] == "kept" and found["pos_embed"] == "dropped"
    assert found["transformer_blocks.0.attn.mixer.broadcast_bias.column"] == "resampled"


def test_the_references_rule_keeps_the_number_of_mediators():
    model = build(1, attention="mediator", num_mediators=4)
    with pytest.raises(
        ValueError, match="4 x 4 mediators in the source, 2 x 2 in the model; the reference's rule keeps"
    ):
        warm_start(model, source_of(build(attention="mediator")), interpolation="reference")
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'; known: consistent, reference"):
        warm_start(model, source_of(build(attention="mediator")), interpolation="cubic")


# Classes and channels


def test_classes_by_number():
    source, fewer, more = build(), build(1, num_classes=4), build(2, num_classes=9)
    table = source.class_embedder.weight
    change = next(c for c in warm_start(fewer, source_of(source)) if c.name == "class_embedder.weight")
    assert torch.equal(fewer.class_embedder.weight, torch.cat([table[:4], table[6:]]))
    assert (change.action, change.note) == ("adapted", "4 classes kept, 0 new from the mean, 2 dropped")
    change = next(c for c in warm_start(more, source_of(source)) if c.name == "class_embedder.weight")
    torch.testing.assert_close(more.class_embedder.weight[6:9], table[:6].mean(0).expand(3, -1), atol=1e-7, rtol=0)
    assert torch.equal(more.class_embedder.weight[:6], table[:6])
    assert torch.equal(more.class_embedder.weight[9], table[6])
    assert change.note == "6 classes kept, 3 new from the mean, 0 dropped"
    assert (change.before, change.after) == ((7, 32), (10, 32))


def test_classes_by_name():
    source = build(num_classes=3)
    table = source.class_embedder.weight
    found = source_of(source, id2label={0: "Cat", 1: "dog", 2: "fox"})
    model = build(1, num_classes=3)
    changes = warm_start(model, found, id2label={0: "Fox", 1: "owl", 2: "cat"})
    want = torch.stack([table[2], table[:3].mean(0), table[0], table[3]])
    torch.testing.assert_close(model.class_embedder.weight, want, atol=1e-7, rtol=0)
    notes = [change.note for change in changes if change.action == "adapted"]
    assert notes == ["2 classes kept, 1 new from the mean, 1 dropped"]
    warm_start(model, found, id2label={0: "cat", 1: "dog", 2: "fox"})
    assert torch.equal(model.class_embedder.weight, table)
    warm_start(model, found)  # no names here: by number
    assert torch.equal(model.class_embedder.weight, table)


def test_the_unused_half_of_a_sits_output():
    source, half = build(learn_sigma=True), build(1, learn_sigma=False)
    found = actions(warm_start(half, source_of(source)))
    assert found["proj_out.weight"] == found["proj_out.bias"] == "adapted"
    torch.testing.assert_close(half(**call()).sample, source(**call()).sample, atol=1e-6, rtol=1e-5)
    whole = build(2, learn_sigma=True)
    warm_start(whole, source_of(half))
    torch.testing.assert_close(whole(**call()).sample, source(**call()).sample, atol=1e-6, rtol=1e-5)
    assert not whole.proj_out.weight.unflatten(0, (-1, 8))[:, 4:].any()


def test_a_dit_and_a_sit_are_told_apart():
    with pytest.raises(ValueError, match="the source is a SiT .* the model a DiT .* with predicts_variance=False"):
        warm_start(build(predicts_variance=True), source_of(build()))
    with pytest.raises(ValueError, match="the source is a DiT .* the model a SiT .* with predicts_variance=True"):
        warm_start(build(), source_of(build(predicts_variance=True)))


# Sources


@pytest.mark.parametrize("predicts_variance", [False, True])
def test_official_checkpoints(tmp_path, predicts_variance):
    want = build(predicts_variance=predicts_variance)
    weights = original_names(want.state_dict())
    save_file(weights, tmp_path / "official.safetensors")
    torch.save({"ema": weights, "model": {}, "opt": {}}, tmp_path / "official.pt")
    for name in ("official.safetensors", "official.pt"):
        model = build(1, predicts_variance=predicts_variance, attention="mediator")
        changes = warm_start(model, tmp_path / name, allow_pickle=True)
        assert_same_weights(model, want, ".mixer.")
        assert actions(changes)["pos_embed"] == "dropped"
    with pytest.raises(ValueError, match="allow_pickle=True"):
        warm_start(model, tmp_path / "official.pt")
    told = read_source(
        tmp_path / "official.safetensors", num_attention_heads=2, predicts_variance=not predicts_variance
    )
    with pytest.raises(ValueError, match="make it with predicts_variance"):
        warm_start(model, told)


def test_a_file_of_ours(tmp_path):
    want = build(attention="mediator")
    save_file(want.state_dict(), tmp_path / "ours.safetensors")
    model = build(1, attention="mediator", sample_size=32)
    warm_start(model, tmp_path / "ours.safetensors")
    torch.testing.assert_close(model(**call(32)).sample, want(**call(32)).sample, atol=1e-6, rtol=1e-5)


def test_folders_of_diffusers(tmp_path):
    source = build(attention="mediator", num_classes=2)
    pipe = SiTPipeline(source, InterpolantScheduler(), id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "transformer"):
        model = build(1, attention="mediator", num_classes=2)
        warm_start(model, folder)
        assert_same_weights(model, source)
    warm_start(model, tmp_path, id2label={0: "dog", 1: "cat"})
    assert torch.equal(model.class_embedder.weight, source.class_embedder.weight[[1, 0, 2]])
    with pytest.raises(ValueError, match="2 attention heads in the source, 4 in the model"):
        warm_start(build(attention="softmax", num_attention_heads=4, attention_head_dim=8, num_classes=2), tmp_path)


def test_diffusers_dit_is_a_source(tmp_path):
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path)
    model = build(1, predicts_variance=True, attention="mediator", num_classes=5)
    warm_start(model, tmp_path)
    assert_same_weights(model, from_diffusers(theirs), ".mixer.")


def training_run(folder: Path, model: SiTTransformer2DModel, **config) -> dict[str, Tensor]:
    """A run as `train.sit` leaves it, with averaged weights twice the others; returns these."""
    tensors = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    state = {"config": {"num_attention_heads": 2, "image_size": 16, "prediction_type": "velocity", **config}}
    save_checkpoint(folder / "checkpoints", 7, {"model": tensors, "ema": model.state_dict()}, state, keep=2)
    names = {str(number): f"class {number}" for number in range(6)}
    (folder / "config.json").write_text(json.dumps({**state["config"], "id2label": names}))
    return tensors


def test_training_runs(tmp_path):
    source = build(attention="mediator")
    raw = training_run(tmp_path, source, attention="mediator", num_mediators=16)
    for folder in (tmp_path, tmp_path / "checkpoints" / "step-00000007"):
        model = build(1, attention="mediator")
        warm_start(model, folder)
        assert_same_weights(model, source)
        warm_start(model, folder, weights="model")
        assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
        warm_start(model, folder, id2label={number: f"class {5 - number}" for number in range(6)})
        assert torch.equal(model.class_embedder.weight[:6], source.class_embedder.weight[:6].flip(0))
    with pytest.raises(ValueError, match="no weights 'best'; it has ema, model"):
        warm_start(model, tmp_path, weights="best")
    with pytest.raises(ValueError, match="make it with predicts_variance=False"):
        warm_start(build(predicts_variance=True, attention="mediator"), tmp_path)


def test_a_real_run_is_a_source(tmp_path):
    with torch.enable_grad():
        from train import sit

        options = [
            "--preset",
            "emoji-tiny",
            "--out",
            str(tmp_path / "run"),
            "--cpu",
            "--steps",
            "1",
            "--max-minutes",
            "0",
        ]
        assert sit.main(options) == 0
    found = read_source(tmp_path / "run")
    assert found.id2label == {0: "face", 1: "heart"} and found.settings["num_attention_heads"] == 2
    config = {"sample_size": 32, "patch_size": 4, "in_channels": 3, "num_classes": 3, "num_mediators": 16}
    model = build(1, attention="mediator", learn_sigma=False, **config)
    changes = warm_start(model, tmp_path / "run", id2label={0: "heart", 1: "star", 2: "face"})
    assert torch.equal(model.class_embedder.weight[[2, 0]], found.weights["class_embedder.weight"][:2])
    assert {change.action for change in changes} == {"kept", "adapted", "resampled"}


# What does not fit


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"patch_size": 4}, r"patch_embed.weight: \(32, 4, 2, 2\) in the source, \(32, 4, 4, 4\) in the model"),
        ({"in_channels": 3}, r"patch_embed.weight: \(32, 4, 2, 2\) in the source, \(32, 3, 2, 2\)"),
        ({"attention_head_dim": 32}, r"class_embedder.weight: \(7, 32\) in the source, \(7, 64\) in the model"),
        ({"num_layers": 3}, r"transformer_blocks.2.attn.to_q.weight: missing in the source, \(32, 32\) in the model"),
        ({"num_layers": 1}, r"transformer_blocks.1.attn.to_q.weight: \(32, 32\) in the source, not in the model"),
        ({"num_attention_heads": 4, "attention_head_dim": 8}, "2 attention heads in the source, 4 in the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(config, sentence):
    model = build(1, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence) as caught:
        warm_start(model, source_of(build()))
    assert str(caught.value).startswith("the checkpoint does not fit the model:\n") and len(str(caught.value)) < 1500
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_source_is_refused(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="there is no checkpoint .*absent"):
        warm_start(model, tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a folder to start from: it has none of model_index.json, state.json"):
        warm_start(model, tmp_path)
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors holds no SiT or DiT: its tensors begin with unet.weight"):
        warm_start(model, tmp_path / "other.safetensors")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        warm_start(model, tmp_path)
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DModel; known are SiTTransformer2DModel, DiTTransformer2DModel"):
        warm_start(model, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        warm_start(model, folder)
    (folder / "config.json").write_text('{"_class_name": "SiTTransformer2DModel"}')
    with pytest.raises(ValueError, match="unet cannot be read"):
        warm_start(model, folder)


def test_a_folder_without_some_weights_is_refused(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["class_embedder.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="lacks weights: class_embedder.weight"):
        warm_start(build(1), tmp_path)


def test_half_precision_is_converted():
    source, model = build(), build(1)
    warm_start(model, source_of(build().half()))
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(**call()).sample, source(**call()).sample, atol=0.05, rtol=0.05)


def test_the_table_is_short():
    model = build(1, attention="mediator", sample_size=32, num_classes=8)
    lines = format_changes(warm_start(model, source_of(build(attention="mediator")))).splitlines()
    assert lines[0].split() == ["kept", str(len(model.state_dict()) - 1 - 8), "tensors"]
    assert (
        lines[1] == "adapted    class_embedder.weight [7, 32] → [9, 32]: 6 classes kept, 2 new from the mean, 0 dropped"
    )
    assert len(lines) == 6
    row = "resampled  transformer_blocks.*.attn.mixer.aggregation_bias.row ×2 [2, 16, 8] → [2, 16, 16]: "
    assert row + "4 x 4 mediators on 8 x 8 tokens → 4 x 4 on 16 x 16" in lines
    fresh = build(1, attention="mediator")
    assert "new        transformer_blocks.*.attn.mixer.dwc.bias ×2 [32]: zero" in format_changes(
        warm_start(fresh, source_of(build()))
    )
