"""Which layers can be patched, and installing and removing a patch, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from attngen.hosts import hooks
from attngen.hosts.clock import Clock
from attngen.hosts.families import Family, family_of, halvings
from attngen.hosts.family import Core
from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.spec import SPEC, LayerSpec, spec_of
from attngen.learned.modules import HiddenModule, drop_core, put_core
from attngen.plan import Plan
from attngen.schedule import ChangeSchedule

PLAIN: dict[str, type] = {
    "AttnProcessor": AttnGenProcessor,
    "AttnProcessor2_0": AttnGenProcessor,
    "SlicedAttnProcessor": AttnGenProcessor,
    "XFormersAttnProcessor": AttnGenProcessor,
    "FusedAttnProcessor2_0": AttnGenProcessor,
    "JointAttnProcessor2_0": JointAttnGenProcessor,
    "FusedJointAttnProcessor2_0": JointAttnGenProcessor,
    "XFormersJointAttnProcessor": JointAttnGenProcessor,
    "FluxAttnProcessor": FluxAttnGenProcessor,
}
"""Processors that compute plain softmax attention, by class name, and attngen's for them.

All others (IP-Adapter, PAG, custom ones, layers with learned mediators) compute something else and stay.
`attngen.hosts.registry` adds those of attngen's own models.
"""


@dataclass(frozen=True)
class Patching:
    """A patch for a model.

    Attributes:
        plan: methods by layer and stage.
        patch_id: distinguishes this patch from a later one.
        review: see `RootHook`.
        clock: see `RootHook`.
        seed: of random token merging.
        switch: chooses the stage instead of the time, or None.
        kernel: which of attngen's kernels computes the methods.
        cores: learned weights by layer.
        metric: whether transformer blocks pass on their input even where the plan does not need it.
        references: a plan with the same stages for keys of reference images, or None.
    """

    plan: Plan
    patch_id: str
    review: Callable[[nn.Module, hooks.Seen], str | None]
    clock: Clock = field(default_factory=Clock)
    seed: int = 0
    switch: ChangeSchedule | None = None
    kernel: str = "auto"
    cores: Mapping[str, HiddenModule] = field(default_factory=dict)
    metric: bool = False
    references: Plan | None = None


@dataclass
class Detached:
    """A patch that was removed from a model, and can be attached again.

    Attributes:
        hooks: with their modules.
        layers: attention modules with their processor, spec and learned weights.
    """

    hooks: list[tuple[nn.Module, hooks.Hook]] = field(default_factory=list)
    layers: list[tuple[Any, Any, LayerSpec, HiddenModule | None]] = field(default_factory=list)


def attention_modules(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """All modules with an attention processor, by name."""
    for name, module in model.named_modules():
        # Some of diffusers' modules have a processor and no method to set it.
        if hasattr(module, "processor") and (hasattr(module, "set_processor") or "Attention" in type(module).__name__):
            yield name, module


def refused_layers(model: nn.Module, patched: bool = False) -> dict[str, str]:
    """Attention layers that stay as they are, and why; of a `patched` model also those another tool changed since."""
    family = family_of(model)
    inside = None if family is None else _inside_spatial_blocks(model, family)
    reasons = {name: _why_refused(name, attn, family, inside, patched) for name, attn in attention_modules(model)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _inside_spatial_blocks(model: nn.Module, family: Family) -> tuple[str, ...] | None:
    if family.spatial_block is None:
        return None
    modules = model.named_modules()
    return tuple(f"{name}." for name, module in modules if type(module).__name__ == family.spatial_block)


def _why_refused(
    name: str, attn: Any, family: Family | None, inside: tuple[str, ...] | None, patched: bool
) -> str | None:
    if family is not None and family.core is not None:
        return _why_outside(name, attn, family.core)
    processor, ours = type(attn.processor).__name__, isinstance(attn.processor, hooks.PROCESSORS)
    if "AddedKV" in processor:
        return f"image and text are keys of one softmax in its {processor}"
    if getattr(attn, "is_cross_attention", False):
        return "cross-attention stays exact"
    if name.endswith("fuser.attn"):
        return "its tokens are an image and objects, not a grid"
    if patched and spec_of(attn) is not None and not ours:
        return f"its processor was replaced by {processor}; reapply() restores ours"
    if processor not in PLAIN and not ours:
        return f"its processor {processor} is not a plain one"
    if family is not None and inside is not None and not name.startswith(inside):
        return f"it is not in a {family.spatial_block}"
    return None


def _why_outside(name: str, attn: Any, place: Core) -> str | None:
    if getattr(attn, "is_cross_attention", False) and not place.cross:
        return "cross-attention stays exact"
    inside = any(fnmatchcase(name, pattern.strip()) for pattern in place.layers.split("|"))
    return None if inside else "it does not attend over the image"


def patchable_layers(model: nn.Module) -> dict[str, Any]:
    """Self-attention layers with a plain processor, by name."""
    refused = refused_layers(model)
    return {name: attn for name, attn in attention_modules(model) if name not in refused}


def learnable_layers(model: nn.Module) -> dict[str, Any]:
    """Those of `patchable_layers` that can have learned weights: of image tokens alone."""
    layers = patchable_layers(model).items()
    return {n: attn for n, attn in layers if PLAIN.get(type(_original(attn)).__name__) is AttnGenProcessor}


def install(model: nn.Module, patching: Patching) -> None:
    """Install a patch on a model, in place of any that it has. Attention backends that were set on it stay.

    If anything fails, the model is as it was before, an older patch included.
    """
    detached = detach(model)
    try:
        _install(model, patching, {id(attn): processor for attn, processor, _, _ in detached.layers})
    except BaseException:
        detach(model)
        attach(model, detached)
        raise


def _install(model: nn.Module, patching: Patching, backends: Mapping[int, Any]) -> None:
    family, plan = family_of(model), patching.plan
    assert family is not None
    layers = patchable_layers(model)
    specs = _specs(model, family, layers, patching)
    by_stage = list(zip(*(spec.methods for spec in specs.values()), strict=True))
    metric = patching.metric or any(method.needs_metric for methods in by_stage for method in methods)
    inner = hooks.inner_hooks(model, family, metric)
    draws = [any(method.needs_draws for method in methods) for methods in by_stage]
    root = hooks.RootHook(
        patching.patch_id,
        model,
        plan.starts,
        draws,
        tuple(layers),
        patching.clock,
        patching.seed,
        patching.switch,
        patching.review,
        patching.references is not None and family.references is not None,
    )
    if family.core is not None:
        inner += hooks.core_hooks(layers.values(), root, family.core)
        inner.append((model, hooks.EndHook(root)))
    # Nothing has changed so far.
    for name, attn in layers.items():
        spec = specs[name]
        setattr(attn, SPEC, spec)
        if spec.core:
            continue
        ours = PLAIN[type(spec.original).__name__]()
        _copy_settings(backends.get(id(attn), attn.processor), ours)
        attn.set_processor(ours)
        if name in patching.cores:
            put_core(attn, patching.cores[name])
    for module, hook in [*inner, (model, root)]:
        hooks.add_hook(module, hook)


def _specs(model: nn.Module, family: Family, layers: Mapping[str, Any], patching: Patching) -> dict[str, LayerSpec]:
    plan = patching.plan
    levels = sorted({halvings(model, name) for name in layers})
    groups: dict[Any, str] = {}
    specs: dict[str, LayerSpec] = {}
    for name, attn in layers.items():
        methods, level = plan.methods_for(name), levels.index(halvings(model, name))
        sizes = tuple(getattr(attn, size, None) for size in ("heads", "inner_dim", "query_dim", "pre_only"))
        references = () if patching.references is None else patching.references.methods_for(name)
        group = groups.setdefault((methods, references, level, sizes), name)
        original, rotary = _original(attn), family.rotary
        specs[name] = LayerSpec(
            name,
            group,
            original,
            methods,
            plan.min_tokens,
            level,
            plan.max_levels,
            rotary,
            patching.kernel,
            core=family.core is not None,
            references=references,
        )
    return specs


def _original(attn: Any) -> Any:
    """The processor to restore. One of attngen's without a patch was left by another tool: then the default one."""
    if not isinstance(attn.processor, hooks.PROCESSORS):
        return attn.processor
    spec = spec_of(attn)
    if spec is not None:
        return spec.original
    # Modules with processors of their own name their default.
    return (getattr(attn, "_default_processor_cls", None) or type(attn.processor).default)()


def _copy_settings(source: Any, target: Any) -> None:
    """Copy the attention backend and parallel configuration that the user set, where both have them."""
    for name in ("_attention_backend", "_parallel_config"):
        if hasattr(source, name) and hasattr(target, name) and getattr(source, name) != getattr(target, name):
            setattr(target, name, getattr(source, name))


def detach(model: nn.Module) -> Detached:
    """Remove any patch from a model; a processor that another tool has put in place stays."""
    detached = Detached(hooks.remove_hooks(model))
    for layer in hooks.patched_layers(model).values():
        attn: Any = layer
        processor, spec = attn.processor, getattr(attn, SPEC)
        if isinstance(processor, hooks.PROCESSORS):
            _copy_settings(processor, spec.original)
            attn.set_processor(spec.original)
        delattr(attn, SPEC)
        detached.layers.append((attn, processor, spec, drop_core(attn)))
    return detached


def attach(model: nn.Module, detached: Detached) -> None:
    """Attach a removed patch to its model again."""
    for attn, processor, spec, core in detached.layers:
        setattr(attn, SPEC, spec)
        if isinstance(processor, hooks.PROCESSORS):
            attn.set_processor(processor)
        if core is not None:
            put_core(attn, core)
    for module, hook in detached.hooks:
        hooks.add_hook(module, hook)
