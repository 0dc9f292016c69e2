"""Names of the samplers that fit a pipeline, and new schedulers of those names."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from pipelines.cli import UserError

# SiT's sampler and solver, as attngen's scheduler calls them; the solver of an SDE step is what the papers use.
INTERPOLANT = ("ode heun", "ode euler", "sde euler", "sde heun")
# Of diffusers' schedulers those that people ask for; only what a model's own scheduler says is compatible is offered.
DIFFUSERS = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DDPMScheduler",
)


def sampler_name(scheduler: Any) -> str:
    """The name of a scheduler: "ode heun" for SiT's, a class name for diffusers'."""
    from attngen import InterpolantScheduler

    if isinstance(scheduler, InterpolantScheduler):
        return f"{scheduler.config['sampler']} {scheduler.config['solver']}"
    return type(scheduler).__name__


def sampler_names(pipe: Any) -> list[str]:
    """Names that `make_sampler` takes for this pipeline, its own first."""
    from attngen import InterpolantScheduler

    own = sampler_name(pipe.scheduler)
    if isinstance(pipe.scheduler, InterpolantScheduler):
        return list(dict.fromkeys([own, *INTERPOLANT]))
    compatible = {kind.__name__ for kind in pipe.scheduler.compatibles}
    return list(dict.fromkeys([own, *(name for name in DIFFUSERS if name in compatible)]))


def make_sampler(pipe: Any, name: str | None) -> Any:
    """A scheduler without any state, so that one picture leaves nothing behind for the next.

    Raises:
        UserError: listing the known names.
    """
    if name is None or name == sampler_name(pipe.scheduler):
        return copy.deepcopy(pipe.scheduler)
    known = sampler_names(pipe)
    if name not in known:
        raise UserError(f"unknown sampler {name[:60]!r} for this model; known: {', '.join(known)}")
    if " " in name:
        sampler, solver = name.split()
        return type(pipe.scheduler).from_config(pipe.scheduler.config, sampler=sampler, solver=solver)
    kind = next(kind for kind in pipe.scheduler.compatibles if kind.__name__ == name)
    # As Stable Diffusion has it: the Runge-Kutta steps at the start need four steps, and fail with fewer.
    extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return kind.from_config(pipe.scheduler.config, **extra)


# What a command line asks for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--sampler and --solver of SiT, --scheduler of any other model."""
    add = parser.add_argument
    add("--sampler", choices=["ode", "sde"], help="SiT only: deterministic or with noise (default: the model's)")
    add(
        "--solver",
        choices=["euler", "heun"],
        help="SiT only: heun evaluates the network twice per step (default: the model's)",
    )
    add(
        "--scheduler",
        metavar="CLASS",
        help="scheduler class of diffusers, such as DDIMScheduler (default: the model's)",
    )


def choose_scheduler(pipe: Any, options: argparse.Namespace) -> Any:
    """The scheduler that the options of `add_arguments` ask for; the pipeline's own without any.

    Raises:
        UserError: for a scheduler that does not exist, or options that it does not have.
    """
    from attngen import InterpolantScheduler

    scheduler = pipe.scheduler
    if options.scheduler:
        import diffusers

        kind = getattr(diffusers, options.scheduler, None)
        if kind is None or not options.scheduler.endswith("Scheduler"):
            raise UserError(f"diffusers has no scheduler {options.scheduler!r}; expected a name such as DDIMScheduler")
        scheduler = kind.from_config(scheduler.config)
    if options.sampler or options.solver:
        if not isinstance(scheduler, InterpolantScheduler):
            name = type(scheduler).__name__
            raise UserError(f"--sampler and --solver are for SiT's own scheduler, not {name}; use --scheduler alone")
        scheduler = interpolant_of(scheduler, options.sampler, options.solver)
    return scheduler


def interpolant_of(scheduler: Any, sampler: str | None, solver: str | None) -> Any:
    """A SiT's scheduler as it is, or one with this sampler and solver."""
    from attngen import InterpolantScheduler

    if sampler is None and solver is None:
        return scheduler
    saved = dict(scheduler.config) if isinstance(scheduler, InterpolantScheduler) else {"sampler": "ode"}
    sampler = sampler or saved["sampler"]
    default = saved.get("solver") if sampler == saved["sampler"] else None
    solver = solver or default or ("heun" if sampler == "ode" else "euler")
    return InterpolantScheduler.from_config(saved, sampler=sampler, solver=solver)
