"""Models as the programs use them: loaded once, with what can be asked of them, and a lock, for none is thread-safe."""

from __future__ import annotations

import argparse
import inspect
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import cli
from pipelines.engine.loading import LoadOptions, draws_classes, fetch, load_pipeline
from pipelines.engine.results import Progress
from pipelines.engine.runs import resolve
from pipelines.engine.shipped import shipped_models
from pipelines.engine.turns import POLL_SECONDS, TURNS, Tell
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import MEDIATORS, UNCHANGED

if TYPE_CHECKING:
    import torch

CLASSES, TEXTS = "classes", "texts"
# Steps and guidance where the pipeline's own defaults are meant for large models on a GPU.
CLASS_STEPS, CLASS_GUIDANCE = 25, 2.0
SMALL_NETWORK = 20_000_000  # weights
RETRY_SECONDS = 10  # before a model that could not be loaded is tried again
TEXT_UNIT = 8  # diffusers' pipelines of texts ask for multiples of it, whatever their VAE


@dataclass
class Model:
    """A loaded pipeline.

    Attributes:
        name: as it was asked for.
        path: folder, file or hub id.
        pipe: the pipeline, on its device.
        kind: "classes" or "texts": what it draws.
        device: where it draws.
        labels: names of the classes by number.
        size: (height, width) it was trained on, in pixels; None where that is unknown.
        unit: height and width are multiples of this.
        refused: methods that it cannot be drawn with, and why.
        threads: CPU threads it is drawn with; None to leave them alone.
        hash: tells its weights from others'.
        lock: held while it draws: pipelines and their schedulers keep state.
    """

    name: str
    path: str
    pipe: Any
    kind: str
    device: torch.device
    labels: dict[int, str]
    size: tuple[int, int] | None
    unit: int
    refused: dict[str, str]
    threads: int | None = None
    hash: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def methods(self) -> list[str]:
        """Names of the methods that it can be drawn with."""
        return [name for name in METHODS if name not in self.refused]

    @property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        """Arguments of the pipeline's call."""
        return inspect.signature(self.pipe.__call__).parameters

    @property
    def steps(self) -> int:
        """Usual number of steps."""
        return CLASS_STEPS if self.kind == CLASSES else int(self._default("num_inference_steps") or 50)

    @property
    def guidance_scale(self) -> float:
        """Usual guidance; 1 where the pipeline has none."""
        return 1.0 if self.default_guidance is None else self.default_guidance

    @property
    def default_guidance(self) -> float | None:
        """Usual guidance; None where the pipeline takes none, or decides itself."""
        if "guidance_scale" not in self.takes:
            return None
        usual = CLASS_GUIDANCE if self.kind == CLASSES else self._default("guidance_scale")
        return None if usual is None else float(usual)

    def _default(self, name: str) -> Any:
        parameter = self.takes.get(name)
        return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    def label_of(self, prompt: str) -> int:
        """The number of a class by what was typed: a name if there is one, else a number.

        Raises:
            UserError: if it is no class of the model, naming near ones.
        """
        typed = prompt.strip()
        known = {part.strip().casefold() for name in self.labels.values() for part in name.split(",")}
        if not typed:
            raise cli.UserError("choose a class to draw")
        is_number = typed.lstrip("-").isdigit() and len(typed) < 10 and typed.casefold() not in known
        if is_number and int(typed) in self.labels:
            return int(typed)
        try:
            return self.pipe.get_label_ids([int(typed) if is_number else typed])[0]
        except ValueError as error:
            raise cli.UserError(str(error)) from error

    def label_text(self, label: int) -> str:
        """What `label_of` takes for that class: its name, or its number where it has none of its own."""
        name = self.labels.get(label, "")
        return name if list(self.labels.values()).count(name) == 1 else str(label)


class ModelStore:
    """Loads models when they are first asked for and keeps the last few.

    Args:
        device: to draw on; None for a GPU where there is one.
        dtype: see `pipelines.cli.choose_dtype`.
        threads: CPU threads; None for one with a small network and all cores otherwise.
        allowed: names of models; None for any hub id, folder or file.
        first: names to offer before the others.
        offload: "none", "model" or "sequential".
        allow_pickle: whether to read weights that are not safetensors.
        config: for single files: folder or hub id of a pipeline of their kind.
        revision: of models of the hub: branch, tag or commit.
        variant: of the weights, such as fp16.
        keep: number of loaded models to keep.
    """

    def __init__(
        self,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        allowed: Sequence[str] | None = None,
        first: Sequence[str] = (),
        offload: str = "none",
        allow_pickle: bool = False,
        config: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        keep: int = 3,
    ) -> None:
        self.options = argparse.Namespace(
            device=device,
            dtype=dtype,
            threads=threads,
            offload=offload,
            allow_pickle=allow_pickle,
            config=config,
            revision=revision,
            variant=variant,
        )
        self.allowed = None if allowed is None else list(allowed)
        self.first, self.keep = list(first), keep
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._loading: dict[str, Future[Model]] = {}
        self._failed: dict[str, float] = {}  # name -> when, on the monotonic clock
        self._lock = threading.Lock()  # of these; held for a moment only

    @property
    def names(self) -> list[str]:
        """Models to offer: those allowed, or the first ones, those that ship and those loaded."""
        if self.allowed is not None:
            return list(self.allowed)
        return list(dict.fromkeys([*self.first, *shipped_models(), *self._models]))

    def get(self, name: str, tell: Tell = lambda progress: None, stop: threading.Event | None = None) -> Model:
        """The model, loaded if need be; what is loaded already waits for no other that is being loaded.

        Args:
            name: of the model.
            tell: gets how long loading takes.
            stop: where this is set, waiting ends with `pipelines.engine.calls.Stopped`; loading goes on in a thread.

        Raises:
            UserError: if it is not allowed here, or cannot be one, or lacks what it needs.
            OSError: if it cannot be loaded; for `RETRY_SECONDS` the same error again, without another try.
        """
        self.check(name)
        with self._lock:
            if name in self._models:
                self._models.move_to_end(name)
                return self._models[name]
            if time.monotonic() - self._failed.get(name, -math.inf) > RETRY_SECONDS:
                self._failed.pop(name, None)
            future = self._loading.get(name)
            mine = future is None or (future.done() and name not in self._failed)
            if future is None or mine:
                future = self._loading[name] = Future()
        if mine and stop is None:
            self._load(name, future)
        elif mine:
            threading.Thread(target=self._load, args=(name, future), name="attngen-loader", daemon=True).start()
        return _awaited(name, future, tell, stop)

    def is_loaded(self, name: Any) -> bool:
        """Whether `get` returns the model at once."""
        with self._lock:
            return name in self._models

    def _load(self, name: str, future: Future[Model]) -> None:
        """Load a model for all who wait for it. Downloading takes no turn, building does."""
        try:
            fetch(str(shipped_models().get(name, name)), LoadOptions.of(self.options))
            with TURNS.taken():
                model = load_model(name, self.options)
        except BaseException as error:  # each who waits raises it
            with self._lock:
                self._failed[name] = time.monotonic()
            future.set_exception(error)
            return
        with self._lock:
            self._models[name] = model
            while len(self._models) > self.keep:
                self._models.popitem(last=False)
            del self._loading[name]
        future.set_result(model)

    def check(self, name: str) -> None:
        """Raise UserError unless the name can be that of a model here; nothing is loaded."""
        if self.allowed is not None and name not in self.allowed:
            raise cli.UserError(f"the model {name[:100]!r} is not offered here; there are: {', '.join(self.allowed)}")
        if not name.strip():
            raise cli.UserError("name a model: one that ships, a hub id (owner/name), a folder or a file")

    def forget(self) -> None:
        """Let go of all models that are not drawing."""
        with self._lock:
            for name in [name for name, model in self._models.items() if not model.lock.locked()]:
                del self._models[name]


def _awaited(name: str, future: Future[Model], tell: Tell, stop: threading.Event | None) -> Model:
    from pipelines.engine.calls import Stopped

    start = time.monotonic()
    while not wait([future], POLL_SECONDS).done:
        if stop is not None and stop.is_set():
            raise Stopped
        tell(Progress(f"loading {cli.public_name(name)}, {time.monotonic() - start:.0f} s"))
    return future.result()


def load_model(name: str, options: argparse.Namespace) -> Model:
    """Load a model by name; see `ModelStore.get`.

    Args:
        name: of a model in the package, hub id, folder, single file, RUN or RUN@STEP.
        options: device, threads and what `LoadOptions` has.
    """
    from pipelines.cli.provenance import model_hash

    path = resolve(str(shipped_models().get(name, name)))
    device = cli.prepare_device(options)
    pipe = load_pipeline(path, LoadOptions.of(options), device)
    pipe.set_progress_bar_config(disable=True)
    kind = CLASSES if draws_classes(pipe) else TEXTS
    return Model(
        name=name,
        path=path,
        pipe=pipe,
        kind=kind,
        device=device,
        labels=_labels(pipe) if kind == CLASSES else {},
        size=_trained_size(pipe),
        unit=_unit(pipe),
        refused=_refused_methods(pipe),
        threads=options.threads or _threads(pipe, device),
        hash=model_hash(path),
    )


def _labels(pipe: Any) -> dict[int, str]:
    named = getattr(pipe, "id2label", None)
    if named is None and isinstance(getattr(pipe, "labels", None), dict):  # diffusers' DiT: number by name
        named = {}
        for name, number in pipe.labels.items():
            named[number] = f"{named[number]}, {name}" if number in named else name
    return {int(number): str(name) for number, name in (named or {}).items()}


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)


def _scale_factor(pipe: Any) -> int:
    """Pixels a side of a latent pixel."""
    if getattr(pipe, "vae", None) is None:
        return 1
    return int(getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.block_out_channels) - 1))


def _trained_size(pipe: Any) -> tuple[int, int] | None:
    size = getattr(pipe, "default_sample_size", None) or getattr(_denoiser(pipe).config, "sample_size", None)
    if size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * _scale_factor(pipe), columns * _scale_factor(pipe)


def _unit(pipe: Any) -> int:
    """What height and width are multiples of."""
    config = _denoiser(pipe).config
    takes = inspect.signature(pipe.__call__).parameters
    if "class_labels" in takes:
        levels = len(getattr(config, "block_out_channels", [0]))
        return int(getattr(config, "patch_size", None) or 2 ** (levels - 1)) * _scale_factor(pipe)
    if "use_resolution_binning" in takes:  # drawn at a size of training, whatever is asked for
        return TEXT_UNIT
    packs = hasattr(pipe, "_pack_latents")  # FLUX and its like draw 2 x 2 latent pixels as one token
    return math.lcm(TEXT_UNIT, _scale_factor(pipe) * (2 if packs else int(getattr(config, "patch_size", None) or 1)))


def _refused_methods(pipe: Any) -> dict[str, str]:
    """Methods that the pipeline cannot be drawn with, and why."""
    import attngen

    refused: dict[str, str] = {}
    attention = getattr(_denoiser(pipe).config, "attention", None)
    try:
        attngen.apply(pipe, "softmax").remove()
    except ValueError as error:
        reason = "it already uses mediator attention" if attention == "mediator" else str(error)
        refused |= {name: reason for name in METHODS if name not in (UNCHANGED, MEDIATORS)}
    if attention != "mediator" or "num_mediators" not in inspect.signature(pipe.__call__).parameters:
        refused[MEDIATORS] = "the model has no mediator attention"
    return refused


def _threads(pipe: Any, device: torch.device) -> int | None:
    """One CPU thread for a small network: threads that wait for each other cost it more than they bring.

    On cores that other programs use too, two threads were ten times slower than one.
    """
    small = sum(parameter.numel() for parameter in _denoiser(pipe).parameters()) < SMALL_NETWORK
    return 1 if device.type == "cpu" and small else None
