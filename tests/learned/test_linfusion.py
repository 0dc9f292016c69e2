"""Weights that LinFusion published, as learned layers."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import attngen
from attngen import LearnedLayers
from tests import oracles
from tests.builders.hosts import HOSTS, fresh, self_attention
from tests.hosts.numbers import assert_close, recorded
from tests.learned.formulas import branch

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


def published(model, hidden=None, seed=0):
    """Tensors and config of LinFusion's layout for a UNet, with random numbers: a layer a number, in its own order."""
    modules, tensors = [], {}
    generator = torch.Generator().manual_seed(seed)

    def put(key, *shape):
        tensors[key] = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    for number, (name, attn) in enumerate(self_attention(model).items()):
        width = attn.inner_dim
        mid = width if hidden is None else (hidden if hidden == -1 else width // hidden)
        modules.append(
            {
                "module_name": name,
                "dim_n": width,
                "heads": attn.heads,
                "projection_mid_dim": None if hidden is None else mid,
            }
        )
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            put(f"{number}.{part}.weight", width, width)
        put(f"{number}.to_out.0.bias", width)
        for part in ("to_q_", "to_k_") if mid != -1 else ():
            put(f"{number}.{part}.0.weight", mid, width)
            put(f"{number}.{part}.0.bias", mid)
            put(f"{number}.{part}.1.weight", mid)
            put(f"{number}.{part}.1.bias", mid)
            put(f"{number}.{part}.3.weight", width, mid)
            put(f"{number}.{part}.3.bias", width)
    return tensors, {"_class_name": "LinFusion", "modules_list": modules}


def put_published(folder, tensors, config):
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return path


def linfusion_layer(tensors, number, count, x):
    """q = Wq (x + Fq(x)), k = Wk (x + Fk(x)), v = Wv x, features elu + 1, O = phi(q) (phi(k)^T v / N) / z."""
    part = {key.removeprefix(f"{number}."): t for key, t in tensors.items() if key.startswith(f"{number}.")}
    x = x.double()
    with_branch = "to_q_.0.weight" in part
    query, key = (
        oracles.split_heads(oracles.linear(x + branch(part, f"{n}_", x) if with_branch else x, part, n), count)
        for n in ("to_q", "to_k")
    )
    value = oracles.split_heads(oracles.linear(x, part, "to_v"), count)
    query, key = oracles.elu_plus_one(query), oracles.elu_plus_one(key)
    z = query @ key.mean(2, keepdim=True).transpose(2, 3) + 1e-4
    mixed = query @ (key.transpose(2, 3) @ value / x.shape[1]) / z
    return oracles.linear(oracles.join_heads(mixed), part, "to_out.0")


@pytest.mark.parametrize("hidden", [None, 4, -1])
def test_linfusion_against_its_formula(tmp_path, hidden):
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    tensors, config = published(model, hidden)
    path = put_published(tmp_path, tensors, config)
    layers = LearnedLayers.load(path)
    with attngen.apply(model, path) as handle, recorded(model, layers.sizes) as calls:
        host(model, batch=1)
        assert len(layers.sizes) == len(self_attention(model)) == len(handle.learned)
    for number, module in enumerate(config["modules_list"]):
        call = calls[module["module_name"]]
        assert_close(call["out"], linfusion_layer(tensors, number, module["heads"], call["x"]), 1e-4)
    assert torch.equal(host(model), exact)
    layers.save(tmp_path / "ours.safetensors")  # and as a file of ours
    with attngen.apply(model, tmp_path / "ours.safetensors"):
        again = host(model)
    with attngen.apply(model, path):
        assert torch.equal(host(model), again)


def test_linfusion_that_is_not_whole_is_named(tmp_path):
    model = fresh("sd15")
    tensors, config = published(model)
    path = put_published(tmp_path, tensors, config)

    def refused(message):
        with pytest.raises(ValueError) as error:
            attngen.apply(model, path)
        assert str(path) in str(error.value) and message in str(error.value), str(error.value)

    (tmp_path / "config.json").unlink()
    refused("need their config.json beside them")
    (tmp_path / "config.json").write_text("{}")
    refused("need their config.json beside them")
    put_published(tmp_path, tensors, {"modules_list": config["modules_list"][:-1]})
    refused("belongs to none of the 6 layers")
    put_published(tmp_path, {k: t for k, t in tensors.items() if k != "0.to_k.weight"}, config)
    refused("the weight projections.to_k.weight of down_blocks.0")
    mixed = copy.deepcopy(config)
    mixed["modules_list"][0]["projection_mid_dim"] = 2
    put_published(tmp_path, tensors, mixed)
    refused("different shares")
    zero = copy.deepcopy(config)
    zero["modules_list"][0]["heads"] = 0
    put_published(tmp_path, tensors, zero)
    refused("does not list LinFusion's layers")
    put_published(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="does not fit|made for a UNet2DConditionModel"):
        attngen.apply(fresh("dit"), path)
