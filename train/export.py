"""Make a pipeline folder from any checkpoint of a training run, finished or still running.

    python -m train.export runs/emoji                                  # the averaged weights of the newest checkpoint
    python -m train.export runs/emoji@2000 --weights model --dtype bf16 --out models/emoji-2000
    python -m train.export runs/emoji --weights std:0.08               # another average, see --ema-stds of train.sit

The pipeline of a model of latents contains its autoencoder. Programs that draw take RUN or RUN@STEP too, without this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli

PROGRAM = "train.export"
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser(PROGRAM, __doc__ or "", "")
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run of train.sit, or RUN@STEP")
    add("--step", type=cli.whole_number(1), metavar="N", help="step of the checkpoint (default: the newest)")
    add(
        "--weights",
        type=weights_name,
        default="ema",
        metavar="NAME",
        help="ema (the averaged ones, default), model (as trained), or std:X, the average of relative width X",
    )
    add("--dtype", choices=list(DTYPES), default="fp16", help="number format of the weights (default fp16)")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: in RUN/exported)")
    add("--push-to", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub too")
    add("--private", action="store_true", help="make that repository a private one")
    options = parser.parse_args(argv)
    path, at, step = options.run.rpartition("@")
    if at and step.isdigit() and not Path(options.run).exists():
        if options.step not in (None, int(step)):
            parser.error(f"{options.run} and --step {options.step} name two steps")
        options.run, options.step = path, int(step)
    if options.push_to and options.push_to.count("/") != 1:
        parser.error(f"--push-to is OWNER/NAME, got {options.push_to!r}")
    return options


def weights_name(text: str) -> str:
    """An argument type: "ema", "model" or "std:0.1"."""
    kind, _, width = text.partition(":")
    try:
        known = text in ("ema", "model") or (kind == "std" and 0 < float(width) < 12**-0.5)
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is not ema, model or std:X with X between 0 and 0.288")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    folder = export(Path(options.run), options.step, options.weights, options.dtype, options.out)
    print(folder)
    if options.push_to:
        print(push(folder, options.push_to, options.private))


def export(run: Path, step: int | None, weights: str, dtype: str, out: Path | None) -> Path:
    """Write the pipeline; returns its folder.

    Args:
        run: folder of the run.
        step: of the checkpoint, or None for the newest.
        weights: "ema", "model" or "std:X".
        dtype: one of `DTYPES`.
        out: folder to write, or None for one in `run`/exported.

    Raises:
        UserError: if the run has no such checkpoint or averages, or its autoencoder cannot be loaded.
        OSError: if it cannot be written.
    """
    from pipelines.engine.loading import quietly
    from train.loop.preview import write_pipeline

    if not run.is_dir():
        raise cli.UserError(f"there is no run {run}")
    step, pipe = quietly(str(run), lambda: _pipeline(run, step, weights, DTYPES[dtype]))
    folder = out or run / "exported" / f"step-{step:08d}-{weights.replace(':', '-')}-{dtype}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_pipeline(pipe, folder)
    return folder


def _pipeline(run: Path, step: int | None, weights: str, dtype: str) -> tuple[int, Any]:
    """The step that is exported, and its pipeline."""
    import torch

    from pipelines.engine.runs import build_pipeline, checkpoint_of, describe, read_checkpoint

    kind, _, width = weights.partition(":")
    if kind != "std":
        checkpoint = checkpoint_of(run, step)
        return int(checkpoint.name.removeprefix("step-")), read_checkpoint(checkpoint, getattr(torch, dtype), kind)
    from train.loop.averages import reconstruct

    try:
        step, tensors = reconstruct(run, float(width), step)
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    # Averages are kept of every step that was saved, and every checkpoint describes the same pipeline.
    return step, build_pipeline(describe(checkpoint_of(run)), tensors, getattr(torch, dtype))


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a pipeline folder to the hub; returns its address.

    Raises:
        OSError: if the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by train.export"))
    except Exception as error:  # the client has many kinds, of which some are not OSError
        reason = cli.first_line(error)
        raise OSError(f"{folder} is written, and could not be uploaded to {repository}: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
