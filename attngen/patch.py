"""`apply` puts a plan on a pipeline's denoisers; the handle it returns reports and takes it back."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn

from attngen.hosts import hooks
from attngen.hosts.families import default_grid, denoisers_of, family_of, halved, halvings
from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.layers import SPEC, LayerSpec, spec_of
from attngen.hosts.single import AttnGenProcessor
from attngen.methods import AttentionMethod, SoftmaxAttention
from attngen.methods._checks import Grid, check_count
from attngen.methods.base import LayerShape
from attngen.plan import Plan
from attngen.presets import resolve_preset
from attngen.report import LayerReport, Report, StageReport
from attngen.schedule import ChangeSchedule

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


def apply(
    target: Any,
    method: str | AttentionMethod | Plan | os.PathLike[str],
    *,
    min_tokens: int | None = None,
    seed: int = 0,
    switch: ChangeSchedule | None = None,
) -> AttentionPatch:
    """Change the attention of a diffusers pipeline or model in place. One call undoes it, bit for bit.

    A model that is patched already gets the new plan instead of the old one. Cross-attention, and layers whose
    processor is not a plain one, stay as they are; `handle.report()` lists them with the reason. The patch belongs to
    the model: pipelines that share a model share its patch.

    Args:
        target: a pipeline (its UNet, transformer and ControlNets are patched) or a bare model.
        method: a preset's name (`attngen.METHODS`), a method such as `AgentAttention(num_agents=64)`, a `Plan`, or the
            path of a plan file.
        min_tokens: overrides the plan's.
        seed: of random token merging; the global random state is never read.
        switch: chooses the stage by the change of the latents instead of the time. Pass the same object to the
            pipeline as `callback_on_step_end`.

    Returns:
        The handle: `.report()`, `.remove()`, `.reapply()`; also a context manager that removes on exit.

    Raises:
        ValueError: before anything is changed, for an unknown method, a bad plan file, or a target without a
            self-attention layer that can be patched.
    """
    plan = _resolve(method)
    if min_tokens is not None:
        check_count("min_tokens", min_tokens, at_least=0)
        plan = Plan(plan.stages, min_tokens=min_tokens, max_levels=plan.max_levels)
    models = denoisers_of(target)
    for name, model in models.items():
        _check_patchable(model, name or type(model).__name__)
    patch = AttentionPatch(models, plan, seed, switch)
    patch._install()
    return patch


def remove(target: Any) -> None:
    """Take any patch of attngen off a pipeline or model; nothing happens where there is none.

    Raises:
        ValueError: if the target has no model that attngen knows.
    """
    for model in denoisers_of(target).values():
        _uninstall(model)


class AttentionPatch:
    """The handle of a patch.

    Attributes:
        plan: what was applied.
    """

    def __init__(self, models: dict[str, nn.Module], plan: Plan, seed: int, switch: ChangeSchedule | None) -> None:
        self.plan = plan
        self._models, self._seed, self._switch = models, seed, switch
        self._id = uuid.uuid4().hex

    def __enter__(self) -> AttentionPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def is_applied(self) -> bool:
        """Whether the patch is on; False after `remove`, or when another `apply` has replaced it."""
        return any(self._is_on(model) for model in self._models.values())

    def remove(self) -> None:
        """Undo the patch: the layers' own processors come back and no hook, attribute or key is left.

        A processor that another tool has put in place of ours since then stays. Nothing happens when the patch is off.
        """
        for model in self._models.values():
            if self._is_on(model):
                _uninstall(model)

    def reapply(self) -> None:
        """Put the patch back where another tool replaced its processors; theirs become the ones to restore."""
        for name, model in self._models.items():
            _uninstall(model)
            _check_patchable(model, name or type(model).__name__)
        self._install()

    def report(self, grid: Grid | None = None) -> Report:
        """What each layer does.

        Args:
            grid: (height, width) of the latents of a UNet, or of the tokens of a transformer. By default that of the
                last call, or of the model's configuration before the first.
        """
        patched: list[LayerReport] = []
        left: list[LayerReport] = []
        for name, model in self._models.items():
            hook = hooks.root_hook(model)
            seen = hook.last_seen if hook is not None else None
            size, text = seen if seen is not None else (default_grid(model), 0)
            patched += _describe(model, name, self.plan.starts, grid or size, text)
            left += [_left_alone(name, layer, reason) for layer, reason in _refused(model).items()]
        return Report(patched + left, self.plan.starts)

    def _is_on(self, model: nn.Module) -> bool:
        hook = hooks.root_hook(model)
        return hook is not None and hook.patch_id == self._id

    def _install(self) -> None:
        for model in self._models.values():
            _uninstall(model)
            _install(model, self.plan, self._id, self._seed, self._switch)


def _resolve(method: Any) -> Plan:
    if isinstance(method, Plan):
        return method
    if isinstance(method, AttentionMethod):
        return Plan.of(method)
    if isinstance(method, os.PathLike) or (isinstance(method, str) and method.endswith(".json")):
        return Plan.load(method)
    if isinstance(method, str):
        return resolve_preset(method)
    raise ValueError(f"a method is a preset's name, an attention method, a Plan or the path of one, got {method!r}")


def _attention_modules(model: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "get_processor") and hasattr(module, "set_processor"):
            yield name, module


def _refusal(name: str, attn: Any) -> str | None:
    """Why a layer is left alone, or None if it can be patched."""
    if getattr(attn, "is_cross_attention", False):
        return "cross-attention stays exact"
    if name.endswith("fuser.attn"):
        return "its tokens are an image and objects, not a grid"
    processor = type(attn.processor).__name__
    if processor in _PLAIN or isinstance(attn.processor, hooks.PROCESSORS):
        return None
    return f"its processor {processor} is not a plain one"


def _refused(model: nn.Module) -> dict[str, str]:
    refusals = ((name, _refusal(name, attn)) for name, attn in _attention_modules(model))
    return {name: reason for name, reason in refusals if reason is not None}


def _check_patchable(model: nn.Module, name: str) -> None:
    layers = dict(_attention_modules(model))
    refused = _refused(model)
    if len(refused) < len(layers):
        return
    if not layers:
        raise ValueError(f"{name} has no attention layer, so there is nothing to patch")
    reasons = ", ".join(sorted(set(refused.values())))
    raise ValueError(f"{name} has no self-attention layer that can be patched: {reasons}")


def _install(model: nn.Module, plan: Plan, patch_id: str, seed: int, switch: ChangeSchedule | None) -> None:
    family = family_of(model)
    assert family is not None
    layers = {name: attn for name, attn in _attention_modules(model) if _refusal(name, attn) is None}
    levels = sorted({halvings(model, name) for name in layers})
    for name, attn in layers.items():
        spec = LayerSpec(
            original=attn.processor,
            methods=plan.methods_for(name),
            min_tokens=plan.min_tokens,
            level=levels.index(halvings(model, name)),
            max_levels=plan.max_levels,
            rotary=family.rotary,
        )
        setattr(attn, SPEC, spec)
        attn.set_processor(_PLAIN[type(attn.processor).__name__]())
    used = [[spec_methods[i] for spec_methods in map(plan.methods_for, layers)] for i in range(len(plan.stages))]
    needs_metric = any(method.needs_metric for methods in used for method in methods)
    hooks.add_inner_hooks(model, family, needs_metric)
    random = [any(getattr(method, "random", False) for method in methods) for methods in used]
    root = hooks.RootHook(patch_id, model, plan.starts, random, seed, switch, next(iter(layers)), _Review(plan.starts))
    hooks.add_hook(model, root)


def _uninstall(model: nn.Module) -> None:
    hooks.remove_hooks(model)
    for attn in hooks.patched_layers(model).values():
        layer: Any = attn
        if isinstance(layer.processor, hooks.PROCESSORS):
            layer.set_processor(getattr(layer, SPEC).original)
        delattr(attn, SPEC)


class _Review:
    """What `RootHook` says about a new size: that a patch does nothing there, or costs more than it saves."""

    def __init__(self, starts: tuple[float, ...]) -> None:
        self.starts = starts

    def __call__(self, model: nn.Module, grid: Grid, text: int) -> str | None:
        layers = _describe(model, "", self.starts, grid, text)
        wanted = [layer for layer in layers if any(stage.method != SoftmaxAttention.kind for stage in layer.stages)]
        if not wanted:
            return None
        size = f"{type(model).__name__} at a grid of {grid[0]} x {grid[1]}"
        if not any(layer.is_active for layer in wanted):
            reason = next(stage.why_exact for stage in wanted[0].stages if stage.method != SoftmaxAttention.kind)
            return f"the patch does nothing for {size}: {wanted[0].name} is exact because {reason}"
        for layer in wanted:
            assert layer.flops_exact is not None
            for stage in layer.stages:
                if stage.why_exact is None and stage.flops > layer.flops_exact:
                    return (
                        f"{stage.method} costs more than softmax attention in {layer.name} of {size}: "
                        f"{stage.flops / layer.flops_exact:.2f} times the operations"
                    )
        return None


def _describe(model: nn.Module, component: str, starts: tuple[float, ...], grid: Grid, text: int) -> list[LayerReport]:
    reports = []
    for name, attn in hooks.patched_layers(model).items():
        spec = spec_of(attn)
        assert spec is not None
        layer_grid = halved(grid, halvings(model, name))
        reports.append(_describe_layer(component, name, attn, spec, starts, layer_grid, text))
    return reports


def _describe_layer(
    component: str, name: str, attn: Any, spec: LayerSpec, starts: tuple[float, ...], grid: Grid, text: int
) -> LayerReport:
    heads = attn.heads
    width = attn.inner_dim
    channels = getattr(attn, "query_dim", None) or width
    shape = LayerShape(grid, channels, width, heads, text)
    stages = []
    for i, start in enumerate(starts):
        method = spec.methods[i]
        reason = spec.why_exact(i, grid, shape.tokens)
        active = reason is None
        stages.append(
            StageReport(
                start,
                method.kind,
                method.num_agents_at(grid) if active else None,
                method.flops(shape) if active else shape.exact_flops(),
                reason,
            )
        )
    return LayerReport(
        component, name, grid, shape.tokens, heads, width // heads, shape.exact_flops(), tuple(stages), None
    )


def _left_alone(component: str, name: str, reason: str) -> LayerReport:
    return LayerReport(component, name, None, None, None, None, None, (), reason)
