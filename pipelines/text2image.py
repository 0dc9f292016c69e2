"""Pictures of texts from any text-to-image model of diffusers, with its attention changed by attngen."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    import torch
    from PIL import Image

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
    add("--method", default="agent", metavar="NAME", help="a name in attngen.METHODS, a plan file, or none")
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
    from pipelines.images import save_png

    check_model(options)
    check_packages()
    device = cli.prepare_device(options)
    pipe = load_pipeline(options, device)
    arguments = call_arguments(pipe, options)
    path = cli.output_path(options, f"{options.prompts[0]}-{options.seed}")

    drawn: dict[str, tuple[list[Image.Image], float]] = {}
    if options.compare:
        warm_up(pipe, arguments, options)
        drawn["exact"] = cli.timed(device, lambda: draw_pictures(pipe, arguments, options))
    patch = None
    if options.method != UNCHANGED:
        patch = cli.apply_method(pipe, options.method)
    if options.compare:
        warm_up(pipe, arguments, options)
    name = Path(options.method).stem
    drawn[name] = cli.timed(device, lambda: draw_pictures(pipe, arguments, options))

    settings = describe(pipe, options, drawn[name][0][0])
    save_png(compose(drawn, options), path, settings)
    seconds = {name: round(took, 3) for name, (_, took) in drawn.items()}
    details: dict[str, Any] = {"settings": settings, "seconds_by_method": seconds}
    if options.report and patch is not None:
        if options.json:
            details["report"] = patch.report().to_dict()
        else:
            print(patch.report())
    if options.compare and not options.json:
        print(", ".join(f"{name}: {took:.1f} s" for name, (_, took) in drawn.items()))
    cli.report_done(options, path, sum(len(p) for p, _ in drawn.values()), sum(seconds.values()), **details)


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


def call_arguments(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What of the command line goes to the pipeline; what was not given is left to it.

    Raises:
        UserError: for something that the pipeline does not take.
    """
    given = {
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    taken = inspect.signature(pipe.__call__).parameters
    for name in arguments:
        if name not in taken:
            raise cli.UserError(f"{type(pipe).__name__} takes no {name}; leave it out")
    return arguments


def draw_pictures(pipe: Any, arguments: dict[str, Any], options: argparse.Namespace) -> list[Image.Image]:
    """`--images` pictures of each prompt, one at a time; picture k has seed + k.

    Raises:
        UserError: for arguments that the pipeline refuses.
        FloatingPointError: if a picture is not finite.
    """
    import numpy as np
    import torch

    pictures = []
    for prompt in options.prompts:
        for _ in range(options.images):
            generator = torch.Generator().manual_seed(options.seed + len(pictures))
            try:
                image = pipe(prompt=prompt, generator=generator, output_type="np", **arguments).images
            except ValueError as error:
                raise cli.UserError(cli.first_line(error)) from error
            if not np.isfinite(image).all():
                raise FloatingPointError(
                    f"the picture of {prompt!r} is not finite; try --dtype float32 or bfloat16, or --method none"
                )
            pictures += pipe.numpy_to_pil(image)
    return pictures


def warm_up(pipe: Any, arguments: dict[str, Any], options: argparse.Namespace) -> None:
    """A short run, so that neither of the times compared pays for first calls."""
    short = argparse.Namespace(**{**vars(options), "prompts": options.prompts[:1], "images": 1})
    pipe.set_progress_bar_config(disable=True)
    draw_pictures(pipe, {**arguments, "num_inference_steps": 2}, short)
    cli.show_progress(pipe)


def compose(drawn: dict[str, tuple[list[Image.Image], float]], options: argparse.Namespace) -> Image.Image:
    """One picture as it is; several in rows of a prompt, or beside the unchanged ones."""
    from pipelines.images import grid

    if options.compare:
        columns = [pictures for pictures, _ in drawn.values()]
        labels = [prompt for prompt in options.prompts for _ in range(options.images)]
        groups = [(f"{name}, {seconds:.1f} s", 1) for name, (_, seconds) in drawn.items()]
        return grid(list(zip(*columns, strict=True)), row_labels=labels, groups=groups)
    ((pictures, _),) = drawn.values()
    if len(pictures) == 1:
        return pictures[0]
    rows = [pictures[i : i + options.images] for i in range(0, len(pictures), options.images)]
    return grid(rows, row_labels=options.prompts)


def describe(pipe: Any, options: argparse.Namespace, picture: Image.Image) -> dict[str, Any]:
    """What is written into the file: enough to draw it again."""
    from pipelines.images import model_hash

    settings = {
        "program": PROGRAM,
        "prompt": " | ".join(options.prompts),
        "prompts": options.prompts,
        "negative_prompt": options.negative_prompt,
        "images": options.images,
        "seed": options.seed,
        "steps": options.steps or getattr(pipe.scheduler, "num_inference_steps", None),
        "sampler": type(pipe.scheduler).__name__,
        "guidance_scale": getattr(pipe, "guidance_scale", options.guidance_scale),
        "method": options.method,
        "size": f"{picture.width}x{picture.height}",
        "model": cli.public_name(options.model),
        "revision": options.revision,
        "model_hash": model_hash(options.model),
    }
    return {name: value for name, value in settings.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
