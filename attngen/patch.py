"""`apply` puts a plan on a pipeline's denoisers; the handle it returns reports on it and removes it."""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from attngen.checks import Grid, check_count
from attngen.hosts import hooks
from attngen.hosts.clock import Clock
from attngen.hosts.families import denoisers_of, drawing_models, why_unknown
from attngen.hosts.install import (
    Detached,
    Patching,
    attach,
    attention_modules,
    detach,
    install,
    patchable_layers,
    refused_layers,
)
from attngen.hosts.reference_plans import check_takes_references, in_step, references_plan
from attngen.hub import is_hub_id
from attngen.kernels.dispatch import AUTO, Kernel, check_kernel
from attngen.layer_rows import Review, default_call, left_alone, others_of, rows_of
from attngen.learned.file import SUFFIX, LearnedLayers, config_hash
from attngen.learned.methods import LearnedMethod
from attngen.learned.modules import HiddenModule
from attngen.methods import AttentionMethod, SoftmaxAttention
from attngen.plan import Plan
from attngen.presets import resolve_preset
from attngen.report import LayerReport, Report
from attngen.schedule import ChangeSchedule
from attngen.trace import Trace

Target = DiffusionPipeline | nn.Module
Method = str | os.PathLike[str] | AttentionMethod | Plan | LearnedLayers


def apply(
    target: Target,
    method: Method,
    *,
    min_tokens: int | None = None,
    seed: int = 0,
    switch: ChangeSchedule | None = None,
    kernel: Kernel = AUTO,
    references: AttentionMethod | Plan | None = None,
    **options: Any,
) -> AttentionPatch:
    """Change the attention of a diffusers pipeline or model in place. `handle.remove()` restores it, bit for bit.

    A model that is patched already gets the new plan instead of the old one. Cross-attention, and layers whose
    processor is not a plain one, stay as they are; `handle.report()` lists them with the reason. The patch belongs to
    the model: pipelines that share a model share its patch, and the last `apply` holds.

    Args:
        target: a pipeline (its UNet, transformers and ControlNets are patched) or a bare model.
        method: a preset's name (`attngen.PRESETS`), a method such as `AgentAttention(num_agents=64)`, a `Plan`, the
            path of a plan file (.json) or its OWNER/NAME on the Hub, or `LearnedLayers` or the path of a file of them
            (.safetensors).
        min_tokens: layers with fewer tokens stay exact; overrides the plan's.
        seed: of random token merging; the global random state is never read.
        switch: chooses the stage by the change of the latents instead of the time. Pass the same object to the
            pipeline as `callback_on_step_end`. It resets at the start of each generation.
        kernel: the path that computes agent and linear attention: "auto" takes the one measured to be fastest, any
            other is taken wherever it can run. The report names the one a layer takes, and why not the one asked for.
        references: reduces the keys and values of reference images alone: `DownsampledKV(factor=2)`, or a `Plan` of it
            by time and layer. Image and text stay as the method has them.
        options: values for the options of a preset's methods, such as `num_agents=64`.

    Returns:
        The handle: `.report()`, `.trace()`, `.remove()`, `.reapply()`; also a context manager that removes on exit.

    Raises:
        ValueError: for an unknown method, kernel or option, a bad plan file, a plan that was found for another model or
            whose patterns match no layer, learned layers that do not fit, or a target without a self-attention layer
            that can be patched. The target is then as it was before, an older patch included.
    """
    learned = _learned(method)
    plan = _resolve(method, options) if learned is None else learned.plan
    if learned is not None and options:
        raise ValueError(f"options such as {next(iter(options))!r} are for presets; learned layers have their own")
    if min_tokens is not None:
        check_count("min_tokens", min_tokens, at_least=0)
        plan = dataclasses.replace(plan, min_tokens=min_tokens)
    check_count("seed", seed, at_least=0)
    check_kernel(kernel)
    _check_switch(switch, plan)
    reduced = references_plan(references)
    if switch is not None and reduced is not None and len(reduced.stages) > 1:
        raise ValueError("a switch chooses between the stages of the plan; references have one method beside it")
    models = denoisers_of(target)
    if learned is not None:
        models = learned.models_of(models)
    _check_model(plan, models.values())
    for name, model in models.items():
        _check_patchable(model, name or type(model).__name__)
    _check_patterns(plan, models.values())
    if reduced is not None:
        check_takes_references(models)
    cores = {} if learned is None else _cores(learned, models)
    patch = AttentionPatch(target, models, plan, seed, switch, kernel, cores, reduced)
    _warn_of_others(target, models)
    patch._install()  # pyright: ignore[reportPrivateUsage]
    return patch


def remove(target: Target) -> None:
    """Remove any patch of attngen from a pipeline or model; nothing happens where there is none."""
    for model in drawing_models(target).values():
        detach(model)


class AttentionPatch:
    """The handle of a patch.

    Attributes:
        plan: what was applied.
    """

    def __init__(
        self,
        target: Target,
        models: Mapping[str, nn.Module],
        plan: Plan,
        seed: int = 0,
        switch: ChangeSchedule | None = None,
        kernel: str = AUTO,
        cores: Mapping[str, Mapping[str, HiddenModule]] | None = None,
        references: Plan | None = None,
    ) -> None:
        self.plan = plan
        # Both plans by the stages of either; the handle has the plan as it was given.
        self._plan, self._references = (plan, None) if references is None else in_step(plan, references)
        self._cores = cores or {}
        self._models, self._seed, self._switch, self._kernel = dict(models), seed, switch, kernel
        self._clock = Clock(None if isinstance(target, nn.Module) else target)
        reasons = {name: why_unknown(model) for name, model in drawing_models(target).items()}
        self._unknown = {name: reason for name, reason in reasons.items() if reason is not None}
        self._id = uuid.uuid4().hex
        self._trace: Trace | None = None

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
        """Undo the patch: the layers' own processors are restored and no hook, attribute or key is left.

        A processor that another tool has put in place of ours since then stays. Nothing happens when the patch is off.
        """
        for model in self._models.values():
            if self._is_on(model):
                detach(model)

    def reapply(self) -> None:
        """Patch again where another tool replaced the patch's processors; theirs become the ones to restore.

        Raises:
            ValueError: if no layer can be patched by now; everything is then as it was before.
        """
        for name, model in self._models.items():
            _check_patchable(model, name or type(model).__name__)
        self._install()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Within it every layer is exact, bit for bit; the patch, its learned weights and its settings stay."""
        found = [hook for model in self._models.values() if self._is_on(model) and (hook := hooks.root_hook(model))]
        before = [hook.paused for hook in found]
        try:
            for hook in found:
                hook.paused = True
            yield
        finally:
            for hook, value in zip(found, before, strict=True):
                hook.paused = value

    @property
    def learned(self) -> dict[str, nn.Module]:
        """The modules with learned weights, by "component.layer"; their parameters can be trained."""
        return {
            f"{component}.{layer}" if component else layer: hidden.content
            for component, cores in self._cores.items()
            for layer, hidden in cores.items()
        }

    def report(self, grid: Grid | None = None) -> Report:
        """What each layer does; empty when the patch is off.

        Args:
            grid: (height, width) of the latents of a UNet, or of the tokens of a transformer, (frames, height, width)
                of those of a video. By default that of the last call, or of the model's configuration before the first.

        Raises:
            ValueError: if `grid` is not two or three whole numbers above 0.
        """
        if grid is not None:
            _check_grid(grid)
        patched: list[LayerReport] = []
        left: list[LayerReport] = []
        others: dict[str, int] = {}
        for name, model in self._models.items():
            hook = hooks.root_hook(model)
            if hook is None or not self._is_on(model):
                continue
            if hook.calls is not None and (hook.last_seen is None or hook.unread is not None):
                unseen = hook.unread or "its tokens are known after the first call"
                left += [left_alone(name, layer, unseen) for layer in hooks.patched_layers(model)]
                continue
            seen, grids = hook.last_seen or default_call(model), hooks.seen_grids(model)
            if grid is not None:
                seen, grids = seen._replace(grid=grid, tokens=math.prod(grid)), {}
            rows = rows_of(model, name, self._plan.starts, seen, grids)
            patched += rows
            others[name] = others_of(model, rows, seen)
            left += [left_alone(name, layer, reason) for layer, reason in refused_layers(model, patched=True).items()]
        if self.is_applied:
            left += [left_alone(name, "", reason) for name, reason in self._unknown.items()]
        return Report(patched + left, self._plan.starts, others)

    def trace(self) -> Trace:
        """Start to count what each layer really runs, and return the counts; the running ones where it has started.

        Print it, or take `to_json()`; `stop()`, or the end of `with handle.trace() as trace:`, ends the counting. Off,
        a trace costs nothing; on, it breaks no graph of `torch.compile`.
        """
        if self._trace is None or not self._trace.is_running:
            models = {name: model for name, model in self._models.items() if self._is_on(model)}
            self._trace = Trace(models, self._id)
        return self._trace

    def _is_on(self, model: nn.Module) -> bool:
        hook = hooks.root_hook(model)
        return hook is not None and hook.patch_id == self._id

    def _install(self) -> None:
        """Patch all models, or none."""
        done: list[tuple[nn.Module, Detached]] = []
        try:
            for name, model in self._models.items():
                before = detach(model)
                done.append((model, before))
                attach(model, before)
                install(model, self._patching(name))
        except BaseException:
            for model, before in done:
                detach(model)
                attach(model, before)
            raise

    def _patching(self, component: str) -> Patching:
        return Patching(
            self._plan,
            self._id,
            Review(self._plan.starts),
            self._clock,
            self._seed,
            self._switch,
            self._kernel,
            self._cores.get(component, {}),
            references=self._references,
        )


def _warn_of_others(target: Target, models: Mapping[str, nn.Module]) -> None:
    """Warn of components that generate and stay exact, and of a model that another pipeline has patched."""
    for name, model in drawing_models(target).items():
        reason = why_unknown(model)
        if reason is not None:
            hooks.warn(f"the {name} stays exact: {reason}")
    for name, model in models.items():
        hook = hooks.root_hook(model)
        other = None if hook is None else hook.clock.pipeline
        if other is not None and other is not target and not isinstance(target, nn.Module):
            hooks.warn(
                f"the {name} is shared with a {type(other).__name__} through which it was patched; the new patch holds"
                " there too"
            )


def _learned(method: Any) -> LearnedLayers | None:
    """Learned layers, read from their file if need be; None for any other method."""
    if isinstance(method, LearnedLayers):
        return method
    path = _path(method)
    return LearnedLayers.load(path) if path is not None and path.endswith(SUFFIX) else None


def _path(method: object) -> str | None:
    """A method given as text or path, or None."""
    if isinstance(method, str):
        return method
    return str(cast("os.PathLike[str]", method)) if isinstance(method, os.PathLike) else None


def _cores(learned: LearnedLayers, models: Mapping[str, nn.Module]) -> dict[str, dict[str, HiddenModule]]:
    """New modules with the weights, by model and layer; warns where a model is configured otherwise."""
    for model in models.values():
        message = learned.other_model(model)
        if message is not None:
            hooks.warn(message)
    return {name: learned.cores(model) for name, model in models.items()}


def _resolve(method: Any, options: Mapping[str, Any]) -> Plan:
    if isinstance(method, str) and not method.endswith(".json") and not is_hub_id(method):
        return resolve_preset(method, options)
    if options:
        raise ValueError(
            f"options such as {next(iter(options))!r} are for presets, such as apply(pipe, 'agent', num_agents=64); set"
            " them in the method itself"
        )
    path = _path(method)
    plan = Plan.of(method) if isinstance(method, AttentionMethod) else method if path is None else Plan.load(path)
    if not isinstance(plan, Plan):
        raise ValueError(f"a method is a preset's name, an attention method, a Plan or the path of one, got {method!r}")
    for stage in plan.stages:
        for one in stage.layers.values():
            if isinstance(one, LearnedMethod):
                raise ValueError(f"{one.kind} needs weights: apply a file of learned layers ({SUFFIX}) instead")
    return plan


def _check_switch(switch: Any, plan: Plan) -> None:
    if switch is None:
        return
    if not isinstance(switch, ChangeSchedule):
        raise ValueError(f"switch must be a ChangeSchedule, got {switch!r}")
    if len(plan.stages) == 1:
        raise ValueError("a switch chooses between the stages of a plan, but this plan has one stage")


def _check_model(plan: Plan, models: Iterable[nn.Module]) -> None:
    """A plan that was found for a model is applied to that model; a ControlNet beside it may be another."""
    if plan.model is None:
        return
    reasons = [plan.model.why_not(type(model).__name__, config_hash(model)) for model in models]
    if None not in reasons:
        raise ValueError(f"the plan {reasons[0]}; dataclasses.replace(plan, model=None) is applied all the same")


def _check_patterns(plan: Plan, models: Iterable[nn.Module]) -> None:
    """A plan that asks for something must ask it of a layer that is there."""
    wanted = [p for stage in plan.stages for p, m in stage.layers.items() if not isinstance(m, SoftmaxAttention)]
    layers = [name for model in models for name in patchable_layers(model)]
    methods = (method for name in layers for method in plan.methods_for(name))
    if wanted and all(isinstance(method, SoftmaxAttention) for method in methods):
        raise ValueError(
            f"no attention layer matches {', '.join(dict.fromkeys(wanted))}; layer names look like {layers[0]}"
        )


def _check_grid(grid: Any) -> None:
    sides = cast("Sequence[int]", grid) if isinstance(grid, (tuple, list)) else ()
    if len(sides) not in (2, 3):
        raise ValueError(f"grid must be (height, width), or (frames, height, width) of a video, got {grid!r}")
    for name, side in zip(("grid frames", "grid height", "grid width")[-len(sides) :], sides, strict=True):
        check_count(name, side)


def _check_patchable(model: nn.Module, name: str) -> None:
    layers = dict(attention_modules(model))
    refused = refused_layers(model)
    if len(refused) < len(layers):
        return
    if not layers:
        raise ValueError(f"{name} has no attention layer, so there is nothing to patch")
    reasons = ", ".join(sorted(set(refused.values())))
    raise ValueError(f"{name} has no self-attention layer that can be patched: {reasons}")
