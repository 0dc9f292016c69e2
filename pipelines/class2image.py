"""Pictures of chosen classes from a SiT model: python -m pipelines.class2image cat face --out outputs/x.png"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.loading import class_name, is_hub_id, read_index
from pipelines.engine.runs import describe as read_run
from pipelines.engine.runs import is_checkpoint, resolve
from pipelines.engine.shipped import DEFAULT_MODEL, shipped_models
from pipelines.methods.counts import counts_argument
from pipelines.methods.options import MEDIATORS, method_help

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.engine.models import Model
    from pipelines.engine.results import Result
    from pipelines.engine.session import Engine
    from pipelines.engine.settings import Settings

PROGRAM = "pipelines.class2image"
BATCH_SIZE = 16
# Small pictures are shown at least this large, in pixels, unless --scale says otherwise.
SHOWN_SIZE = 128
EXAMPLES = """
examples:
  python -m pipelines.class2image --list
  python -m pipelines.class2image heart face --images 4
  python -m pipelines.class2image flag --mediators 1:4,0.5:16,0.2:25 --seed 7 --out outputs/flag.png
  python -m pipelines.class2image 207 --model runs/imagenet/pipeline --sampler sde --steps 250 --guidance-scale 4
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw images of classes with SiT.", EXAMPLES)
    add = parser.add_argument
    add("labels", nargs="*", metavar="CLASS", help="name or number of a class; --list prints them")
    add("--list", action="store_true", help="print the classes and exit")
    add("--model", help="pipeline folder or hub id (default: the small model in the package)")
    add("--steps", type=cli.whole_number(1), default=25, help="sampling steps (default 25)")
    add(
        "--guidance-scale", type=cli.scale_number, default=2.0, metavar="S", help="guidance scale, 1 is off (default 2)"
    )
    add("--method", metavar="NAME", help=f"attention: {method_help()}")
    add(
        "--mediators",
        type=counts_argument,
        metavar="COUNT",
        help="mediators, for a model that has them: a count, or time:count pairs, 1 is noise (1:4,0.5:16,0.2:64)",
    )
    add("--sampler", choices=["ode", "sde"], help="deterministic or with noise (default: the model's)")
    add("--solver", choices=["euler", "heun"], help="heun evaluates the network twice per step (default: the model's)")
    add("--scale", type=cli.whole_number(1), help="integer upscaling factor (default: until at least 128 px)")
    cli.add_common_arguments(parser)
    options = parser.parse_args(argv)
    if not options.labels and not options.list:
        parser.error("name at least one class; --list prints them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: list_classes(options) if options.list else draw(options))


def list_classes(options: argparse.Namespace) -> None:
    """Print the number and name of each class."""
    for number, name in read_labels(find_model(options.model)).items():
        print(f"{number:4d}  {name}")


def draw(options: argparse.Namespace) -> None:
    """Draw, write and report what the command line asks for."""
    from pipelines.engine.session import make_engine
    from pipelines.images import save_png
    from pipelines.samplers import interpolant_of

    engine = make_engine(options)
    model = engine.models.get(find_model(options.model))
    model.pipe.scheduler = interpolant_of(model.pipe.scheduler, options.sampler, options.solver)
    labels = [model.label_of(typed) for typed in options.labels]
    names = [model.labels.get(label, str(label)) for label in labels]
    path = cli.output_path(options, "-".join(name.split(",")[0] for name in names) + f"-{options.seed}")
    result = draw_rows(engine, make_sheet(model, labels, options), options)
    settings = describe(result, labels, names, options)
    rows = [result.pictures[i : i + options.images] for i in range(0, len(result.pictures), options.images)]
    save_png(compose(rows, names, options.scale), path, settings)
    cli.report_done(options, path, len(result.pictures), result.seconds, settings=settings)


# The model


def find_model(name: str | None) -> str:
    """A pipeline folder, or a hub id as it is.

    Raises:
        UserError: if the folder is no pipeline of SiT.
    """
    if name is None:
        shipped = shipped_models().get(DEFAULT_MODEL)
        if shipped is None:
            raise cli.UserError("this copy of the package came without its model; give one with --model")
        return os.fspath(shipped)
    path = resolve(name)
    if not Path(path).exists():
        if is_hub_id(name):
            return name
        raise cli.UserError(f"there is no folder {name!r}, and it is not a hub id (owner/name)")
    kind = class_name(path)
    if kind != "SiTPipeline":
        raise cli.UserError(f"{name} holds a {kind}, not a SiTPipeline; try python -m pipelines.text2image")
    return path


def read_labels(model: str) -> dict[int, str]:
    """Class name by number; of a local model without loading it.

    Raises:
        UserError: if the model has no names.
    """
    if Path(model).is_dir():
        index = read_run(Path(model)) if is_checkpoint(Path(model)) else read_index(Path(model))
        names = index.get("id2label")
    else:
        from pipelines.engine.models import ModelStore

        names = ModelStore("cpu").get(model).labels
    if not names:
        raise cli.UserError(f"{model} has no class names; give class numbers")
    try:
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise cli.UserError(f"{model} has damaged class names: {error}") from error


# The pictures


def make_sheet(model: Model, labels: Sequence[int], options: argparse.Namespace) -> list[Settings]:
    """What to draw: a row of pictures for each label, with seeds that go on from row to row."""
    from pipelines.engine.settings import Settings

    height, width = options.height, options.width
    if height or width:  # either alone goes with the trained size of the other
        trained = model.size or (None, None)
        height, width = height or trained[0], width or trained[1]
    use = {}
    if options.mediators is not None:
        use = {"method": MEDIATORS, "options": {"mediators": options.mediators}}
    return [
        Settings(
            prompt=model.label_text(label),
            model=model.name,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            height=height,
            width=width,
            seed=options.seed + row * options.images,
            images=options.images,
            **use,
        )
        for row, label in enumerate(labels)
    ]


def draw_rows(engine: Engine, sheet: Sequence[Settings], options: argparse.Namespace) -> Result:
    """The pictures of all rows."""
    from pipelines.engine.session import progress_bar

    with progress_bar() as tell:
        return engine.draw(sheet, tell, batch=BATCH_SIZE, patch=options.method)


def compose(rows: Sequence[Sequence[Image.Image]], names: Sequence[str], scale: int | None) -> Image.Image:
    """One picture as it is; several in a grid with the names of the classes."""
    from pipelines.images import enlarge, grid

    first = rows[0][0]
    scale = scale or -(-SHOWN_SIZE // min(first.size))
    if len(rows) == len(rows[0]) == 1:
        return enlarge(first, scale)
    return grid(rows, row_labels=names, scale=scale)


def describe(
    result: Result, labels: Sequence[int], names: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """What is written into the file: enough to draw it again."""
    first, mediators = result.file_settings[0], options.mediators
    if mediators is not None and ":" not in mediators:
        mediators = int(mediators)
    settings = {
        "program": PROGRAM,
        "prompt": ", ".join(names),
        "labels": list(labels),
        "images": options.images,
        "seed": options.seed,
        "steps": options.steps,
        "sampler": first["sampler"],
        "guidance_scale": options.guidance_scale,
        "mediators": mediators,
        "method": options.method,
        "size": first["size"],
        "model": first["model"],
        "model_hash": first["model_hash"],
    }
    return {name: value for name, value in settings.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
