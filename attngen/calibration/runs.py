"""Repeated runs of a pipeline with the same random numbers, which leave it unchanged."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attngen.hosts.families import denoisers_of
from attngen.hosts.hooks import root_hook
from attngen.hosts.install import patchable_layers, refused_layers


def check_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, checked.

    Raises:
        ValueError: for a bare model, something that is not a pipeline, an unknown argument, a patched pipeline,
            one with a cache, whose layers are not computed at every call, or one without a layer that can be patched.
    """
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise ValueError(
            f"calibrate() needs a pipeline, got {type(pipe).__name__}; wrap the model first, e.g."
            " SiTPipeline(transformer, scheduler)"
        )
    models = denoisers_of(pipe)
    parameters = inspect.signature(pipe.__call__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = [name for name in arguments if name not in parameters]
        if unknown:
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(parameters)}")
    for name, model in models.items():
        if root_hook(model) is not None:
            raise ValueError(
                f"the {name} is patched, so its exact output is not known; call attngen.remove(pipe) first"
            )
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(f"the {name} has a cache, which skips layers; call disable_cache() on it first")
    if not any(patchable_layers(model) for model in models.values()):
        reasons = sorted({reason for model in models.values() for reason in refused_layers(model).values()})
        why = f": {', '.join(reasons)}" if reasons else ""
        raise ValueError(f"{type(pipe).__name__} has no self-attention layer that can be patched{why}")
    return models


class Runner:
    """Calls a pipeline with the same arguments and the same random numbers every time.

    Args:
        pipe: the pipeline.
        arguments: of its call. A generator is reset before every run; without one it is made from `seed`.
        seed: of the generator.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any], seed: int) -> None:
        self.pipe, self.seed = pipe, seed
        self.arguments = {name: value for name, value in arguments.items() if name != "output_type"}
        given = arguments.get("generator")
        self.generators: list[torch.Generator] = [] if given is None else list(_as_list(given))
        self.states = [generator.get_state() for generator in self.generators]
        self.taken = inspect.signature(pipe.__call__).parameters

    def __call__(self) -> Tensor:
        """The final latents of all samples (images, where a pipeline has no latents), flat, in float32 on the CPU."""
        arguments = dict(self.arguments)
        self.rewind()
        if not self.generators and "generator" in self.taken:
            arguments["generator"] = torch.Generator().manual_seed(self.seed)
        if "output_type" in self.taken:
            arguments["output_type"] = "latent"
        output = _tensor(self.pipe(**arguments)[0]).detach().float().cpu().flatten()
        if not output.isfinite().all():
            raise ValueError("the pipeline's output is not finite; use another dtype, float32 or bfloat16")
        return output

    def rewind(self) -> None:
        """Restore the state of the caller's generators."""
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Distance as a share of the length of `exact`."""
    return float((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """At its end a pipeline's attributes, its scheduler's state and the global random state are restored."""
    before = dict(vars(pipe))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            if "scheduler" in vars(pipe):
                vars(pipe)["scheduler"] = copy.deepcopy(pipe.scheduler)
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            yield
        finally:
            vars(pipe).clear()
            vars(pipe).update(before)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (list, tuple)):
        return torch.stack([_tensor(picture) for picture in output])
    return torch.from_numpy(np.array(output))
