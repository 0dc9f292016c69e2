"""Train a SiT or DiT, with softmax, mediator or linear attention.

    python -m train.sit --preset emoji --out runs/emoji                            # about two hours on one core
    python -m train.sit --resume runs/emoji                                        # continues it, as it was configured
    python -m train.sit --config runs/emoji/config.json --steps 9000 --out runs/longer
    python -m train.sit --preset sit-s2-256-mediators --data latents/ --out runs/s2 --mixed-precision bf16 --compile
    accelerate launch --num_processes 8 -m train.sit --preset dit-xl2-256 --data latents/ --out runs/xl2

Every random draw is a function of the seed and the step: a run that was stopped and resumed equals one that was not,
and any number of processes computes the same batches. SIGTERM, Ctrl+C and --max-minutes save and end it with status 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from train.data.broken import parse_max_broken
from train.loop.record import command_of
from train.recipe.config import CHOICES, GROUPS, TrainingConfig, describe_fields
from train.recipe.files import add_run_arguments, find_run, read_config
from train.recipe.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from pipelines.cli.signals import StopOnSignal
    from train.data.base import Data
    from train.loop.run import Run
    from train.recipe.objectives import Objective

_FLOATS = ("mediator_starts", "ema_stds")
EPILOG = "The grouped options override the preset, the file or the resumed run; defaults shown are those of emoji."
_METAVARS: dict[type, str] = {int: "N", float: "X", str: "NAME"}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, TrainingConfig]:
    """Command line -> options of the program, and the configuration of the run."""
    parser = cli.Parser(
        "train.sit",
        __doc__,
        EPILOG,
    )
    parser.add_argument("--preset", metavar="NAME", help="recipe to start from (default: emoji); see --list-presets")
    parser.add_argument("--list-presets", action="store_true", help="print the names of all recipes and exit")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON file like config.json of a run")
    add_run_arguments(parser, "runs/emoji")
    parser.add_argument("--dry-run", action="store_true", help="print the model, the data and the cost, and exit")
    parser.add_argument(
        "--max-minutes", type=float, metavar="X", help="save and stop after this time; --resume continues"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--allow-pickle", action="store_true", help="allow a pickled .pt file in --init-from")
    parser.add_argument(
        "--trackers",
        nargs="*",
        metavar="NAME",
        help="accelerate trackers: wandb, … (default: tensorboard if installed)",
    )
    group: Any = parser
    for field in dataclasses.fields(TrainingConfig):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        _add_field(group, field)
    options = parser.parse_args(argv)
    if options.list_presets:
        print("\n".join(PRESETS))
        parser.exit()
    options.command = command_of("train.sit", argv)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainingConfig)}
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    try:
        options.out = find_run(options.resume, options.out, Path("runs/emoji"))
        base = _base(options)
        if options.config is None and not options.resume and overrides.get("data", base.data) != base.data:
            overrides.setdefault("classes", ())  # the preset's are those of its own data
        config = dataclasses.replace(base, **overrides)
    except ValueError as error:
        parser.error(str(error))
    if not config.data:
        parser.error(f"the preset {options.preset} needs --data: images, or latents made by train.encode")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.max_minutes is not None and not (math.isfinite(options.max_minutes) and options.max_minutes >= 0):
        parser.error(f"--max-minutes must be a number of at least 0, got {options.max_minutes}")
    return options, config


def _base(options: argparse.Namespace) -> TrainingConfig:
    """The configuration that the options override: of a file, of the resumed run, or of a preset."""
    if options.preset is not None and options.preset not in PRESETS:
        near = difflib.get_close_matches(options.preset, PRESETS, n=3)
        raise ValueError(
            f"unknown preset {options.preset!r}; {'near it: ' + ', '.join(near) if near else '--list-presets'}"
        )
    saved = options.out / "config.json"
    if options.config is not None:
        return read_config(options.config, PRESETS[options.preset] if options.preset else TrainingConfig())
    if options.resume and options.preset is None and saved.is_file():
        return read_config(saved, TrainingConfig())
    return PRESETS[options.preset or "emoji"]


def _add_field(group: Any, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    default = " ".join(str(value) for value in values) or "none"
    # argparse formats help texts with %.
    help_text = f"{describe_fields()[field.name]} (default: {default})".replace("%", "%%")
    if isinstance(field.default, tuple):
        kind = str if field.name == "classes" else float if field.name in _FLOATS else int
        group.add_argument(flag, nargs="*", type=kind, default=None, metavar=_METAVARS[kind], help=help_text)
    elif isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
    elif field.name == "max_broken":
        group.add_argument(flag, type=_count_or_share, default=None, metavar="N", help=help_text)
    else:
        kind = type(field.default)
        known = [choice for choice in CHOICES.get(field.name, ()) if choice]
        metavar = "{" + ",".join(known) + "}" if known else _METAVARS[kind]
        group.add_argument(flag, type=kind, default=None, metavar=metavar, help=help_text)


def _count_or_share(text: str) -> int | float:
    try:
        return parse_max_broken(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    options, config = parse_arguments(argv)
    if importlib.util.find_spec("accelerate") is None:
        print("train.sit: accelerate is not installed; pip install 'attngen[train]' installs it", file=sys.stderr)
        return 2
    try:
        return train(options, config)
    except (ValueError, OSError) as error:
        print(f"train.sit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def train(options: argparse.Namespace, config: TrainingConfig) -> int:
    """Run the training; returns the exit status."""
    import torch

    from train.data.open import open_data
    from train.loop.checkpoint import list_checkpoints, step_of
    from train.loop.start import start
    from train.recipe.objectives import make_objective

    if options.threads:
        torch.set_num_threads(options.threads)
    found = list_checkpoints(options.out / "checkpoints")
    if found and not (options.resume or options.dry_run):
        raise ValueError(
            f"{options.out} already holds a run; --resume {options.out} continues it; or pass another --out"
        )
    if found and step_of(found[-1]) > config.steps and not options.dry_run:
        raise ValueError(f"{found[-1]} is beyond --steps {config.steps}; pass more steps, or another --out")
    data = open_data(
        config.data,
        image_size=config.image_size,
        classes=config.classes,
        augment=config.augment,
        flip=config.flip,
        max_broken=config.max_broken,
    )
    config.check_tokens(data.sample_size)
    objective = make_objective(
        config.objective,
        path=config.path,
        weighting=config.weighting or None,
        time_sampling=config.time_sampling,
    )
    if options.dry_run:
        return dry_run(config, data, objective)
    run, step = start(options, config, data, objective, found)
    return loop(options, run, step)


def loop(options: argparse.Namespace, run: Run, step: int) -> int:
    """Step until the end, or until asked to stop; returns the exit status."""
    from pipelines.cli.signals import StopOnSignal

    with StopOnSignal() as stop:
        return _loop(options, run, step, stop)


def _loop(options: argparse.Namespace, run: Run, step: int, stop: StopOnSignal) -> int:
    from train.data.prefetch import Prefetcher

    config, accelerator = run.config, run.accelerator
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    started, last_saved = time.monotonic(), step
    bar = _bar(run, step)
    with Prefetcher(
        run.data, _schedule(run), config.workers, part=part, start=step, stop=config.steps, draw=run.draw
    ) as batches:
        while step < config.steps:
            out_of_time = options.max_minutes is not None and time.monotonic() - started > options.max_minutes * 60
            result = run.step(next(batches), batches.waited, stop.requested or out_of_time)
            step += 1
            bar.set_description(f"step {step}/{config.steps}", refresh=False)
            bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
            bar.update(config.batch_size)
            if step % config.log_every == 0 or step == config.steps or result.stop:
                run.log(step)
            if result.stop:
                break
            if config.save_every and step % config.save_every == 0 and run.save(step):
                last_saved = step
            if config.sample_every and step % config.sample_every == 0:
                run.sample(step)
            if config.fd_every > 0 and step % config.fd_every == 0 and step < config.steps:
                run.evaluate(step, lambda: stop.requested)
    bar.close()
    if last_saved != step:
        run.save(step)
    if step >= config.steps:
        run.export()  # before what may take long and is not needed to draw
        run.sample(step)
        if config.fd_every >= 0:
            run.evaluate(step, lambda: stop.requested)
    elif accelerator.is_main_process:
        print(f"stopped after step {step} of {config.steps}; --resume {options.out} continues", file=sys.stderr)
    run.end_trackers()
    return 1 if run.lost else 0


def _schedule(run: Run) -> Callable[[int], tuple[torch.Tensor, torch.Generator]]:
    """Step -> indices of its batch, and its generator."""
    from pipelines.cli.seeds import generator_for, sample_order
    from train.loop.build import class_weights

    config, weights = run.config, class_weights(run.data, run.config.balance)

    def schedule(step: int) -> tuple[torch.Tensor, torch.Generator]:
        indices = sample_order(config.seed, weights, step * config.batch_size, config.batch_size)
        return indices, generator_for(config.seed, "batch", step)

    return schedule


def _bar(run: Run, step: int) -> Any:
    """A bar that counts pictures, so that it tells pictures a second and the time left."""
    from tqdm import tqdm

    batch, shown = run.config.batch_size, run.accelerator.is_main_process and sys.stderr.isatty()
    total, done = run.config.steps * batch, step * batch
    return tqdm(total=total, initial=done, unit=" pictures", unit_scale=True, dynamic_ncols=True, disable=not shown)


def dry_run(config: TrainingConfig, data: Data, objective: Objective) -> int:
    """Print what would be trained and what it costs."""
    from train.loop.build import build_model, example_inputs
    from train.loop.meter import training_flops

    model = build_model(config, data, objective)
    flops = training_flops(model, example_inputs(data))
    weights = sum(parameter.numel() for parameter in model.parameters())
    size, kind = data.sample_size, "latents" if data.is_latent else "pictures"
    tokens, passes = (size // config.patch_size) ** 2, config.steps * config.batch_size / len(data)
    held = f"{len(data):,} {kind} of {data.channels} x {size} x {size} in {data.num_classes} classes"
    cost = "not countable" if flops is None else f"{flops / 1e9:.2f} GFLOP"
    lines = {
        "data": f"{held}, {config.data}",
        "network": f"{weights / 1e6:.2f} million weights, {tokens} tokens, {config.attention}",
        "training step": f"{cost} per image, batch size {config.batch_size}",
        "whole run": f"{config.steps:,} steps, {passes:.1f} times the data",
    }
    print("\n".join(f"{name}: {value}" for name, value in lines.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
