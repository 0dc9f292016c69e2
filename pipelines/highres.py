"""Large pictures in stages: python -m pipelines.highres "a lighthouse" --model models/sdxl --size 4096"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.loading import LoadOptions, check_text_model, place, read_text_pipeline, show_progress
from pipelines.methods.options import UNCHANGED, method_help

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pipelines.dry_run import MemoryNeed
    from pipelines.upscale import LargePicture, StageResult

PROGRAM = "pipelines.highres"
GIB = 2**30
EXAMPLES = """
examples:
  python -m pipelines.highres "a lighthouse" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 2048
  python -m pipelines.highres "a fox" --model models/sdxl --height 2304 --width 4096 --strength 0.3 --max-memory 24
  python -m pipelines.highres "a fox" --model models/sdxl --size 4096 --method plan.json --dry-run
  python -m pipelines.highres "a fox" --model models/sdxl --size 4096 --image outputs/a-fox-0.png
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw a large image: small first, then enlarged and drawn over.", EXAMPLES)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what to draw")
    cli.add_model_arguments(parser)
    add("--size", type=cli.whole_number(1), metavar="SIDE", help="height and width in pixels")
    add("--negative-prompt", metavar="TEXT", help="what not to draw")
    add("--steps", type=cli.whole_number(1), help="steps of the first stage (default: the pipeline's)")
    add("--guidance-scale", type=cli.scale_number, metavar="S", help="guidance scale (default: the pipeline's)")
    add("--strength", type=share, default=0.4, help="fraction of the steps of an enlargement (default 0.4)")
    add(
        "--stages",
        type=cli.whole_number(1),
        metavar="N",
        help="number of enlargements (default: each at most doubles a side)",
    )
    add(
        "--base-size",
        type=cli.whole_number(1),
        metavar="SIDE",
        help="side of the first stage in pixels (default: as trained)",
    )
    add("--image", type=Path, metavar="FILE", help="enlarge this image instead of drawing a small one")
    add(
        "--method",
        default="agent",
        metavar="NAME",
        help=f"when enlarging: {method_help(UNCHANGED)}",
    )
    add("--no-tiling", action="store_true", help="encode and decode in one piece, not in tiles")
    add("--max-memory", type=gibibytes, metavar="GIB", help="end before drawing if the estimate is larger")
    add("--dry-run", action="store_true", help="print the stages and the memory they need, and exit")
    add("--keep-stages", action="store_true", help="write the smaller images too")
    add("--report", action="store_true", help="print how each layer was patched in the last stage")
    cli.add_common_arguments(parser)
    options = parser.parse_args(argv)
    if options.size is not None and (options.height is not None or options.width is not None):
        parser.error("--size sets both sides; leave out --height and --width")
    if options.size is not None:
        options.height = options.width = options.size
    if options.height is None or options.width is None:
        parser.error("--size, or --height and --width, is required")
    if options.image is not None and options.base_size is not None:
        parser.error("--image is the first stage, so it excludes --base-size")
    if options.method == UNCHANGED and options.report:
        parser.error("--report needs a --method other than none")
    return options


def share(text: str) -> float:
    """An argument type: a number above 0 and up to 1."""
    value = cli.scale_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to 1")
    return value


def gibibytes(text: str) -> int:
    """An argument type: GiB, as bytes."""
    value = cli.scale_number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be greater than 0")
    return math.floor(value * GIB)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: draw(options))


@dataclass(frozen=True)
class Job:
    """What is drawn, with what.

    Attributes:
        options: the command line.
        device: where the pipelines draw.
        pipe: draws the first stage.
        enlarger: draws the others.
        picture: what to draw, with the first picture's seed.
        first: the first stage if it is given.
        need: memory of the last stage, the largest; None where it cannot be told.
    """

    options: argparse.Namespace
    device: torch.device
    pipe: Any
    enlarger: Any
    picture: LargePicture
    first: Image.Image | None
    need: MemoryNeed | None


def draw(options: argparse.Namespace) -> None:
    """Draw, write and report what the command line asks for."""
    check_text_model(options.model, options.allow_pickle)
    job = prepare(options)
    announce(job)
    if options.dry_run:
        return
    paths = output_paths(options)
    drawn = [draw_one(job, options.seed + number, path) for number, path in enumerate(paths)]
    report(job, paths, drawn)


# Before the work


def prepare(options: argparse.Namespace) -> Job:
    """Load the model and check everything against it.

    Raises:
        OSError: if it cannot be loaded.
        UserError: for whatever does not fit the model or itself.
    """
    from pipelines.engine.draw import apply_method
    from pipelines.upscale import check_picture, enlarging_pipeline, with_defaults

    first = open_image(options.image) if options.image else None
    device = cli.prepare_device(options)
    pipe = read_text_pipeline(options.model, LoadOptions.of(options), device)
    show_progress(pipe)
    try:
        enlarger = enlarging_pipeline(pipe)
        picture = with_defaults(pipe, plan_picture(pipe, options, first))
        check_picture(pipe, enlarger, picture)
    except ValueError as error:
        raise cli.UserError(cli.first_line(error)) from error
    if picture.method is not None:
        apply_method(enlarger, picture.method).remove()
    need = estimate(pipe, picture, options, device)
    return Job(options, device, pipe, enlarger, picture, first, need)


def open_image(path: Path) -> Image.Image:
    """The picture to go on from; UserError if it is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a damaged file raises many kinds, not all of them OSError
        raise cli.UserError(f"{path} cannot be read as an image: {cli.first_line(error)}") from error


def plan_picture(pipe: Any, options: argparse.Namespace, first: Image.Image | None) -> LargePicture:
    """What the command line asks for; ValueError for sizes that do not fit."""
    from pipelines import upscale

    sizes = upscale.stage_sizes(
        target=(options.height, options.width),
        base=(options.base_size or upscale.trained_side(pipe)) if first is None else (first.height, first.width),
        multiple=upscale.size_multiple(pipe),
        stages=options.stages,
        coarse=upscale.BASE_MULTIPLE * int(pipe.vae_scale_factor),
    )
    return upscale.LargePicture(
        prompt=options.prompt,
        sizes=sizes,
        strength=options.strength,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        method=None if options.method == UNCHANGED else options.method,
        tiling=not options.no_tiling,
        seed=options.seed,
    )


def estimate(pipe: Any, picture: LargePicture, options: argparse.Namespace, device: torch.device) -> MemoryNeed | None:
    """What the last stage needs, None where it cannot be told; the pipeline is on its device afterwards.

    Raises:
        UserError: for arguments that the pipeline refuses, and with `--max-memory` if the need is unknown.
    """
    from pipelines.dry_run import DryRun
    from pipelines.upscale import call_arguments

    dry = DryRun(pipe)
    place(pipe, options.offload, device)
    try:
        return dry.enlargement(
            pipe, picture.sizes[-1], picture.method, picture.tiling, options.offload, call_arguments(picture)
        )
    except ValueError as error:
        raise cli.UserError(cli.first_line(error)) from error
    except Exception as error:  # a layer that PyTorch cannot run without numbers: any kind of error
        reason = f"the memory cannot be estimated: {cli.first_line(error)}"
        if options.max_memory is not None:
            raise cli.UserError(f"{reason}, so --max-memory cannot be kept; leave it out") from error
        warnings.warn(reason, stacklevel=2)
        return None


def announce(job: Job) -> None:
    """Say the stages and the memory, and refuse what is too much, before any work.

    Raises:
        UserError: if more than `--max-memory` is needed.
    """
    from pipelines.upscale import shown

    sizes = [shown(size) for size in job.picture.sizes]
    if job.options.json:
        if job.options.dry_run:
            print(json.dumps({"stages": sizes, "memory": memory_details(job)}))
    else:
        print(" -> ".join(sizes) + memory_text(job.need), flush=True)
    if job.need is not None:
        check_memory(job, job.need)


def memory_text(need: MemoryNeed | None) -> str:
    if need is None:
        return ""
    parts = {"weights": need.weights, "denoiser": need.denoiser, "encoder": need.encode, "decoder": need.decode}
    told = ", ".join(f"{name} {in_gib(size)}" for name, size in parts.items())
    return f"; needs about {in_gib(need.total)} ({told})"


def memory_details(job: Job) -> dict[str, int] | None:
    return None if job.need is None else job.need.to_dict()


def check_memory(job: Job, need: MemoryNeed) -> None:
    """Refuse more than `--max-memory`; warn of more than is free.

    Raises:
        UserError: see above.
    """
    from pipelines.dry_run import available_memory
    from pipelines.upscale import shown

    size, limit = shown(job.picture.sizes[-1]), job.options.max_memory
    way_out = "draw it smaller, or try --dtype, --offload or a --method with fewer agents"
    if limit is not None and need.total > limit:
        raise cli.UserError(
            f"{size} needs about {in_gib(need.total)}, more than the {in_gib(limit)} of --max-memory; {way_out}"
        )
    here = need.total - (need.weights if job.options.offload == "none" else 0)  # those are loaded already
    free = available_memory(job.device)
    if free is not None and here > free:
        warnings.warn(f"{size} needs about {in_gib(here)}, but {in_gib(free)} are free; {way_out}", stacklevel=2)


def in_gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def output_paths(options: argparse.Namespace) -> list[Path]:
    """A file for each picture, named after its seed if there are several."""
    seeds = range(options.seed, options.seed + options.images)
    if options.out is None:
        return [cli.output_path(options, f"{options.prompt}-{seed}") for seed in seeds]
    path = cli.output_path(options, "")
    return [path] if options.images == 1 else [path.with_stem(f"{path.stem}-{seed}") for seed in seeds]


# The work


def draw_one(job: Job, seed: int, path: Path) -> list[StageResult]:
    """Draw one picture and write it, and the smaller ones if they are wanted; its stages."""
    from pipelines import upscale

    picture = replace(job.picture, seed=seed)
    stages = upscale.draw_large(
        job.pipe, picture, image=job.first, enlarger=job.enlarger, before_stage=lambda pipe, i: make_ready(job, pipe, i)
    )
    results = []
    try:
        for result in stages:
            results.append(result)
            is_last = result.index == len(picture.sizes) - 1
            if is_last or job.options.keep_stages:
                stem = path.stem if is_last else f"{path.stem}-{upscale.shown(picture.sizes[result.index])}"
                save(job, picture, result, path.with_stem(stem))
    except ValueError as error:
        raise cli.UserError(cli.first_line(error)) from error
    return results


def make_ready(job: Job, pipe: Any, index: int) -> None:
    """Before a stage: offload from its pipeline, and say on the progress bar which stage it is."""
    from pipelines.upscale import shown

    if job.options.offload != "none":
        place(pipe, job.options.offload, job.device)
    sizes = job.picture.sizes
    name = f"{index + 1} of {len(sizes)}, {shown(sizes[index])}"
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False, desc=name)


def save(job: Job, picture: LargePicture, result: StageResult, path: Path) -> None:
    from pipelines.images import save_png

    save_png(result.image, path, describe(job, picture, result.index))


def describe(job: Job, picture: LargePicture, index: int) -> dict[str, Any]:
    """What is written into a stage's file: enough to draw it again."""
    from pipelines.cli.provenance import model_hash
    from pipelines.upscale import shown

    options = job.options
    settings = {
        "program": PROGRAM,
        "prompt": picture.prompt,
        "negative_prompt": picture.negative_prompt,
        "seed": picture.seed,
        "steps": picture.steps,
        "sampler": type(job.pipe.scheduler).__name__,
        "guidance_scale": picture.guidance_scale,
        "strength": picture.strength,
        "stages": [shown(size) for size in picture.sizes[: index + 1]],
        "image": None if options.image is None else options.image.name,
        "method": picture.method,
        "tiling": picture.tiling,
        "dtype": str(job.pipe.dtype).removeprefix("torch."),
        "size": shown(picture.sizes[index]),
        "model": cli.public_name(options.model),
        "revision": options.revision,
        "model_hash": model_hash(options.model),
    }
    return {name: value for name, value in settings.items() if value is not None}


def report(job: Job, paths: Sequence[Path], drawn: Sequence[Sequence[StageResult]]) -> None:
    """Print where the pictures are, and how long each took; as JSON everything."""
    seconds = [sum(result.seconds for result in results) for results in drawn]
    layers = drawn[-1][-1].report if job.options.report else None
    if job.options.json:
        details = {**job_details(job, paths, drawn), **({} if layers is None else {"report": layers.to_dict()})}
        cli.report_done(job.options, paths[0], len(paths), sum(seconds), **details)
        return
    if layers is not None:
        print(layers)
    for path, took in zip(paths, seconds, strict=True):
        cli.report_done(job.options, path, 1, took)


def job_details(job: Job, paths: Sequence[Path], drawn: Sequence[Sequence[StageResult]]) -> dict[str, Any]:
    """All there is to know, as JSON values."""
    from pipelines.upscale import shown

    stages = [
        {
            "size": shown(job.picture.sizes[result.index]),
            "steps": result.steps,
            "seconds": [round(results[number].seconds, 3) for results in drawn],
            "peak_bytes": max(results[number].peak_bytes or 0 for results in drawn) or None,
        }
        for number, result in enumerate(drawn[0])
    ]
    return {
        "files": [str(path) for path in paths],
        "stages": stages,
        "memory": memory_details(job),
        "settings": describe(job, job.picture, len(job.picture.sizes) - 1),
    }


if __name__ == "__main__":
    sys.exit(main())
