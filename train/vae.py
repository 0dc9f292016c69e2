"""Train a small autoencoder for images, whose latents a SiT can be trained on.

    python -m train.emoji.build --size 128 --no-skin-tones --out runs/emoji-128.zip
    python -m train.vae --data runs/emoji-128.zip --out runs/vae --minutes 25
    python -m train.vae --resume runs/vae
    python -m train.encode --data runs/emoji-128.zip --vae runs/vae/vae --image-size 128 --variants 8 --out runs/latents

Every random draw is a function of the seed and the step, so with --steps a run that was stopped and resumed equals one
that was not. SIGTERM and Ctrl+C save and end it with exit status 0; --resume RUN continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli
from train.loop.record import command_of
from train.recipe.files import add_run_arguments, find_run, read_config


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Any]:
    """Command line -> options of the program, and the configuration of the run."""
    from train.autoencoder.config import VaeConfig

    parser = cli.Parser("train.vae", __doc__)
    add_run_arguments(parser, "runs/vae")
    parser.add_argument("--threads", type=int, help="CPU threads")
    recipe = parser.add_argument_group("the recipe")
    described = _described(VaeConfig.__doc__ or "")
    for field in dataclasses.fields(VaeConfig):
        default: Any = field.default
        text = f"{described.get(field.name, '')} (default {default!r})".replace("%", "%%")
        many: dict[str, Any] = {"type": int, "nargs": 3} if isinstance(default, tuple) else {"type": type(default)}
        recipe.add_argument("--" + field.name.replace("_", "-"), default=None, help=text, **many)
    options = parser.parse_args(argv)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(VaeConfig)}
    overrides: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    for name, other in (("minutes", "steps"), ("steps", "minutes")):
        if overrides.get(name):
            overrides.setdefault(other, 0)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    options.command = command_of("train.vae", argv)
    try:
        options.out = find_run(options.resume, options.out, Path("runs/vae"))
        saved = options.out / "config.json"
        base = read_config(saved, VaeConfig()) if options.resume and saved.is_file() else VaeConfig()
        return options, dataclasses.replace(base, **overrides)
    except ValueError as error:
        parser.error(str(error))


def _described(text: str) -> dict[str, str]:
    """Field -> what it is, from the docstring of the configuration."""
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", text.partition("Attributes:")[2], flags=re.MULTILINE)
    return {name: " ".join(words.split()).rstrip(".") for name, words in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options, config = parse_arguments(argv)
    try:
        return train(options, config)
    except (ValueError, OSError) as error:
        print(f"train.vae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def train(options: argparse.Namespace, config: Any) -> int:
    """Run the training; returns the exit status."""
    import torch

    from pipelines.cli.signals import StopOnSignal
    from train.autoencoder.images import read_images
    from train.autoencoder.run import start
    from train.loop.checkpoint import list_checkpoints

    if options.threads:
        torch.set_num_threads(options.threads)
    found = list_checkpoints(options.out / "checkpoints")
    if found and not options.resume:
        raise ValueError(
            f"{options.out} already holds a run; --resume {options.out} continues it; or pass another --out"
        )
    run = start(config, read_images(config.data, config.image_size), options.out, options.command)
    if options.resume:
        where = f"resuming from {found[-1]}" if found else f"no checkpoint in {options.out}, starting from scratch"
        print(f"train.vae: {where}", file=sys.stderr)
    with StopOnSignal() as stop:
        _loop(run, stop)
    return 1 if run.lost else 0


def _loop(run: Any, stop: Any) -> None:
    """Step until the end, or until asked to stop."""
    from tqdm import tqdm

    config, saved = run.config, run.step
    shown = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, initial=run.progress, bar_format=shown, disable=not sys.stderr.isatty()) as bar:
        while not run.is_done and not stop.requested:
            loss = run.train_step()
            bar.set_postfix(step=run.step, loss=f"{loss:.3f}", refresh=False)
            bar.update(run.progress - bar.n)
            if run.step % config.log_every == 0:
                run.log()
            if run.step % config.save_every == 0:
                run.save()
                saved = run.step
            if run.step % config.eval_every == 0:
                bar.set_postfix(step=run.step, psnr=run.evaluate(config.eval_images)["psnr"])
    if saved != run.step:
        run.save()
    if not run.is_done:
        print(f"stopped after step {run.step}; --resume {run.out} continues", file=sys.stderr)
        return
    run.export()


if __name__ == "__main__":
    sys.exit(main())
