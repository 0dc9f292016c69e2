"""Pictures of texts from any text-to-image model of diffusers, with its attention changed by attngen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.loading import check_text_model
from pipelines.methods.options import UNCHANGED, method_help

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.engine.results import Result
    from pipelines.engine.session import Engine
    from pipelines.engine.settings import Settings

PROGRAM = "pipelines.text2image"
EXAMPLES = """
examples:
  python -m pipelines.text2image "a lighthouse" --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16
  python -m pipelines.text2image "a fox" --model models/sdxl --compare --report
  python -m pipelines.text2image "a fox" --model model.safetensors --config models/sd15 --method plan.json
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw images of texts with a diffusers model.", EXAMPLES)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    cli.add_model_arguments(parser)
    add("--negative-prompt", metavar="TEXT", help="what not to draw")
    add("--steps", type=cli.whole_number(1), help="sampling steps (default: the pipeline's)")
    add("--guidance-scale", type=cli.scale_number, metavar="S", help="guidance scale (default: the pipeline's)")
    add(
        "--method",
        default="agent",
        metavar="NAME",
        help=f"attention: {method_help(UNCHANGED)}",
    )
    add("--compare", action="store_true", help="also draw with unchanged attention, and print the seconds of each")
    add("--report", action="store_true", help="print how each layer was patched")
    cli.add_common_arguments(parser)
    options = parser.parse_args(argv)
    if options.method == UNCHANGED and (options.compare or options.report):
        parser.error("--compare and --report need a --method other than none")
    if (options.height is None) != (options.width is None):
        parser.error("--height and --width go together: many pipelines ignore one alone")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: draw(options))


def draw(options: argparse.Namespace) -> None:
    """Draw, write and report what the command line asks for."""
    check_text_model(options.model, options.allow_pickle)
    from pipelines.engine.models import TEXTS
    from pipelines.engine.session import make_engine
    from pipelines.images import save_png

    engine = make_engine(options)
    model = engine.models.get(options.model)
    if model.kind != TEXTS:
        raise cli.UserError(f"{options.model} is a {type(model.pipe).__name__}, which does not draw texts")
    sheet = make_sheet(options)
    path = cli.output_path(options, f"{options.prompts[0]}-{options.seed}")
    drawn: dict[str, Result] = {}
    if options.compare:
        drawn["exact"] = draw_sheet(engine, sheet, None, warm_up=True)
    patch = None if options.method == UNCHANGED else options.method
    drawn[Path(options.method).stem] = result = draw_sheet(engine, sheet, patch, warm_up=options.compare)
    settings = describe(result, options)
    save_png(compose(drawn, options), path, settings)
    report(drawn, path, settings, options)


def report(drawn: Mapping[str, Result], path: Path, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what became of the layers, how long each method took, and where the picture is."""
    seconds = {name: round(result.seconds, 3) for name, result in drawn.items()}
    details: dict[str, Any] = {"settings": settings, "seconds_by_method": seconds}
    layers = [result.report for result in drawn.values()][-1]
    if options.report and layers is not None:
        if options.json:
            details["report"] = layers.to_dict()
        else:
            print(layers)
    if options.compare and not options.json:
        print(", ".join(f"{name}: {result.seconds:.1f} s" for name, result in drawn.items()))
    count = sum(len(result.pictures) for result in drawn.values())
    cli.report_done(options, path, count, sum(seconds.values()), **details)


# The pictures


def make_sheet(options: argparse.Namespace) -> list[Settings]:
    """What to draw: a row of pictures for each prompt, with seeds that go on from row to row."""
    from pipelines.engine.settings import Settings

    return [
        Settings(
            prompt=prompt,
            negative_prompt=options.negative_prompt or "",
            model=options.model,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            height=options.height,
            width=options.width,
            seed=options.seed + row * options.images,
            images=options.images,
        )
        for row, prompt in enumerate(options.prompts)
    ]


def draw_sheet(engine: Engine, sheet: Sequence[Settings], patch: str | None, warm_up: bool) -> Result:
    """All pictures, one at a time.

    Args:
        engine: that draws.
        sheet: what to draw.
        patch: a preset's name, or a file, or None for attention as it is.
        warm_up: whether to draw two steps before, so that no time that is compared pays for first calls.

    Raises:
        UserError: for settings that the pipeline refuses.
        FloatingPointError: if a picture is not finite.
    """
    from pipelines.engine.comparison import WARM_UP_STEPS
    from pipelines.engine.session import progress_bar

    with progress_bar() as tell:
        if warm_up:
            engine.draw([replace(sheet[0], steps=WARM_UP_STEPS, images=1)], tell, patch=patch)
        return engine.draw(sheet, tell, patch=patch)


def compose(drawn: Mapping[str, Result], options: argparse.Namespace) -> Image.Image:
    """One picture as it is; several in rows of a prompt, or beside the unchanged ones."""
    from pipelines.images import grid

    if options.compare:
        columns = [result.pictures for result in drawn.values()]
        labels = [prompt for prompt in options.prompts for _ in range(options.images)]
        groups = [(f"{name}, {result.seconds:.1f} s", 1) for name, result in drawn.items()]
        return grid(list(zip(*columns, strict=True)), row_labels=labels, groups=groups)
    (result,) = drawn.values()
    pictures = result.pictures
    if len(pictures) == 1:
        return pictures[0]
    rows = [pictures[i : i + options.images] for i in range(0, len(pictures), options.images)]
    return grid(rows, row_labels=options.prompts)


def describe(result: Result, options: argparse.Namespace) -> dict[str, Any]:
    """What is written into the file: enough to draw it again."""
    first = result.file_settings[0]
    settings = {
        "program": PROGRAM,
        "prompt": " | ".join(options.prompts),
        "prompts": options.prompts,
        "negative_prompt": options.negative_prompt,
        "images": options.images,
        "seed": options.seed,
        "steps": first["steps"],
        "sampler": first["sampler"],
        "guidance_scale": first.get("guidance_scale"),
        "method": options.method,
        "size": first["size"],
        "model": first["model"],
        "revision": options.revision,
        "model_hash": first.get("model_hash"),
    }
    return {name: value for name, value in settings.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
