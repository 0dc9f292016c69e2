"""A plan for a model, found by measuring its layers: python -m pipelines.calibrate --model … --max-error 0.05"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import cli, samplers
from pipelines.engine.loading import CLASS_PIPELINES, check_text_model, class_name, show_progress

PROGRAM = "pipelines.calibrate"
EXAMPLES = """
examples:
  python -m pipelines.calibrate --model models/sdxl --prompt "a lighthouse" --max-error 0.05 --out plan.json
  python -m pipelines.calibrate --model attngen/assets/emoji_unet --labels face heart clock flag --speedup 2 \\
      --cost flops --steps 10 --heat-map map.png
  python -m pipelines.text2image "a fox" --model models/sdxl --method plan.json
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Measure a model's attention layers and choose a method for each.", EXAMPLES)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="prompts of the calibration samples; several are better"
    )
    inputs.add_argument(
        "--labels", nargs="+", metavar="CLASS", help="their classes, for a model of classes: names or numbers"
    )
    add("--max-error", type=cli.scale_number, metavar="E", help="maximum relative error of the result")
    add(
        "--speedup",
        type=cli.scale_number,
        metavar="S",
        help="times that the whole pipeline is to be faster; with --cost flops, fewer operations of attention",
    )
    add(
        "--cost",
        choices=["time", "flops"],
        default="time",
        help="cost to minimise: measured time or counted FLOPs (default time)",
    )
    add(
        "--stages",
        type=cli.whole_number(1),
        metavar="N",
        help="number of stages of the plan, at most 8 (default: one a step up to 8 steps, 3 beyond)",
    )
    add("--steps", type=cli.whole_number(1), help="sampling steps (default: the pipeline's)")
    samplers.add_arguments(parser)
    add("--guidance-scale", type=cli.scale_number, metavar="S", help="guidance scale (default: the pipeline's)")
    add("--height", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")
    add("--width", type=cli.whole_number(1), help="in pixels (default: as the model was trained)")
    add("--seed", type=cli.whole_number(0), default=0, help="seed of the noise (default 0)")
    add("--out", type=json_path, default=Path("plan.json"), help="plan file to write (default plan.json)")
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keeps what was measured: an interrupted calibration goes on, another bound is found sooner",
    )
    add("--heat-map", type=cli.png_path, metavar="FILE", help="heat map of errors by layer and time to write")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: a GPU where there is one)")
    add("--dtype", choices=cli.DTYPES, default="auto", help="number format of the model (default: auto)")
    add("--threads", type=cli.whole_number(1), help="CPU threads (default: all cores; one for a small network)")
    add("--json", action="store_true", help="print what was found as JSON")
    options = parser.parse_args(argv)
    if options.max_error is None and options.speedup is None:
        parser.error("--max-error or --speedup, or both, must be given")
    return options


def json_path(text: str) -> Path:
    """An argument type: a file name that ends in .json."""
    path = Path(text)
    if path.suffix.lower() != ".json":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .json")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: calibrate(options))


def calibrate(options: argparse.Namespace) -> None:
    """Measure, choose, write and report what the command line asks for."""
    check_model(options)
    check_outputs(options)
    pipe = load_pipeline(options)
    pipe.scheduler = samplers.choose_scheduler(pipe, options)
    arguments = call_arguments(pipe, options)
    plan = find_plan(pipe, options, arguments)
    plan.save(options.out)
    if options.heat_map:
        plan.measurements.plot(options.heat_map)
    report(options, plan.measurements)


# Before any work


def check_model(options: argparse.Namespace) -> None:
    """UserError for a model that cannot be there, or inputs of the other kind."""
    folder = Path(options.model)
    classes = class_name(options.model) in CLASS_PIPELINES
    if classes and options.prompt:
        raise cli.UserError(f"{options.model} draws classes, not texts: give --labels instead of --prompt")
    if not classes:
        if options.labels and not folder.is_dir():
            raise cli.UserError(f"there is no folder {options.model}; models of classes are read from folders")
        if options.labels:
            raise cli.UserError(f"{options.model} is not a pipeline of classes: give --prompt, not --labels")
        check_text_model(options.model, options.allow_pickle)


def check_outputs(options: argparse.Namespace) -> None:
    """Raise UserError where the heat map cannot be drawn; make the folders of what is to be written."""
    import importlib.util

    if options.heat_map and importlib.util.find_spec("matplotlib") is None:
        raise cli.UserError("--heat-map needs matplotlib: install it with pip install 'attngen[plot]'")
    for path in filter(None, (options.out, options.heat_map, options.resume)):
        path.parent.mkdir(parents=True, exist_ok=True)


# The pipeline and its arguments


def load_pipeline(options: argparse.Namespace) -> Any:
    """The pipeline, on its device, with as many threads as are good for it."""
    import torch

    from pipelines.engine.session import make_engine

    model = make_engine(options).models.get(options.model)
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    show_progress(model.pipe)
    return model.pipe


def call_arguments(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with; what is not given is left to it."""
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "height": options.height,
        "width": options.width,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    if options.prompt:
        return {"prompt": options.prompt, **arguments}
    return {"class_labels": [int(label) if label.isdigit() else label for label in options.labels], **arguments}


def find_plan(pipe: Any, options: argparse.Namespace, arguments: dict[str, Any]) -> Any:
    """The plan; UserError for what cannot be used, or a bound that cannot be kept."""
    from attngen.calibration import calibrate

    try:
        return calibrate(
            pipe,
            max_error=options.max_error,
            speedup=options.speedup,
            num_stages=options.stages,
            seed=options.seed,
            cost=options.cost,
            resume=options.resume,
            **arguments,
        )
    except ValueError as error:
        raise cli.UserError(str(error)) from error


def report(options: argparse.Namespace, measurements: Any) -> None:
    """Print what was found and where it is."""
    if not options.json:
        print(measurements)
        print(options.out)
        return
    names = ("seconds_exact", "seconds", "speedup", "error", "predicted_error", "attention_speedup", "why_exact")
    found = {name: getattr(measurements, name) for name in (*names, "cost", "bound")}
    files = {"file": str(options.out), "heat_map": str(options.heat_map) if options.heat_map else None}
    print(json.dumps({**files, **found}))


if __name__ == "__main__":
    sys.exit(main())
