"""Forward pre-hooks that carry a `StepInfo` from the denoiser's arguments to the attention layers.

They are objects of these classes and hold no module, so a patched model can be copied and pickled, and all that a patch
put on a model can be found again on the model itself.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.hosts.families import Family, family_of, slot
from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.layers import spec_of
from attngen.schedule import ChangeSchedule, stage_at
from attngen.step import CHANNEL_KEY, StepInfo

PROCESSORS = (AttnGenProcessor, JointAttnGenProcessor, FluxAttnGenProcessor)
INNER_HOOK = -1  # torch numbers hooks from 0

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class AttnGenWarning(UserWarning):
    """Something attngen did not do that was probably expected."""


class CallSize(NamedTuple):
    """Sizes of one denoiser call.

    Attributes:
        grid: (height, width) of the latents of a UNet, of the tokens of a transformer.
        text: text tokens in joint attention, else 0.
        tokens: image tokens; more than the grid holds where a model is given pictures to refer to.
        batch: pictures, both halves of guidance counted.
    """

    grid: Grid
    text: int
    tokens: int
    batch: int


class Hook:
    """Base of all hooks of a patch, by which `remove_hooks` knows them."""


class RootHook(Hook):
    """On the denoiser: reads time and size once a call, outside of any compiled graph, and makes the `StepInfo`.

    Args:
        patch_id: tells this patch from a later one on the same model.
        model: the denoiser; only the places of its arguments are kept.
        starts: of the plan's stages.
        random: for each stage, whether a method of it wants draws.
        seed: of the draws.
        switch: chooses the stage instead of the time, or None.
        layers: names of the patched layers, looked at to notice that another tool replaced our processors.
        review: called once for every new size with (model, `CallSize`); returns a warning or None.

    Attributes:
        paused: whether every layer is exact, bit for bit, for as long as this is set.
    """

    def __init__(
        self,
        patch_id: str,
        model: nn.Module,
        starts: Sequence[float],
        random: Sequence[bool],
        seed: int,
        switch: ChangeSchedule | None,
        layers: Sequence[str],
        review: Callable[[nn.Module, CallSize], str | None],
    ) -> None:
        family = family_of(model)
        assert family is not None
        self.patch_id, self.starts, self.random = patch_id, tuple(starts), tuple(random)
        self.seed, self.switch, self.layers, self.review = seed, switch, tuple(layers), review
        self.sample, self.time, self.channel = (
            slot(model.forward, name) for name in (family.sample, family.time, family.channel)
        )
        extra = [name for name in ("img_ids", family.text) if name is not None]
        parameters = inspect.signature(model.forward).parameters
        self.extra = {name: slot(model.forward, name) for name in extra if name in parameters}
        self.last_seen: CallSize | None = None  # for reports only; no computation reads it
        self._reviewed: set[CallSize] = set()
        self._said: set[str] = set()
        self._told_about: str | None = None
        self.paused = False

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        family = family_of(model)
        assert family is not None
        sample = self.sample.get(args, kwargs)
        if sample is None or self.paused:
            return args, kwargs  # the model itself will say what is missing
        extra = {name: place.get(args, kwargs) for name, place in self.extra.items()}
        grid = family.grid(model, {family.sample: sample, **extra})
        text = extra.get(family.text) if family.text else None
        text_tokens = 0 if text is None else int(text.shape[1])
        times = self._times(family, args, kwargs)
        if times is None:
            return args, kwargs  # the same for the time step
        stage = self._stage(times)
        info = StepInfo(
            str(stage),
            grid,
            context=text_tokens if family.rotary else 0,
            draws=self._draws(grid, times, sample.device) if self.random[stage] else None,
        )
        tokens = int(sample.shape[1]) if sample.ndim == 3 else grid[0] * grid[1]
        self._watch(model, CallSize(grid, text_tokens, tokens, int(sample.shape[0])))
        given = self.channel.get(args, kwargs)
        return self.channel.put(args, kwargs, {**(given or {}), CHANNEL_KEY: info})

    def _times(self, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float] | None:
        """Times of the call, read only where something depends on them: on a GPU reading waits for it."""
        if len(self.starts) == 1 and not any(self.random):
            return []
        timestep = self.time.get(args, kwargs)
        if timestep is None:
            return None
        values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
        return [family.clock(value) for value in values]

    def _stage(self, times: list[float]) -> int:
        if self.switch is not None:
            return min(self.switch.at(max(times)), len(self.starts) - 1)
        stages = {stage_at(self.starts, time) for time in times} if len(self.starts) > 1 else {0}
        if len(stages) > 1:
            raise ValueError(
                f"the time steps of one batch fall into {len(stages)} stages of the plan; use a plan of one stage"
            )
        return stages.pop()

    def _draws(self, grid: Grid, times: list[float], device: torch.device) -> Tensor:
        """Draws that depend on the seed and the time alone: the same for both halves of guidance, in any batch."""
        digest = hashlib.sha256(f"{self.seed} {times[0] if times else 0.0!r}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randint(2**31 - 1, (grid[0] * grid[1],), generator=generator).to(device)

    def _watch(self, model: nn.Module, size: CallSize) -> None:
        """Say once what a user would want to know: nothing active at this size, or our processors replaced."""
        self.last_seen = size
        if size not in self._reviewed:
            self._reviewed.add(size)
            message = self.review(model, size)
            if message is not None and message not in self._said:
                self._said.add(message)
                warn(message)
        name = self._replaced_by(model)
        if name is not None and self._told_about != name:
            warn(
                f"something replaced attngen's processors by {name}, so attention is not what the patch says; "
                f"handle.reapply() puts them back"
            )
        self._told_about = name

    def _replaced_by(self, model: nn.Module) -> str | None:
        for layer in self.layers:
            processor: Any = model.get_submodule(layer).processor
            if not isinstance(processor, PROCESSORS):
                return type(processor).__name__
        return None


def warn(message: str) -> None:
    """Warn at the line of the user's code: the nearest one outside of attngen, diffusers and torch."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("attngen", "diffusers", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AttnGenWarning, stacklevel=level)


class _InnerHook(Hook, ABC):
    """On a module between the denoiser and its layers: changes the payload that passes through."""

    def __init__(self, module: nn.Module, channel: str) -> None:
        self.channel = slot(module.forward, channel)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        given = self.channel.get(args, kwargs)
        if given is None or CHANNEL_KEY not in given:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        info = self.refine(given[CHANNEL_KEY], hidden_states)
        return self.channel.put(args, kwargs, {**given, CHANNEL_KEY: info})

    @abstractmethod
    def refine(self, info: StepInfo, hidden_states: Tensor) -> StepInfo:
        """The payload for the modules inside, given the input of this one."""


class SpatialHook(_InnerHook):
    """On the modules of a UNet that turn latents into tokens: puts in this level's exact grid."""

    def refine(self, info: StepInfo, hidden_states: Tensor) -> StepInfo:
        height, width = hidden_states.shape[-2:]
        return info._replace(grid=(height, width))


class MetricHook(_InnerHook):
    """On transformer blocks: passes on their input, on which token merging measures similarity."""

    def refine(self, info: StepInfo, hidden_states: Tensor) -> StepInfo:
        return info._replace(metric=hidden_states)


class StripHook(Hook):
    """On every attention module: takes the payload away where a processor does not know it; diffusers would log it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if CHANNEL_KEY not in kwargs or isinstance(module.processor, PROCESSORS):
            return None
        return args, {name: value for name, value in kwargs.items() if name != CHANNEL_KEY}


def add_hook(module: nn.Module, hook: Any) -> None:
    """Register a hook of ours; the root's comes before those of other tools."""
    if isinstance(hook, RootHook):
        module.register_forward_pre_hook(cast("Any", hook), with_kwargs=True, prepend=True)
    else:
        # As registering does, but by one number in every layer: torch gives each hook its own, and compilers that
        # compare them (2.10) make a graph for each block, where blocks alike can share one.
        module._forward_pre_hooks[INNER_HOOK] = hook
        module._forward_pre_hooks_with_kwargs[INNER_HOOK] = True


def add_inner_hooks(model: nn.Module, family: Family, metric: bool) -> None:
    """Hooks on all modules between the denoiser and its layers, and on all attention modules."""
    for module in model.modules():
        if family.spatial_block is not None and type(module).__name__ == family.spatial_block:
            add_hook(module, SpatialHook(module, family.channel))
        elif metric and isinstance(module, BasicTransformerBlock):
            add_hook(module, MetricHook(module, family.channel))
        elif hasattr(module, "get_processor"):
            add_hook(module, StripHook())


def root_hook(model: nn.Module) -> RootHook | None:
    """The hook by which a model is patched, or None."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RootHook)), None)


def remove_hooks(model: nn.Module) -> None:
    """Take all hooks of a patch off a model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Hook)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def patched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a spec beside them, by name."""
    return {name: module for name, module in model.named_modules() if spec_of(module) is not None}
