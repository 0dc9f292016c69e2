"""Which layers can be patched, and putting a patch on them and taking it off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from attngen.hosts import hooks
from attngen.hosts.describe import Review
from attngen.hosts.families import family_of, halvings
from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.layers import SPEC, LayerSpec, spec_of
from attngen.hosts.learned import drop_core, put_core
from attngen.learned.modules import HiddenModule
from attngen.plan import Plan
from attngen.schedule import ChangeSchedule
from attngen.sit.attention import SiTAttention, SiTAttnProcessor

# Processors that compute plain softmax attention, by class name, and ours for them. All others (IP-Adapter, PAG,
# custom ones, layers with learned mediators) do something of their own that we must not take away.
_PLAIN = {
    "AttnProcessor": AttnGenProcessor,
    "AttnProcessor2_0": AttnGenProcessor,
    "SlicedAttnProcessor": AttnGenProcessor,
    "XFormersAttnProcessor": AttnGenProcessor,
    "FusedAttnProcessor2_0": AttnGenProcessor,
    "SiTAttnProcessor": AttnGenProcessor,
    "JointAttnProcessor2_0": JointAttnGenProcessor,
    "FusedJointAttnProcessor2_0": JointAttnGenProcessor,
    "XFormersJointAttnProcessor": JointAttnGenProcessor,
    "FluxAttnProcessor": FluxAttnGenProcessor,
}


def attention_modules(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """All modules with an attention processor, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "get_processor") and hasattr(module, "set_processor"):
            yield name, module


def refused_layers(model: nn.Module, patched: bool = False) -> dict[str, str]:
    """Attention layers that are left alone, and why; of a `patched` model also those another tool took back."""
    family = family_of(model)
    refused: dict[str, str] = {}
    spatial: tuple[str, ...] | None = None
    if family is not None and family.spatial_block is not None:
        modules = model.named_modules()
        spatial = tuple(f"{name}." for name, module in modules if type(module).__name__ == family.spatial_block)
    for name, attn in attention_modules(model):
        processor = type(attn.processor).__name__
        if getattr(attn, "is_cross_attention", False):
            refused[name] = "cross-attention stays exact"
        elif name.endswith("fuser.attn"):
            refused[name] = "its tokens are an image and objects, not a grid"
        elif spatial is not None and not name.startswith(spatial):
            refused[name] = f"it is not in a {family.spatial_block}" if family else ""
        elif patched and spec_of(attn) is not None and not isinstance(attn.processor, hooks.PROCESSORS):
            refused[name] = f"its processor was replaced by {processor}; reapply() puts ours back"
        elif processor not in _PLAIN and not isinstance(attn.processor, hooks.PROCESSORS):
            refused[name] = f"its processor {processor} is not a plain one"
    return refused


def patchable_layers(model: nn.Module) -> dict[str, Any]:
    """Self-attention layers with a plain processor, by name."""
    refused = refused_layers(model)
    return {name: attn for name, attn in attention_modules(model) if name not in refused}


def learnable_layers(model: nn.Module) -> dict[str, Any]:
    """Those of `patchable_layers` that can have learned weights: of image tokens alone."""
    layers = patchable_layers(model).items()
    return {n: attn for n, attn in layers if _PLAIN[type(_original(attn)).__name__] is AttnGenProcessor}


def install(
    model: nn.Module,
    plan: Plan,
    patch_id: str,
    seed: int,
    switch: ChangeSchedule | None,
    kernel: str,
    cores: Mapping[str, HiddenModule] | None = None,
) -> None:
    """Put a plan, and learned weights by layer, on a model, in place of any patch it has.

    An attention backend set on a patch stays.
    """
    family = family_of(model)
    assert family is not None
    previous: dict[str, Any] = dict(hooks.patched_layers(model))
    backends = {name: attn.processor for name, attn in previous.items() if isinstance(attn.processor, hooks.PROCESSORS)}
    uninstall(model)
    layers = patchable_layers(model)
    levels = sorted({halvings(model, name) for name in layers})
    originals = {name: _original(attn) for name, attn in layers.items()}
    for name, attn in layers.items():
        spec = LayerSpec(
            original=originals[name],
            methods=plan.methods_for(name),
            min_tokens=plan.min_tokens,
            level=levels.index(halvings(model, name)),
            max_levels=plan.max_levels,
            rotary=family.rotary,
            kernel=kernel,
        )
        ours = _PLAIN[type(originals[name]).__name__]()
        _copy_settings(backends.get(name, attn.processor), ours)
        setattr(attn, SPEC, spec)
        attn.set_processor(ours)
        if cores is not None and name in cores:
            put_core(attn, cores[name])
    by_stage = list(zip(*map(plan.methods_for, layers), strict=True))
    needs_metric = any(method.needs_metric for methods in by_stage for method in methods)
    random = [any(getattr(method, "random", False) for method in methods) for methods in by_stage]
    hooks.add_inner_hooks(model, family, needs_metric)
    root = hooks.RootHook(patch_id, model, plan.starts, random, seed, switch, tuple(layers), Review(plan.starts))
    hooks.add_hook(model, root)


def _original(attn: Any) -> Any:
    """The processor to restore. One of ours without a patch was left by another tool, and means diffusers' default."""
    if not isinstance(attn.processor, hooks.PROCESSORS):
        return attn.processor
    if isinstance(attn, SiTAttention):
        return SiTAttnProcessor()
    defaults: dict[type, type] = {
        JointAttnGenProcessor: JointAttnProcessor2_0,
        FluxAttnGenProcessor: FluxAttnProcessor,
    }
    return defaults.get(type(attn.processor), AttnProcessor2_0)()


def _copy_settings(source: Any, target: Any) -> None:
    """Hand on the attention backend and parallel configuration the user set, where both have them."""
    for name in ("_attention_backend", "_parallel_config"):
        if hasattr(source, name) and hasattr(target, name) and getattr(source, name) != getattr(target, name):
            setattr(target, name, getattr(source, name))


def uninstall(model: nn.Module) -> None:
    """Take any patch off a model; a processor that is not ours by now stays."""
    hooks.remove_hooks(model)
    for attn in hooks.patched_layers(model).values():
        layer: Any = attn
        if isinstance(layer.processor, hooks.PROCESSORS):
            original = getattr(layer, SPEC).original
            _copy_settings(layer.processor, original)
            layer.set_processor(original)
        delattr(layer, SPEC)
        drop_core(layer)
