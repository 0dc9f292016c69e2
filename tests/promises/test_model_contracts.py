"""What diffusers' common suite asks of every model, of SiT in each form and of stock models under an exact patch."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn

import attngen
from attngen import SiTTransformer2DModel
from tests.builders.hosts import _TRANSFORMER, HOSTS, fresh, randomised

_SIT = {**_TRANSFORMER, "num_classes": 10, "class_dropout_prob": 0.0, "num_mediators": 4}
FORMS: dict[str, dict[str, Any]] = {
    "sit-mediator": {"attention": "mediator"},
    "sit-linear": {"attention": "linear"},
    "dit-of-ours": {"predicts_variance": True},
}
STOCK = ("sd15", "sdxl", "controlnet", "dit", "pixart", "sd3", "sd35", "flux")
NAMES = ("sit", *FORMS, *STOCK)


@functools.cache
def _form(name: str) -> nn.Module:
    with torch.random.fork_rng():
        return randomised(SiTTransformer2DModel(**_SIT, **FORMS[name]))


def make(name: str) -> tuple[Any, Callable[..., Tensor]]:
    """A model, stock ones under an exact patch, and how to call it."""
    if name in FORMS:
        return copy.deepcopy(_form(name)), HOSTS["sit"]
    model = fresh(name)
    if name in STOCK:
        attngen.apply(model, "softmax")
    return model, HOSTS[name]


HEAVY = ("sdxl", "controlnet", "sd35", "dit", "dit-of-ours")  # their kinds of layers are in the others


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in NAMES])
def case(request) -> tuple[Any, Callable[..., Tensor]]:
    return make(request.param)


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def raw(model: Any, call: Callable[..., Tensor], return_dict: bool) -> Any:
    """What the forward method itself returns."""
    found: list[Any] = []
    hook = model.register_forward_hook(lambda _, args, out: found.append(out))
    try:
        call(model, **({} if return_dict else {"return_dict": False}))
    except AttributeError:  # the caller wants .sample of what is a tuple
        assert not return_dict
    finally:
        hook.remove()
    return found[0]


def configuration(model: Any) -> Any:
    """As JSON, in which tuples are lists, without what diffusers notes beside it."""
    return json.loads(json.dumps({name: value for name, value in model.config.items() if not name.startswith("_")}))


@torch.no_grad()
def test_deterministic(case):
    model, call = case
    assert torch.equal(call(model), call(model))


@torch.no_grad()
def test_outputs_as_tuple_and_as_object(case):
    model, call = case
    named, plain = raw(model, call, True), raw(model, call, False)
    assert isinstance(plain, tuple)
    for a, b in zip(named.to_tuple(), plain, strict=True):
        for x, y in zip(
            a if isinstance(a, (tuple, list)) else [a], b if isinstance(b, (tuple, list)) else [b], strict=True
        ):
            assert torch.equal(x, y)


def test_the_signature_begins_with_the_latents(case):
    model, _ = case
    first, second = list(inspect.signature(model.forward).parameters)[:2]
    assert (first, second) in (
        ("sample", "timestep"),
        ("hidden_states", "timestep"),
        ("hidden_states", "encoder_hidden_states"),
    )


@torch.no_grad()
def test_saved_and_loaded(case, tmp_path):
    """To within 5e-4, diffusers' figure: in one file, in shards, as a variant, and from its configuration."""
    model, call = case
    want = call(model)
    for options in ({}, {"max_shard_size": "16KB"}, {"variant": "fp16"}):
        folder = tmp_path / "-".join(map(str, options.values() or ["plain"]))
        model.save_pretrained(folder, **options)
        assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}
        load = {name: value for name, value in options.items() if name == "variant"}
        again, info = type(model).from_pretrained(folder, output_loading_info=True, **load)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (call(again.eval()) - want).abs().max() <= 5e-4
    assert list(load_file(tmp_path / "plain" / "diffusion_pytorch_model.safetensors")) == sorted(model.state_dict())
    other = type(model).from_config(json.loads((tmp_path / "plain" / "config.json").read_text()))
    assert configuration(other) == configuration(model)
    other.load_state_dict(model.state_dict())
    assert (call(other.eval()) - want).abs().max() <= 5e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loaded_in_half_precision(case, dtype, tmp_path):
    model, _ = case
    model.to(dtype).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    assert again.dtype == dtype
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_step_average_and_checkpointing(case):
    """Gradients reach every weight that counts, an average follows, and checkpointing changes no gradient."""
    model, call = case
    model.train()
    average = EMAModel(model.parameters())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # labels are dropped at random
        call(model).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert all(torch.isfinite(x).all() for x in plain.values())
    assert any("to_q" in name and x.abs().max() > 0 for name, x in plain.items())
    average.step(model.parameters())
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    for name, got in gradients().items():
        assert (got - plain[name]).abs().max() <= 5e-5 * max(1.0, float(plain[name].abs().max())), name
    model.disable_gradient_checkpointing()


@torch.no_grad()
def test_processors_may_be_read_and_put_back(case):
    model, call = case
    if not hasattr(model, "set_attn_processor"):
        pytest.skip("diffusers has no such method for it")
    want, processors = call(model), dict(model.attn_processors)
    model.set_attn_processor(dict(processors))
    assert torch.equal(call(model), want) and dict(model.attn_processors) == processors
    with pytest.raises(ValueError, match="number of"):
        model.set_attn_processor(dict(list(processors.items())[:-1]))
    assert torch.equal(call(model), want)
    if not hasattr(model, "set_default_attn_processor"):
        return
    if hasattr(model, "down_blocks") and attngen.hosts.hooks.root_hook(model) is not None:
        with pytest.raises(ValueError, match="AttnGenProcessor"):  # it replaces none but diffusers' own
            model.set_default_attn_processor()
        assert dict(model.attn_processors) == processors
        attngen.remove(model)
    model.set_default_attn_processor()
    with warnings.catch_warnings(action="ignore", category=attngen.AttnGenWarning):
        assert (call(model) - want).abs().max() <= 1e-4


@torch.no_grad()
def test_moves_keep_the_numbers(case):
    model, call = case
    want = call(model)
    model.to("cpu").to(torch.float64).to(torch.float32)
    assert torch.equal(call(model), want)


def test_it_is_a_model_of_diffusers(case):
    model, _ = case
    assert isinstance(model, ModelMixin) and isinstance(model, ConfigMixin)
    assert model.config_name == "config.json" and model.num_parameters() == sum(p.numel() for p in model.parameters())
    json.dumps(dict(model.config))


def test_lora_is_saved_and_loaded(tmp_path):
    """SiT takes diffusers' own files of LoRA weights."""
    from peft import LoraConfig

    model, call = make("sit")
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="one")
    want = call(model)
    model.save_lora_adapter(tmp_path, adapter_name="one", weight_name="lora.safetensors")
    again, _ = make("sit")
    assert not torch.equal(call(again), want)
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="lora.safetensors")
    assert (call(again) - want).abs().max() <= 1e-5
    again.disable_adapters()
    model.unload_lora()
    assert torch.equal(call(again), call(model))
