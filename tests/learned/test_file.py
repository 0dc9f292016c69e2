"""The file of learned layers: round trip, and every fault in one is named."""

import dataclasses
import json
import struct
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import attngen
from attngen import AttnGenWarning, LearnedLayers, LearnedMediators
from attngen.learned.modules import HiddenModule
from tests.builders.hosts import HOSTS, fresh, self_attention, snapshot
from tests.builders.learned import learned

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


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
        (entry("method", "own_projections", value="yes"), "own_projections must be True or False"),
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
