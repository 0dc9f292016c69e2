"""Loading pipelines from a folder, a single file or the Hugging Face hub; every program loads by these functions."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipelines.cli import UserError, choose_dtype, first_line
from pipelines.engine.runs import describe, is_checkpoint, pipeline_name, read_checkpoint, resolve

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
CLASS_PIPELINES = ("SiTPipeline", "UNetClassPipeline")
# Prefix of the model type that diffusers infers from a single file -> its pipeline; the rest are Stable Diffusion 1, 2.
SINGLE_FILE_PIPELINES = {
    "xl_": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: see `pipelines.cli.choose_dtype`.
        offload: "none", "model" or "sequential"; text-to-image models only.
        allow_pickle: whether to read weights that are not safetensors.
        config: for a single file: folder or hub id of a pipeline of its kind.
        revision: branch, tag or commit on the hub.
        variant: of the weights, such as fp16.
    """

    dtype: str = "auto"
    offload: str = "none"
    allow_pickle: bool = False
    config: str | None = None
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def of(cls, options: Any) -> LoadOptions:
        """Those of a program's parsed arguments, as far as it has them."""
        given = vars(options)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


# What a name can be


def check_model(model: str, allow_pickle: bool = False) -> None:
    """Check that a model can be there, before anything heavy is imported.

    Args:
        model: folder, single file, hub id, RUN or RUN@STEP; see `pipelines.engine.runs.resolve`.
        allow_pickle: whether a single file may be other than safetensors.

    Raises:
        UserError: if it is none of these.
    """
    path = Path(resolve(model))
    if is_checkpoint(path):
        describe(path)
    elif path.is_file():
        if path.suffix != ".safetensors" and not allow_pickle:
            raise UserError(f"{path} is not a .safetensors file; --allow-pickle reads others")
    elif path.is_dir():
        read_index(path)
    elif not is_hub_id(model):
        raise UserError(f"there is no file or folder {model[:200]!r}, and it is not a hub id (owner/name)")


def check_text_model(model: str, allow_pickle: bool = False) -> None:
    """As `check_model`, for a model that draws texts; also checks the packages that those need.

    Raises:
        UserError: see there, and for a folder of a pipeline that draws classes.
    """
    check_model(model, allow_pickle)
    if class_name(model) in CLASS_PIPELINES:
        raise UserError(f"{model} draws classes, not texts; try python -m pipelines.class2image")
    check_packages()


def class_name(model: str) -> str:
    """Class of a pipeline folder, from its index; "" for anything else.

    Raises:
        UserError: if the folder has no index, or a damaged one.
    """
    path = Path(resolve(model))
    if is_checkpoint(path):
        return pipeline_name(path)
    return str(read_index(path).get("_class_name", "")) if path.is_dir() else ""


def is_hub_id(name: str) -> bool:
    """Whether a name that is not a file or folder can be one of the hub; if so the hub is made ready."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is None:
        return False
    prepare_hub()
    return True


def prepare_hub() -> None:
    """Without a network use the hub's cache at once; its client would try for half a minute first.

    To be called before anything imports the client, which reads the variable once.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's model_index.json.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a pipeline folder: it has no model_index.json")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise UserError(f"{file} is not a JSON object")
    return index


def pipeline_class(model: str, revision: str | None = None) -> Any:
    """Class of a model's pipeline, attngen's or diffusers', from its index alone; None where neither has it.

    Args:
        model: folder, single file or hub id. A single file has no index.
        revision: branch, tag or commit on the hub.
    """
    model = resolve(model)
    if Path(model).is_file():
        return None
    if is_checkpoint(Path(model)):
        index: Any = {"_class_name": pipeline_name(Path(model))}
    elif Path(model).is_dir():
        index = read_index(Path(model))
    else:
        from diffusers import DiffusionPipeline

        index = quietly(model, lambda: DiffusionPipeline.load_config(model, revision=revision))
    name = index.get("_class_name") if isinstance(index, Mapping) else None
    if not isinstance(name, str):
        return None
    import diffusers

    import attngen

    return getattr(attngen, name, None) or getattr(diffusers, name, None)


def draws_classes(kind: Any) -> bool:
    """Whether a pipeline, or its class, draws class labels."""
    return kind is not None and "class_labels" in inspect.signature(kind.__call__).parameters


def check_packages() -> None:
    """Raise UserError if text-to-image models cannot be loaded here."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"text-to-image needs {' and '.join(missing)}: install them with pip install 'attngen[text2image]'"
        )


# Loading


def fetch(model: str, options: LoadOptions) -> None:
    """Download a repository of the hub into the cache; for a folder or a file nothing.

    Raises:
        OSError: if it cannot be had.
        UserError: if it cannot be a model.
    """
    check_model(model, options.allow_pickle)
    if Path(resolve(model)).exists():
        return
    from diffusers import DiffusionPipeline

    kind = pipeline_class(model, options.revision) or DiffusionPipeline
    use_safetensors = None if options.allow_pickle else True
    arguments = {"revision": options.revision, "variant": options.variant, "use_safetensors": use_safetensors}
    quietly(model, lambda: kind.download(model, **arguments))


def load_pipeline(model: str, options: LoadOptions, device: torch.device) -> Any:
    """The pipeline, on its device.

    Args:
        model: folder, single file, hub id, RUN or RUN@STEP; see `pipelines.engine.runs.resolve`.
        options: how to load it.
        device: where it draws.

    Raises:
        OSError: if it cannot be loaded.
        UserError: if it cannot be a model, does not draw texts or classes, or `offload` is not for this device.
    """
    check_model(model, options.allow_pickle)
    model = resolve(model)
    if is_checkpoint(Path(model)):
        dtype = choose_dtype(options.dtype, device)
        return quietly(model, lambda: read_checkpoint(Path(model), dtype)).to(device)
    kind = pipeline_class(model, options.revision)
    if draws_classes(kind):
        arguments = _folder_arguments(options, choose_dtype(options.dtype, device))
        return quietly(model, lambda: kind.from_pretrained(model, **arguments)).to(device)
    pipe = read_text_pipeline(model, options, device)
    place(pipe, options.offload, device)
    return pipe


def read_text_pipeline(model: str, options: LoadOptions, device: torch.device) -> Any:
    """A pipeline that draws texts, in main memory, in the format for the device. Raises as `load_pipeline`."""
    check_packages()
    if options.offload != "none" and device.type == "cpu":
        raise UserError("--offload needs a GPU to draw on; leave it out")
    dtype = choose_dtype(options.dtype, device)
    _quieten_transformers()
    read = _read_single_file if Path(model).is_file() else _read_folder
    pipe = quietly(model, lambda: read(model, options, dtype))
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{model} is a {type(pipe).__name__}, which does not draw texts")
    return pipe


def place(pipe: Any, offload: str, device: torch.device) -> None:
    """Move a pipeline to its device, or set up its offloading."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def show_progress(pipe: Any) -> None:
    """A progress bar of the steps, on a terminal only."""
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)


def quietly(model: str, read: Callable[[], T]) -> T:
    """What `read` returns, without the libraries' messages on stderr.

    Args:
        model: folder, file or hub id, for the error.
        read: reads it.

    Raises:
        OSError: if it cannot be loaded, in one sentence.
        UserError: as `read` raises it.
    """
    from diffusers.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = read()
            _check_complete(loaded)
            return loaded
    except UserError:
        raise
    except Exception as error:  # damaged files, a missing repository, no network: each raises its own kind
        if Path(model).exists():
            raise OSError(f"cannot load {model}: {first_line(error)}") from error
        raise OSError(
            f"cannot get {model} from the Hugging Face hub: check the name and the network, or give a local folder"
            f" ({type(error).__name__})"
        ) from error
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        logging.enable_progress_bar()


def missing_weights(network: Any) -> list[str]:
    """Names of weights that were not in a network's files; diffusers only logs them, and leaves them without values.

    Args:
        network: what `from_pretrained` returned; anything but a module has none.
    """
    weights = network.named_parameters() if hasattr(network, "named_parameters") else ()
    return [name for name, tensor in weights if tensor.is_meta]


def _check_complete(loaded: Any) -> None:
    """ValueError if a network of a pipeline lacks weights in its files."""
    for name, part in getattr(loaded, "components", {}).items():
        if missing := missing_weights(part):
            raise ValueError(f"weights are missing in the files of its {name}: {', '.join(missing[:3])}")


def _quieten_transformers() -> None:
    """Its advice about optional packages, and its bars where stderr is not a terminal, hide our own messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _folder_arguments(options: LoadOptions, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` gets."""
    return {
        "dtype": dtype,
        "revision": options.revision,
        "variant": options.variant,
        "use_safetensors": None if options.allow_pickle else True,
    }


def _read_folder(model: str, options: LoadOptions, dtype: torch.dtype) -> Any:
    """A folder or a repository of the hub."""
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    arguments = _folder_arguments(options, dtype)
    try:
        return AutoPipelineForText2Image.from_pretrained(model, **arguments)
    except ValueError as error:
        if "can't find a pipeline" not in str(error):
            raise
        # Its list is not complete; the class that the model itself names draws texts, or is refused later.
        return DiffusionPipeline.from_pretrained(model, **arguments)


def _read_single_file(model: str, options: LoadOptions, dtype: torch.dtype) -> Any:
    import diffusers

    kind = getattr(diffusers, single_file_pipeline(model))
    config = {} if options.config is None else {"config": options.config}
    try:
        return kind.from_single_file(model, dtype=dtype, **config)
    except Exception as error:
        if options.config is not None:
            raise
        hint = "without the hub, name a folder with the configuration of such a model by --config"
        raise OSError(f"{first_line(error)}; {hint}") from error


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
