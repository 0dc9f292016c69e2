"""Pictures of texts from any text-to-image model of diffusers, with its attention changed by attngen."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pipelines.engine import Engine
    from pipelines.results import Result
    from pipelines.settings import Settings

PROGRAM = "pipelines.text2image"
UNCHANGED = "none"
OFFLOADS = ("none", "model", "sequential")
EXAMPLES = """
examples:
  python -m pipelines.text2image "a lighthouse" --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16
  python -m pipelines.text2image "a fox" --model models/sdxl --compare --report
  python -m pipelines.text2image "a fox" --model model.safetensors --config models/sd15 --method plan.json
"""
# How the type that diffusers reads off a single file begins -> its pipeline; the rest are Stable Diffusion 1 and 2.
SINGLE_FILE_PIPELINES = {
    "xl_": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Draw pictures of texts with a diffusers model.", EXAMPLES)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    add_model_arguments(parser)
    add("--negative-prompt", metavar="TEXT", help="what not to draw")
    add("--steps", type=cli.whole_number(1), help="sampling steps (default: the pipeline's)")
    add("--guidance-scale", type=cli.scale_number, metavar="S", help="(default: the pipeline's)")
    add("--method", default="agent", metavar="NAME", help="a name in attngen.PRESETS, a plan file, or none")
    add("--compare", action="store_true", help="draw with unchanged attention too, and say how long each took")
    add("--report", action="store_true", help="print what became of each layer")
    cli.add_common_arguments(parser)
    options = parser.parse_args(argv)
    if options.method == UNCHANGED and (options.compare or options.report):
        parser.error("--compare and --report need a --method other than none")
    if (options.height is None) != (options.width is None):
        parser.error("--height and --width go together: many pipelines ignore one alone")
    return options


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which text-to-image model, and where it lies."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, or .safetensors file")
    add("--config", help="for a single file: folder or hub id of a pipeline of its kind (default: from the hub)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="weights' variant, such as fp16")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    add("--offload", choices=OFFLOADS, default="none", help="keep idle parts in main memory")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: draw(options))


def draw(options: argparse.Namespace) -> None:
    """Draw, write and report what the command line asks for."""
    check_model(options)
    check_packages()
    from pipelines.images import save_png
    from pipelines.models import TEXTS
    from pipelines.running import make_engine

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


# The model


def check_packages() -> None:
    """Raise UserError if text-to-image models cannot be loaded here."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise cli.UserError(
            f"text-to-image needs {' and '.join(missing)}: install them with pip install 'attngen[text2image]'"
        )


def check_model(options: argparse.Namespace) -> None:
    """Raise UserError for a model that cannot be one, before anything heavy is imported."""
    model = Path(options.model)
    if model.is_file():
        if model.suffix != ".safetensors" and not options.allow_pickle:
            raise cli.UserError(f"{model} is not a .safetensors file; --allow-pickle reads others")
    elif model.is_dir():
        if cli.read_index(model).get("_class_name") == "SiTPipeline":
            raise cli.UserError(f"{model} draws classes, not texts; try python -m pipelines.class2image")
    elif not cli.is_hub_id(options.model):
        raise cli.UserError(f"there is no file or folder {options.model!r}, and it is no hub id (owner/name)")


def load_pipeline(options: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline, on its device.

    Raises:
        OSError: if it cannot be loaded.
        UserError: if it does not draw texts, or `--offload` is not for this device.
    """
    pipe = read_pipeline(options, device)
    place(pipe, options.offload, device)
    return pipe


def read_pipeline(options: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline in main memory, in the format for the device. Raises as `load_pipeline`."""
    if options.offload != "none" and device.type == "cpu":
        raise cli.UserError("--offload needs a GPU to draw on; leave it out")
    dtype = cli.choose_dtype(options.dtype, device)
    _quieten_transformers()
    read = _read_single_file if Path(options.model).is_file() else _read_folder
    pipe = cli.load(options.model, lambda: read(options, dtype))
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise cli.UserError(f"{options.model} is a {type(pipe).__name__}, which does not draw texts")
    cli.show_progress(pipe)
    return pipe


def place(pipe: Any, offload: str, device: torch.device) -> None:
    """Put a pipeline on its device, or have its parts come there when they are needed."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def _quieten_transformers() -> None:
    """Its advice about optional packages, and its bars where nobody is watching, hide what we have to say."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _read_folder(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A folder or a repository of the hub."""
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    arguments = {
        "dtype": dtype,
        "revision": options.revision,
        "variant": options.variant,
        "use_safetensors": None if options.allow_pickle else True,
    }
    try:
        return AutoPipelineForText2Image.from_pretrained(options.model, **arguments)
    except ValueError as error:
        if "can't find a pipeline" not in str(error):
            raise
        # Its list is not complete; the class that the model itself names draws texts, or is refused later.
        return DiffusionPipeline.from_pretrained(options.model, **arguments)


def _read_single_file(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    import diffusers

    kind = getattr(diffusers, single_file_pipeline(options.model))
    config = {} if options.config is None else {"config": options.config}
    try:
        return kind.from_single_file(options.model, dtype=dtype, **config)
    except Exception as error:
        if options.config is not None:
            raise
        hint = "without the hub, name a folder with the configuration of such a model by --config"
        raise OSError(f"{cli.first_line(error)}; {hint}") from error


def single_file_pipeline(file: str) -> str:
    """Name of the pipeline class for a single file, from the names and shapes of its tensors."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if not file.endswith(".safetensors"):
        return "StableDiffusionPipeline"
    kind = infer_diffusers_model_type(_tensor_shapes(file))
    known = (name for start, name in SINGLE_FILE_PIPELINES.items() if kind.startswith(start))
    return next(known, "StableDiffusionPipeline")


def _tensor_shapes(file: str) -> dict[str, torch.Tensor]:
    """Empty tensors of the shapes in a safetensors file."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}


# The pictures


def make_sheet(options: argparse.Namespace) -> list[Settings]:
    """What to draw: a row of pictures for each prompt, with seeds that go on from row to row."""
    from pipelines.settings import Settings

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
    from pipelines.comparison import WARM_UP_STEPS
    from pipelines.running import progress_bar

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
