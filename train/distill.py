"""Learn cheap attention for a model that has softmax: python -m train.distill --model FOLDER --out layers.safetensors

The model is its own teacher and does not change. Each layer learns to reproduce the exact layer's output for the exact
layer's input, and all layers together the exact model's prediction. The output file is loaded onto the model by
attngen.apply(pipe, "layers.safetensors").
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.cli import UserError
from train.loop.record import command_of

if TYPE_CHECKING:
    from attngen.learned.methods import LearnedMethod

EXAMPLES = """
examples:
  python -m train.distill --model runs/mine/pipeline --method mediator:16 --data emoji --steps 500 --out m16.safetensors
  python -m train.distill --model stable-diffusion-v1-5/stable-diffusion-v1-5 --method linear --data self \\
      --prompts prompts.txt --steps 5000 --mixed-precision bf16 --out linear.safetensors
methods:
  mediator[:COUNT][,convolution=values|input]   agents with learned biases, scales and convolution (16)
  linear[,feature_map=...][,maps=...][,...]     linear attention with maps of each head; options of LearnedLinear
  linfusion[,reduction=...]                     LinFusion's generalised linear attention
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = cli.Parser("train.distill", __doc__, EXAMPLES)
    saved = _resumed(argv)
    add = parser.add_argument
    add(
        "--model",
        required="model" not in saved,
        help="pipeline folder, hub id, training run (RUN or RUN@STEP), or bare SiT",
    )
    add("--method", default="mediator:16", help="what to learn, see below (default %(default)s)")
    add(
        "--train",
        choices=["mixer", "qkvo"],
        default="mixer",
        help="qkvo: projections of each layer too, a large file",
    )
    add(
        "--start",
        choices=["plain", "agent"],
        default="agent",
        help="initial scales of mediators; agent: those of AgentAttention",
    )
    add("--data", default="self", help="self: the model's own samples; or emoji, images or latents as for train.sit")
    add("--prompts", type=Path, help="file with one prompt per line; for class models one class (name or number)")
    add(
        "--out",
        type=Path,
        required="out" not in saved,
        help="output file, .safetensors; the run's folder has the same name with .run",
    )
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help="continue RUN with the options that it was started with; without a name continue the run of --out",
    )
    add("--max-minutes", type=float, help="save and stop after this time; --resume continues")
    add("--threads", type=int, help="CPU threads")
    add("--cpu", action="store_true", help="do not use a GPU")
    number = parser.add_argument_group("hyper-parameters")
    add = number.add_argument
    add("--steps", type=int, default=1000, help="optimiser steps (default %(default)s)")
    add("--batch-size", type=int, default=4, help="samples per call (default %(default)s)")
    add("--accumulate", type=int, default=1, help="gradient accumulation steps (default %(default)s)")
    add("--learning-rate", type=float, default=3e-2, help="learning rate of AdamW (default %(default)s)")
    add(
        "--projection-rate",
        type=float,
        default=1e-4,
        help="learning rate of the projections of --train qkvo (default %(default)s)",
    )
    add("--warmup-steps", type=int, default=20, help="steps of linear learning rate warm-up (default %(default)s)")
    add(
        "--prediction-weight",
        type=float,
        default=1.0,
        help="weight of the final prediction's error (default %(default)s)",
    )
    add("--sample-steps", type=int, default=20, help="sampling steps of the model's own samples (default %(default)s)")
    add("--guidance-scale", type=float, help="guidance scale of the model's own samples (default: the pipeline's)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: the pipeline's)")
    add("--mixed-precision", choices=["no", "bf16"], default="no")
    add("--gradient-checkpointing", action="store_true", help="activation checkpointing")
    add("--save-every", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    add("--measure", type=int, default=8, help="calls that errors are measured on (default %(default)s)")
    add("--seed", type=int, default=0)
    parser.set_defaults(**saved)
    options = parser.parse_args(argv)
    options.command = command_of("train.distill", argv)
    for name in ("steps", "batch_size", "accumulate", "sample_steps", "save_every", "measure"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    rates = ("learning_rate", "projection_rate", "prediction_weight", "warmup_steps", "seed")
    for name in (*rates, "guidance_scale", "max_minutes"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            parser.error(f"--{name.replace('_', '-')} must be a finite number >= 0, got {value}")
    if options.guidance_scale is not None and not (
        math.isfinite(options.guidance_scale) and options.guidance_scale >= 0
    ):
        parser.error(f"--guidance-scale must be a finite number >= 0, got {options.guidance_scale}")
    if options.size is not None and min(options.size) < 1:
        parser.error(f"--size must be at least 1, got {options.size[0]} {options.size[1]}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if saved and options.out != Path(saved["out"]):
        parser.error(f"--resume {options.resume} and --out {options.out} name two runs")
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out}")
    return options


def _resumed(argv: Sequence[str] | None) -> dict[str, Any]:
    """The options of the run that --resume RUN names; none where there is no such word."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const=True)
    named = parser.parse_known_args(argv)[0].resume
    if not isinstance(named, str):
        return {}
    file = Path(named).with_suffix(".run") / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found["arguments"], "out": str(file.parent.with_suffix(".safetensors"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        cli.Parser("train.distill", None).error(f"there is no run to resume in {file.parent}: {cli.first_line(error)}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return distill(options)
    except (UserError, ValueError, OSError) as error:
        print(f"train.distill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def distill(options: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    import torch

    import attngen
    from attngen.hosts.families import denoisers_of
    from attngen.learned.file import LearnedLayers
    from train.distillation.inputs import Drawing, open_inputs
    from train.distillation.run import RUN_SUFFIX, Run
    from train.loop.checkpoint import list_checkpoints

    if options.threads:
        torch.set_num_threads(options.threads)
    method = parse_method(options.method, options.train == "qkvo")
    found = list_checkpoints(options.out.with_suffix(RUN_SUFFIX) / "checkpoints")
    if (found or options.out.exists()) and not options.resume:
        raise ValueError(
            f"{options.out} or its run already exists; --resume {options.out} continues it; or pass another --out"
        )
    lines = None if options.prompts is None else read_lines(options.prompts)
    pipe = load_pipeline(options.model, options.cpu)
    pipe.set_progress_bar_config(disable=True)
    name, model = next(iter(denoisers_of(pipe).items()))
    model.requires_grad_(False).eval()
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    size = None if options.size is None else (options.size[0], options.size[1])
    drawing = Drawing(
        pipe,
        model,
        choices(pipe, lines),
        batch_size=options.batch_size,
        seed=options.seed,
        steps=options.sample_steps,
        guidance_scale=options.guidance_scale,
        size=size,
    )
    layers = LearnedLayers.create(model, method, start=options.start, seed=options.seed)
    with attngen.apply(model, layers) as patch:
        inputs = open_inputs(options.data, drawing, patch.paused)
        run = Run(options, model, patch, layers, inputs)
        return run.run(found[-1] if found else None)


def parse_method(text: str, own_projections: bool) -> LearnedMethod:
    """The method that a text names, see EXAMPLES.

    Raises:
        ValueError: for an unknown name or option, or a value that it cannot have.
    """
    import dataclasses

    from attngen.learned.methods import LearnedLinear, LearnedMediators

    head, *given = text.split(",")
    name, _, count = head.partition(":")
    options: dict[str, Any] = {"own_projections": own_projections}
    bases: dict[str, LearnedMethod] = {
        "mediator": LearnedMediators(),
        "linear": LearnedLinear(),
        "linfusion": LearnedLinear("elu", "input", 1, convolution=False),
    }
    if name not in bases or (count and name != "mediator"):
        raise ValueError(f"unknown method {head!r}; known: mediator:COUNT, linear, linfusion")
    types = {f.name: type(getattr(bases[name], f.name)) for f in dataclasses.fields(bases[name])}
    for part in [*([f"num_mediators={count}"] if count else []), *given]:
        key, _, value = part.partition("=")
        if key not in types:
            raise ValueError(f"{name} has no option {key!r}; it has {', '.join(types)}")
        options[key] = _parsed(key, value, types[key])
    return dataclasses.replace(bases[name], **options)


def _parsed(key: str, value: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{key} cannot be {value!r}; it is a {kind.__name__}") from error


def choices(pipe: Any, lines: Sequence[str] | None) -> Sequence[Any] | None:
    """What pictures are asked for: prompts, or class numbers, or None for all classes.

    Args:
        pipe: the pipeline.
        lines: of the user's file, or None for a few general prompts or all classes.

    Raises:
        ValueError: for a class that the pipeline does not have.
    """
    from train.distillation.inputs import PROMPTS

    if "prompt" in inspect.signature(pipe.__call__).parameters:
        return lines or PROMPTS
    return None if lines is None else [int(line) if line.isdigit() else pipe.get_label_ids([line])[0] for line in lines]


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: if the file cannot be read or has none.
    """
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def load_pipeline(name: str, cpu: bool) -> Any:
    """A pipeline in full precision by any name of a model; a bare SiT gets one around it.

    Raises:
        ValueError: if there is none, or it is a bare model of another kind.
        UserError: if it cannot be a model.
        OSError: if it cannot be loaded.
    """
    import torch

    import attngen
    from pipelines.engine import loading
    from pipelines.engine.runs import is_checkpoint, resolve

    device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
    folder = Path(resolve(name))
    if folder.is_dir() and not (folder / "model_index.json").is_file() and not is_checkpoint(folder):
        config = _json(folder / "config.json")
        if config.get("_class_name") != "SiTTransformer2DModel":
            kind = config.get("_class_name", "no model")
            raise ValueError(f"{name} holds {kind}, not a pipeline; sampling and conditions need the whole pipeline")
        model = attngen.SiTTransformer2DModel.from_pretrained(folder)
        return attngen.SiTPipeline(model, attngen.InterpolantScheduler(sampler="ode")).to(device)
    return loading.load_pipeline(name, loading.LoadOptions(dtype="float32"), device)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
