"""Pictures of chosen classes from a SiT model: python -m pipelines.class2image cat face --out outputs/x.png"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.schedules import counts_argument

if TYPE_CHECKING:
    from PIL import Image

    from attngen.models.sit_pipeline import SiTPipeline

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
    parser = cli.Parser(PROGRAM, "Draw pictures of classes with SiT.", EXAMPLES)
    add = parser.add_argument
    add("labels", nargs="*", metavar="CLASS", help="name or number of a class; --list prints them")
    add("--list", action="store_true", help="print the classes and stop")
    add("--model", help="pipeline folder or hub id (default: the small model in the package)")
    add("--steps", type=cli.whole_number(1), default=25, help="sampling steps (default 25)")
    add("--guidance-scale", type=cli.scale_number, default=2.0, metavar="S", help="1 is none (default 2)")
    add("--method", metavar="NAME", help="attention method: a name in attngen.METHODS, or a plan file (.json)")
    add(
        "--mediators",
        type=counts_argument,
        metavar="COUNT",
        help="mediators for a model that has them: a count, or time:count pairs, 1 is noise (1:4,0.5:16,0.2:64)",
    )
    add("--sampler", choices=["ode", "sde"], help="deterministic or with noise (default: the model's)")
    add("--solver", choices=["euler", "heun"], help="heun calls the network twice a step (default: the model's)")
    add("--scale", type=cli.whole_number(1), help="enlarge the pictures so many times (default: small ones)")
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
    from pipelines.images import save_png

    model = find_model(options.model)
    device = cli.prepare_device(options)
    pipe = load_pipeline(model, options, device)
    labels = resolve_labels(pipe, options.labels)
    mediators = find_mediators(pipe, options)
    names = [class_name(pipe, label) for label in labels]
    path = cli.output_path(options, "-".join(name.split(",")[0] for name in names) + f"-{options.seed}")
    if options.method:
        cli.apply_method(pipe, options.method)
    rows, seconds = cli.timed(device, lambda: draw_rows(pipe, labels, mediators, options))
    settings = describe(pipe, model, labels, options, rows[0][0])
    save_png(compose(rows, names, options.scale), path, settings)
    cli.report_done(options, path, sum(len(row) for row in rows), seconds, settings=settings)


# The model


def find_model(name: str | None) -> str:
    """A pipeline folder, or a hub id as it is.

    Raises:
        UserError: if the folder is no pipeline of SiT.
    """
    folder = shipped_model() if name is None else Path(name)
    if name is None and not folder.is_dir():
        raise cli.UserError("this copy of the package came without its model; give one with --model")
    if name is not None and not folder.exists():
        if cli.is_hub_id(name):
            return name
        raise cli.UserError(f"there is no folder {name!r}, and it is no hub id (owner/name)")
    kind = cli.read_index(folder).get("_class_name")
    if kind != "SiTPipeline":
        raise cli.UserError(f"{folder} holds a {kind}, not a SiTPipeline; try python -m pipelines.text2image")
    return os.fspath(folder)


def shipped_model() -> Path:
    """The folder of the model in the package, found without importing the package."""
    spec = importlib.util.find_spec("attngen")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "assets" / "emoji"


def read_labels(model: str) -> dict[int, str]:
    """Class name by number; of a local model without loading it.

    Raises:
        UserError: if the model has no names.
    """
    if Path(model).is_dir():
        names = cli.read_index(Path(model)).get("id2label")
    else:
        names = load_pipeline(model).id2label
    if not names:
        raise cli.UserError(f"{model} has no names of classes; give their numbers")
    try:
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise cli.UserError(f"{model} has damaged names of classes: {error}") from error


def load_pipeline(model: str, options: argparse.Namespace | None = None, device: Any = "cpu") -> SiTPipeline:
    """The pipeline, on its device, with the scheduler that the command line asks for."""
    import torch

    from attngen.models.sit_pipeline import SiTPipeline

    dtype = cli.choose_dtype(options.dtype, device) if options else torch.float32
    pipe = cli.load(model, lambda: SiTPipeline.from_pretrained(model, dtype=dtype))
    if options is not None:
        pipe.scheduler = choose_scheduler(pipe.scheduler, options)
    cli.show_progress(pipe)
    if options is not None and options.threads is None and str(device) == "cpu":
        cli.limit_threads(pipe.transformer)
    return pipe.to(device)


def choose_scheduler(scheduler: Any, options: argparse.Namespace) -> Any:
    """The model's scheduler, or one with the sampler and solver of the command line."""
    from attngen.schedulers.interpolant import InterpolantScheduler

    if options.sampler is None and options.solver is None:
        return scheduler
    saved = dict(scheduler.config) if isinstance(scheduler, InterpolantScheduler) else {"sampler": "ode"}
    sampler = options.sampler or saved["sampler"]
    default = saved.get("solver") if sampler == saved["sampler"] else None
    solver = options.solver or default or ("heun" if sampler == "ode" else "euler")
    return InterpolantScheduler.from_config(saved, sampler=sampler, solver=solver)


# The pictures


def resolve_labels(pipe: SiTPipeline, labels: Sequence[str]) -> list[int]:
    """Class numbers of what was typed: a name if there is one, else a number."""
    known = {part.strip().casefold() for name in (pipe.id2label or {}).values() for part in name.split(",")}
    typed = [int(x) if x.lstrip("-").isdigit() and x.casefold() not in known else x for x in labels]
    try:
        return pipe.get_label_ids(typed)
    except ValueError as error:
        raise cli.UserError(str(error)) from error


def class_name(pipe: SiTPipeline, label: int) -> str:
    return (pipe.id2label or {}).get(label, str(label))


def find_mediators(pipe: SiTPipeline, options: argparse.Namespace) -> Any:
    """A count or a schedule, which fits the model and the size; None where none was asked for."""
    from pipelines.mediators import check_mediators, make_mediators

    if options.mediators is None:
        return None
    mediators = make_mediators(options.mediators)
    check_mediators(pipe, mediators, options.height, options.width)
    return mediators


def draw_rows(
    pipe: SiTPipeline, labels: Sequence[int], mediators: Any, options: argparse.Namespace
) -> list[list[Image.Image]]:
    """A row of pictures for each label; picture k has its own generator, of seed + k."""
    import torch

    wanted = [label for label in labels for _ in range(options.images)]
    images: list[Image.Image] = []
    try:
        for start in range(0, len(wanted), BATCH_SIZE):
            part = wanted[start : start + BATCH_SIZE]
            seeds = range(options.seed + start, options.seed + start + len(part))
            (pictures,) = pipe(
                part,
                height=options.height,
                width=options.width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                num_mediators=mediators,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                return_dict=False,
            )
            images += pictures
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    return [images[i : i + options.images] for i in range(0, len(images), options.images)]


def compose(rows: Sequence[Sequence[Image.Image]], names: Sequence[str], scale: int | None) -> Image.Image:
    """One picture as it is; several in a grid with the names of the classes."""
    from pipelines.images import enlarge, grid

    first = rows[0][0]
    scale = scale or -(-SHOWN_SIZE // min(first.size))
    if len(rows) == len(rows[0]) == 1:
        return enlarge(first, scale)
    return grid(rows, row_labels=names, scale=scale)


def describe(
    pipe: SiTPipeline, model: str, labels: Sequence[int], options: argparse.Namespace, picture: Image.Image
) -> dict[str, Any]:
    """What is written into the file: enough to draw it again."""
    from pipelines.images import model_hash

    config = pipe.scheduler.config
    sampler = [config.get("sampler"), config.get("solver")]
    mediators = options.mediators
    if mediators is not None and ":" not in mediators:
        mediators = int(mediators)
    settings = {
        "program": PROGRAM,
        "prompt": ", ".join(class_name(pipe, label) for label in labels),
        "labels": list(labels),
        "images": options.images,
        "seed": options.seed,
        "steps": options.steps,
        "sampler": " ".join(part for part in sampler if part) or type(pipe.scheduler).__name__,
        "guidance_scale": options.guidance_scale,
        "mediators": mediators,
        "method": options.method,
        "size": f"{picture.width}x{picture.height}",
        "model": cli.public_name(model),
        "model_hash": model_hash(model),
    }
    return {name: value for name, value in settings.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
