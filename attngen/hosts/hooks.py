"""Forward pre-hooks that carry a `Call` from the denoiser's arguments to the attention layers.

They are objects of these classes and hold no module, so a patched model can be copied and pickled, and everything that
a patch added to a model can be found on the model itself.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.hosts import core
from attngen.hosts.backend import catch_backends, release_backends
from attngen.hosts.calls import Calls
from attngen.hosts.clock import Clock
from attngen.hosts.families import Family, family_of, slots
from attngen.hosts.family import Unreadable
from attngen.hosts.flux import FluxAttnGenProcessor
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.joint import JointAttnGenProcessor
from attngen.hosts.seen import Seen, warn
from attngen.hosts.spec import spec_of
from attngen.kernels.autocast import autocast_dtype
from attngen.layers.call import CHANNEL_KEY, Call
from attngen.layers.trace import COUNTS
from attngen.schedule import ChangeSchedule, stage_at

PROCESSORS = (AttnGenProcessor, JointAttnGenProcessor, FluxAttnGenProcessor)
INNER_HOOK = -1  # torch numbers hooks from 0

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Hook:
    """Base of all hooks of a patch, by which `remove_hooks` finds them."""


class RootHook(Hook):
    """On the denoiser: reads time and size once a call, outside of any compiled graph, and makes the `Call`.

    Args:
        patch_id: distinguishes this patch from a later one on the same model.
        model: the denoiser; only the places of its arguments are kept.
        starts: of the plan's stages.
        draws: for each stage, whether one of its methods needs them.
        layers: names of the patched layers; checked for processors that another tool has replaced.
        clock: time of a timestep by the pipeline's scheduler.
        seed: of the random numbers.
        switch: chooses the stage instead of the time, or None.
        review: called once for each new `Seen`, with (model, seen); returns a warning or None.
        references: whether keys of reference images are reduced, so that their grids are read.

    Attributes:
        paused: whether every layer is exact, bit for bit, for as long as this is set.
        trace: key of the running trace, or None.
        last_seen: the last call; for reports only, no computation reads it.
        unread: why the grid of the last call could not be read, or None; for reports.
    """

    def __init__(
        self,
        patch_id: str,
        model: nn.Module,
        starts: Sequence[float],
        draws: Sequence[bool],
        layers: Sequence[str],
        clock: Clock,
        seed: int,
        switch: ChangeSchedule | None,
        review: Callable[[nn.Module, Seen], str | None],
        references: bool = False,
    ) -> None:
        family = family_of(model)
        assert family is not None
        self.patch_id, self.starts, self.draws, self.layers = patch_id, tuple(starts), tuple(draws), tuple(layers)
        self.clock, self.seed, self.switch, self.review = clock, seed, switch, review
        self.references = references
        places = slots(model)
        self.sample, self.time = places[family.sample], None if family.time is None else places[family.time]
        self.channel = None if family.channel is None else places[family.channel]
        self.calls = Calls() if family.core is not None else None
        extra = ("img_ids", family.text, family.mask)
        self.extra = {n: place for n, place in places.items() if n in extra or family.core is not None}
        self.paused = False
        self.trace: str | None = None
        self.last_seen: Seen | None = None
        self.unread: str | None = None
        self._reviewed: set[Seen] = set()
        self._warned: set[str] = set()
        self._replaced_by: str | None = None

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        family = family_of(model)
        assert family is not None
        sample = self.sample.get(args, kwargs)
        # The model itself will raise what is missing, be it the latents or the timestep.
        times = None if sample is None or self.paused else self._times(family, args, kwargs)
        if times is None:
            if self.calls is not None:
                self.calls.push(None)
            return args, kwargs
        if self.calls is not None:
            catch_backends(model)
        extra = {name: place.get(args, kwargs) for name, place in self.extra.items()}
        stage = self._stage(times)
        place = self._place(model, family, {**extra, family.sample: sample})
        if place is None:
            assert self.calls is not None
            self.calls.push(None)
            return args, kwargs
        grid, text = place
        references = self._references(model, family, extra)
        seen = self._see(model, family, grid, text, sample, extra, references)
        if self.trace is not None:
            COUNTS[self.trace].call(str(stage))
        call = Call(
            str(stage),
            seen.grid,
            context=seen.text if family.rotary else 0,
            draws=self._draws(seen.grid, times, seen.device) if self.draws[stage] else None,
            trace=self.trace,
            references=references,
        )
        if self.calls is not None:
            self.calls.push(call)
        if self.channel is None:
            return args, kwargs
        given = self.channel.get(args, kwargs)
        return self.channel.put(args, kwargs, {**(given or {}), CHANNEL_KEY: call})

    def _times(self, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float] | None:
        """Times of the call, read only where something depends on them: reading synchronises with a GPU."""
        if len(self.starts) == 1 and not any(self.draws):
            return []
        if self.time is None:
            raise ValueError("a model without a time step has no stages; use a plan of one stage")
        timestep = self.time.get(args, kwargs)
        if timestep is None:
            return None
        if not isinstance(timestep, Tensor):
            return [self.clock.time(float(timestep), family.clock)]
        # One a token or frame, where those of given frames are at 0
        if timestep.ndim > 1 or family.times_of == "tokens":
            return [max(self.clock.time(value, family.clock) for value in timestep.unique().tolist())]
        return [self.clock.time(value, family.clock) for value in timestep.flatten().tolist()]

    def _stage(self, times: list[float]) -> int:
        if self.switch is not None:
            return min(self.switch.at(max(times)), len(self.starts) - 1)
        stages = {stage_at(self.starts, time) for time in times} if len(self.starts) > 1 else {0}
        if len(stages) > 1:
            raise ValueError(
                f"the time steps of one batch fall into {len(stages)} stages of the plan; use a plan of one stage"
            )
        return stages.pop()

    def _place(self, model: nn.Module, family: Family, arguments: dict[str, Any]) -> tuple[Grid, int] | None:
        """Grid of the image and number of text tokens; None where a row cannot read them."""
        self.unread = None
        try:
            *frames, height, width = family.grid(model, arguments)
            if callable(family.text):
                text = family.text(model, arguments)
            else:
                tokens: Tensor | None = arguments.get(family.text or "")
                text = 0 if tokens is None else int(tokens.shape[1])
        except Exception as error:
            if self.calls is None:
                raise
            self.unread = str(error) if isinstance(error, Unreadable) else f"its grid cannot be read: {error!r}"
            self._warn_once(f"{type(model).__name__} stays exact: {self.unread}")
            return None
        number = math.prod(frames)
        return ((height, width) if number == 1 else (number, height, width)), text

    def _references(self, model: nn.Module, family: Family, arguments: dict[str, Any]) -> tuple[Grid, ...]:
        """The grids of the reference images whose keys are reduced; none where a row cannot read them."""
        if not self.references or family.references is None:
            return ()
        try:
            return family.references(model, arguments)
        except Exception as error:
            self._warn_once(f"references of {type(model).__name__} stay exact: they cannot be read: {error!r}")
            return ()

    def _see(
        self,
        model: nn.Module,
        family: Family,
        grid: Grid,
        text: int,
        given: Any,
        extra: dict[str, Any],
        reference_grids: tuple[Grid, ...],
    ) -> Seen:
        """The properties of the call; warns once where nothing is active at this size, or processors were replaced."""
        sample: Tensor = given if isinstance(given, Tensor) else given[0]  # a list of samples
        packed = sample.ndim == 3 and family.core is None
        tokens = int(sample.shape[1]) if packed else math.prod(grid)
        references = max(0, tokens - math.prod(grid)) if family.rotary else 0
        references = references or sum(map(math.prod, reference_grids))
        seen = Seen(
            grid,
            text,
            math.prod(grid) if reference_grids else tokens - references,
            len(given) * (sample.shape[2] if family.spatial_block is not None and sample.ndim == 5 else 1),
            sample.dtype if sample.is_floating_point() else getattr(model, "dtype", torch.float32),
            sample.device,
            torch.is_grad_enabled(),
            sample.requires_grad,
            autocast_dtype(sample.device.type),
            family.mask is not None and extra.get(family.mask) is not None,
            references,
            reference_grids,
        )
        self.last_seen = seen
        if seen not in self._reviewed:
            self._reviewed.add(seen)
            self._warn_once(self._reviewed_safely(model, seen))
        name = self._replacement(model)
        if name is not None and self._replaced_by != name:
            warn(
                f"another tool replaced attngen's attention processors with {name}, so the patch is no longer active"
                " there; call handle.reapply()"
            )
        self._replaced_by = name
        return seen

    def _reviewed_safely(self, model: nn.Module, seen: Seen) -> str | None:
        """A report never ends a user's work."""
        try:
            return self.review(model, seen)
        except Exception as error:
            return f"what the patch does for {type(model).__name__} could not be reviewed: {error!r}"

    def _warn_once(self, message: str | None) -> None:
        if message is not None and message not in self._warned:
            self._warned.add(message)
            warn(message)

    def _draws(self, grid: Grid, times: list[float], device: torch.device) -> Tensor:
        """Draws that depend on the seed and the time alone: the same for both halves of guidance, in any batch."""
        digest = hashlib.sha256(f"{self.seed} {times[0] if times else 0.0!r}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randint(2**31 - 1, (math.prod(grid),), generator=generator).to(device)

    def _replacement(self, model: nn.Module) -> str | None:
        for layer in self.layers if self.calls is None else ():
            processor: Any = model.get_submodule(layer).processor
            if not isinstance(processor, PROCESSORS):
                return type(processor).__name__
        return None


class EndHook(Hook):
    """After the denoiser of a core host, also where it raised: ends the call."""

    def __init__(self, root: RootHook) -> None:
        assert root.calls is not None
        self.calls = root.calls

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.pop()


class _InnerHook(Hook, ABC):
    """On a module between the denoiser and its layers: changes the payload that passes through."""

    def __init__(self, module: nn.Module, channel: str) -> None:
        self.channel = slots(module)[channel]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        given = self.channel.get(args, kwargs)
        if given is None or CHANNEL_KEY not in given:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        call = self.refine(given[CHANNEL_KEY], hidden_states)
        return self.channel.put(args, kwargs, {**given, CHANNEL_KEY: call})

    @abstractmethod
    def refine(self, call: Call, hidden_states: Tensor) -> Call:
        """The payload for the modules inside, from the input of this one."""


class SpatialHook(_InnerHook):
    """On the modules of a UNet that turn latents into tokens: sets the exact grid of this level.

    Attributes:
        seen: the grid of the last call, or None.
    """

    seen: Grid | None = None

    def refine(self, call: Call, hidden_states: Tensor) -> Call:
        height, width = hidden_states.shape[-2:]
        if not torch.compiler.is_compiling():
            self.seen = int(height), int(width)  # for reports only
        return call._replace(grid=(height, width))


class MetricHook(_InnerHook):
    """On transformer blocks: passes on their input, on which token merging measures similarity."""

    def refine(self, call: Call, hidden_states: Tensor) -> Call:
        return call._replace(metric=hidden_states)


class StripHook(Hook):
    """On every attention module: removes the payload where a processor has no such argument; diffusers would log."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if CHANNEL_KEY not in kwargs or isinstance(module.processor, PROCESSORS):
            return None
        return args, {name: value for name, value in kwargs.items() if name != CHANNEL_KEY}


def add_hook(module: nn.Module, hook: Any) -> None:
    """Register one of these hooks; the root hook runs before those of other tools."""
    if isinstance(hook, RootHook):
        module.register_forward_pre_hook(cast("Any", hook), with_kwargs=True, prepend=True)
    elif isinstance(hook, (EndHook, core.Leave)):
        module.register_forward_hook(cast("Any", hook), with_kwargs=True, always_call=True)
    else:
        # As registering does, but by one number in every layer: torch gives each hook its own, and compilers that
        # compare them (2.10) make a graph for each block, where equal blocks can share one.
        module._forward_pre_hooks[INNER_HOOK] = hook
        module._forward_pre_hooks_with_kwargs[INNER_HOOK] = True


def inner_hooks(model: nn.Module, family: Family, metric: bool) -> list[tuple[nn.Module, Any]]:
    """Hooks for all modules between the denoiser and its layers, and for all attention modules."""
    hooks: list[tuple[nn.Module, Any]] = []
    if family.channel is None:
        return hooks
    for module in model.modules():
        if family.spatial_block is not None and type(module).__name__ == family.spatial_block:
            hooks.append((module, SpatialHook(module, family.channel)))
        elif metric and isinstance(module, BasicTransformerBlock):
            hooks.append((module, MetricHook(module, family.channel)))
        elif hasattr(module, "get_processor"):
            hooks.append((module, StripHook()))
    return hooks


def root_hook(model: nn.Module) -> RootHook | None:
    """The hook by which a model is patched, or None."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RootHook)), None)


def core_hooks(layers: Iterable[nn.Module], root: RootHook, place: core.Core) -> list[tuple[nn.Module, Any]]:
    """Hooks on the attention modules of a core host."""
    calls = root.calls
    assert calls is not None
    return [(attn, hook) for attn in layers for hook in (core.Enter(calls, place), core.Leave())]


def remove_hooks(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Remove all hooks of a patch from a model and return them with their modules."""
    removed: list[tuple[nn.Module, Any]] = []
    release_backends(model)
    for module in model.modules():
        before = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        after = module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
        for table, *flags in (before, after):
            for key in [key for key, hook in table.items() if isinstance(hook, (Hook, core.Hook))]:
                removed.append((module, table.pop(key)))
                for flag in flags:
                    flag.pop(key, None)
    return removed


def patched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a spec attached, by name."""
    return {name: module for name, module in model.named_modules() if spec_of(module) is not None}


def is_ours(attn: Any) -> bool:
    """Whether the patch of a patched layer is in force: its processor is ours, or its products are caught."""
    spec = spec_of(attn)
    return spec is not None and (spec.core or isinstance(attn.processor, PROCESSORS))


def seen_grids(model: nn.Module) -> dict[str, Grid]:
    """The grid that each module with a `SpatialHook` had in the last call, by module name."""
    found: dict[str, Grid] = {}
    for name, module in model.named_modules():
        hook = module._forward_pre_hooks.get(INNER_HOOK)
        if isinstance(hook, SpatialHook) and hook.seen is not None:
            found[name] = hook.seen
    return found
