"""The lines of Python that draw what the page drew."""

from __future__ import annotations

from typing import Any

from pipelines.engine.models import CLASSES, Model
from pipelines.engine.settings import Settings
from pipelines.engine.shipped import shipped_models
from pipelines.methods.catalogue import SWITCH
from pipelines.methods.counts import FIRST_RATIO, NEXT_RATIO, parse_counts
from pipelines.methods.options import MEDIATORS, PLAN
from pipelines.methods.uses import find_method
from pipelines.samplers import sampler_name


def code_of(model: Model, settings: Settings) -> str:
    """A program that draws the first image of fitted settings with a model, from the model's folder or name."""
    pipe = type(model.pipe)
    package = "attngen" if pipe.__module__.startswith("attngen") else "diffusers"
    arguments = {
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt or None,
    }
    given = [repr(settings.prompt)]
    given += [f"{name}={value!r}" for name, value in arguments.items() if value is not None and name in model.takes]
    if settings.method == MEDIATORS:
        given.append(f"num_mediators={_mediators(**settings.options)}")
    if model.kind == CLASSES and (package == "diffusers" or settings.prompt.isdigit()):
        given[0] = str(model.label_of(settings.prompt))
    given.append(f"generator=torch.Generator().manual_seed({settings.seed})")
    lines = [
        "import torch",
        "import attngen",
        f"from {package} import {pipe.__name__}",
        "",
        f"pipe = {pipe.__name__}.from_pretrained({path_of(model)!r})",
        *_sampler(model, settings),
        *_patch(settings),
        f"image = pipe({', '.join(given)}).images[0]",
    ]
    return "\n".join(lines)


def path_of(model: Model) -> str:
    """A model as it is named in the folder of this repository."""
    folder = shipped_models().get(model.name)
    return model.path if folder is None else str(folder.relative_to(folder.parents[2]))


def _mediators(mediators: Any, follow: str) -> str:
    starts, counts = parse_counts(MEDIATORS, mediators)
    if len(counts) == 1:
        return str(counts[0])
    if follow == "change":
        ratios = [FIRST_RATIO * NEXT_RATIO**i for i in range(len(counts) - 1)]
        return f"attngen.ChangeSchedule(ratios={ratios!r}, values={counts!r})"
    return f"attngen.Schedule(starts={starts!r}, values={counts!r})"


def _sampler(model: Model, settings: Settings) -> list[str]:
    name = settings.sampler
    if name is None or name == sampler_name(model.pipe.scheduler):
        return []
    if " " in name:
        sampler, solver = name.split()
        changed = f"type(pipe.scheduler).from_config(pipe.scheduler.config, sampler={sampler!r}, solver={solver!r})"
        return [f"pipe.scheduler = {changed}"]
    return ["import diffusers", f"pipe.scheduler = diffusers.{name}.from_config(pipe.scheduler.config)"]


def _patch(settings: Settings) -> list[str]:
    """The line that changes the attention: a preset with its options where they are all, else the plan."""
    info = find_method(settings.method)
    if info.plan is None:
        return []
    changed = {o: settings.options[o.name] for o in info.options if settings.options[o.name] != o.default}
    over_time = any(option.kind == "counts" and not value.isdigit() for option, value in changed.items())
    if settings.method == PLAN or over_time or any(option.name == SWITCH for option in changed):
        return [f"attngen.apply(pipe, attngen.Plan.from_json({info.plan(settings.options).to_json()!r}))"]
    more = [f"{o.name}={int(value) if o.kind == 'counts' else value!r}" for o, value in changed.items()]
    return [f"attngen.apply({', '.join(['pipe', repr(settings.method), *more])})"]
