"""`apply` puts a plan on a pipeline's denoisers; the handle it returns reports and takes it back."""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from attngen.checks import Grid, check_count
from attngen.hosts import hooks
from attngen.hosts.describe import default_size, describe_model, left_alone
from attngen.hosts.families import denoisers_of
from attngen.hosts.install import attention_modules, install, patchable_layers, refused_layers, uninstall
from attngen.hosts.owners import check_owner, note_owner
from attngen.kernels.dispatch import AUTO, check_kernel
from attngen.learned.file import SUFFIX, LearnedLayers
from attngen.learned.methods import LearnedMethod
from attngen.learned.modules import HiddenModule
from attngen.methods import AttentionMethod, SoftmaxAttention
from attngen.plan import Plan
from attngen.presets import resolve_preset
from attngen.report import LayerReport, Report
from attngen.schedule import ChangeSchedule


def apply(
    target: Any,
    method: str | AttentionMethod | Plan | LearnedLayers | os.PathLike[str],
    *,
    min_tokens: int | None = None,
    seed: int = 0,
    switch: ChangeSchedule | None = None,
    kernel: str = AUTO,
) -> AttentionPatch:
    """Change the attention of a diffusers pipeline or model in place. One call undoes it, bit for bit.

    A model that is patched already gets the new plan instead of the old one. Cross-attention, and layers whose
    processor is not a plain one, stay as they are; `handle.report()` lists them with the reason. The patch belongs to
    the model: pipelines that share a model share its patch, and only the one it was applied through, or the bare model,
    may be given another.

    Args:
        target: a pipeline (its UNet, transformer and ControlNets are patched) or a bare model.
        method: a preset's name (`attngen.PRESETS`), a method such as `AgentAttention(num_agents=64)`, a `Plan`, the
            path of a plan file (.json), or `LearnedLayers` or the path of a file of them (.safetensors).
        min_tokens: overrides the plan's.
        seed: of random token merging; the global random state is never read.
        switch: chooses the stage by the change of the latents instead of the time. Pass the same object to the
            pipeline as `callback_on_step_end`. It starts anew when the time runs back.
        kernel: the path that computes agent and linear attention: "auto" takes the one measured to be fastest, any
            other ("absorbed", "triton", "sdpa", "matmul", "reference") is taken wherever it can run. The report says
            which one a layer takes, and why not the one that was asked for.

    Returns:
        The handle: `.report()`, `.remove()`, `.reapply()`; also a context manager that removes on exit.

    Raises:
        ValueError: before anything is changed, for an unknown method or kernel, a bad plan file, a plan whose patterns
            match no layer, learned layers that do not fit, a target without a self-attention layer that can be patched,
            or a pipeline that shares a model with another one through which it is patched.
    """
    learned = _learned(method)
    plan = _resolve(method) if learned is None else learned.plan
    if min_tokens is not None:
        check_count("min_tokens", min_tokens, at_least=0)
        plan = Plan(plan.stages, min_tokens=min_tokens, max_levels=plan.max_levels)
    check_count("seed", seed, at_least=0)
    check_kernel(kernel)
    _check_switch(switch, plan)
    models = denoisers_of(target)
    if learned is not None:
        models = learned.models_of(models)
    check_owner(target, models)
    for name, model in models.items():
        _check_patchable(model, name or type(model).__name__)
    _check_patterns(plan, models.values())
    cores = {} if learned is None else _cores(learned, models)
    patch = AttentionPatch(models, plan, seed, switch, kernel, cores)
    patch._install(target)
    return patch


def remove(target: Any) -> None:
    """Take any patch of attngen off a pipeline or model; nothing happens where there is none.

    Raises:
        ValueError: if the target has no model that attngen knows.
    """
    for model in denoisers_of(target).values():
        uninstall(model)


class AttentionPatch:
    """The handle of a patch.

    Attributes:
        plan: what was applied.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        plan: Plan,
        seed: int,
        switch: ChangeSchedule | None,
        kernel: str,
        cores: Mapping[str, Mapping[str, HiddenModule]] | None = None,
    ) -> None:
        self.plan = plan
        self._cores = cores or {}
        self._models, self._seed, self._switch, self._kernel = models, seed, switch, kernel
        self._id = uuid.uuid4().hex
        self._owner: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}  # a copy's models are in no pipeline yet

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
                uninstall(model)

    def reapply(self) -> None:
        """Put the patch back where another tool replaced its processors; theirs become the ones to restore.

        Raises:
            ValueError: if no layer can be patched by now, or another pipeline has patched a model that it shares.
        """
        owner = None if self._owner is None else self._owner()
        check_owner(owner, self._models)
        for name, model in self._models.items():
            uninstall(model)
            _check_patchable(model, name or type(model).__name__)
        self._install(owner)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it every layer is exact, bit for bit; what the layers are does not change."""
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
            grid: (height, width) of the latents of a UNet, or of the tokens of a transformer. By default that of the
                last call, or of the model's configuration before the first.

        Raises:
            ValueError: if `grid` is not a pair of whole numbers above 0.
        """
        if grid is not None:
            _check_grid(grid)
        patched: list[LayerReport] = []
        left: list[LayerReport] = []
        for name, model in self._models.items():
            hook = hooks.root_hook(model)
            if hook is None or not self._is_on(model):
                continue
            size = hook.last_seen or default_size(model)
            if grid is not None:
                size = size._replace(grid=grid, tokens=grid[0] * grid[1])
            patched += describe_model(model, name, self.plan.starts, size)
            left += [left_alone(name, layer, reason) for layer, reason in refused_layers(model, patched=True).items()]
        return Report(patched + left, self.plan.starts)

    def _is_on(self, model: nn.Module) -> bool:
        hook = hooks.root_hook(model)
        return hook is not None and hook.patch_id == self._id

    def _install(self, target: Any) -> None:
        self._owner = note_owner(target, self._models)
        for name, model in self._models.items():
            install(model, self.plan, self._id, self._seed, self._switch, self._kernel, self._cores.get(name))


def _learned(method: Any) -> LearnedLayers | None:
    """Learned layers, read from their file if need be; None for any other method."""
    if isinstance(method, LearnedLayers):
        return method
    if isinstance(method, (str, os.PathLike)) and os.fspath(method).endswith(SUFFIX):
        return LearnedLayers.load(method)
    return None


def _cores(learned: LearnedLayers, models: Mapping[str, nn.Module]) -> dict[str, dict[str, HiddenModule]]:
    """New modules with the weights, by model and layer; warns where a model is configured otherwise."""
    for model in models.values():
        message = learned.other_model(model)
        if message is not None:
            hooks.warn(message)
    return {name: learned.cores(model) for name, model in models.items()}


def _resolve(method: Any) -> Plan:
    if isinstance(method, Plan):
        kinds = {m.kind for stage in method.stages for m in stage.layers.values() if isinstance(m, LearnedMethod)}
        if kinds:
            raise ValueError(f"{kinds.pop()} needs weights: apply the file of learned layers ({SUFFIX}) instead")
        return method
    if isinstance(method, LearnedMethod):
        raise ValueError(f"{method.kind} needs weights: apply a file of learned layers ({SUFFIX}) instead")
    if isinstance(method, AttentionMethod):
        return Plan.of(method)
    if isinstance(method, os.PathLike) or (isinstance(method, str) and method.endswith(".json")):
        return Plan.load(method)
    if isinstance(method, str):
        return resolve_preset(method)
    raise ValueError(f"a method is a preset's name, an attention method, a Plan or the path of one, got {method!r}")


def _check_switch(switch: Any, plan: Plan) -> None:
    if switch is None:
        return
    if not isinstance(switch, ChangeSchedule):
        raise ValueError(f"switch must be a ChangeSchedule, got {switch!r}")
    if len(plan.stages) == 1:
        raise ValueError("a switch chooses between the stages of a plan, but this plan has one stage")


def _check_patterns(plan: Plan, models: Iterable[nn.Module]) -> None:
    """A plan that asks for something must ask it of a layer that is there."""
    wanted = [p for stage in plan.stages for p, m in stage.layers.items() if not isinstance(m, SoftmaxAttention)]
    layers = [name for model in models for name in patchable_layers(model)]
    methods = (method for name in layers for method in plan.methods_for(name))
    if wanted and all(isinstance(method, SoftmaxAttention) for method in methods):
        raise ValueError(
            f"the patterns {', '.join(dict.fromkeys(wanted))} give no layer a method; layers are named like {layers[0]}"
        )


def _check_grid(grid: Any) -> None:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid must be (height, width), got {grid!r}")
    for name, side in zip(("grid height", "grid width"), grid, strict=True):
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
