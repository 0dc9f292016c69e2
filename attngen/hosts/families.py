"""The table of model families: where each model keeps its latents, its time and its attention kwargs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import diffusers
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attngen.checks import Grid


@dataclass(frozen=True)
class Family:
    """How to read one kind of denoiser.

    Attributes:
        sample: name of the forward argument with the latents.
        time: name of the forward argument with the time step.
        channel: name of the forward argument whose entries reach the attention processors.
        clock: time step -> time in [0, 1], 1 is noise.
        grid: (model, arguments by name) -> (height, width) of the tokens; for a UNet of the latents.
        spatial_block: class name of the modules that turn latents into tokens, one a level, or None where the whole
            model works on one grid.
        text: name of the forward argument with the text tokens, where layers attend to image and text jointly.
        rotary: whether layers rotate queries and keys by position.
        mask: name of the forward argument whose value reaches self-attention as a mask, or None.
    """

    sample: str
    time: str
    channel: str
    clock: Callable[[float], float]
    grid: Callable[[nn.Module, dict[str, Any]], Grid]
    spatial_block: str | None = None
    text: str | None = None
    rotary: bool = False
    mask: str | None = None


def _discrete(timestep: float) -> float:
    return _clamped(timestep / 1000)


def _continuous(timestep: float) -> float:
    return _clamped(timestep)


def _data_at_one(timestep: float) -> float:
    return _clamped(1.0 - timestep)


def _clamped(time: float) -> float:
    if math.isnan(time):
        raise ValueError("the time step is NaN")
    return min(1.0, max(0.0, time))


def _latents(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    height, width = arguments["sample"].shape[-2:]
    return int(height), int(width)


def _config(model: nn.Module) -> Any:
    return model.config


def _patches(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    height, width = arguments["hidden_states"].shape[-2:]
    side = _config(model)["patch_size"]
    return int(height) // side, int(width) // side


def _packed(model: nn.Module, arguments: dict[str, Any]) -> Grid:
    """Grid of FLUX's packed tokens, from the position ids of the image: id 0 is 0 there, and not in references."""
    ids: Tensor | None = arguments.get("img_ids")
    tokens = int(arguments["hidden_states"].shape[1])
    if ids is None:
        side = math.isqrt(tokens)
        return side, tokens // max(1, side)
    # Reading waits for the GPU, so it is done once a tensor.
    known = _GRIDS.get(ids)
    if known is None:
        rows = ids.reshape(-1, ids.shape[-1])
        image = rows[rows[:, 0] == 0]
        size = (image if len(image) else rows)[:, 1:3].amax(dim=0) + 1
        height, width = size.int().tolist()
        known = _GRIDS[ids] = (height, width)
    return known


_GRIDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_UNET = Family(
    "sample",
    "timestep",
    "cross_attention_kwargs",
    _discrete,
    _latents,
    spatial_block="Transformer2DModel",
    mask="attention_mask",
)
_DIT = Family("hidden_states", "timestep", "cross_attention_kwargs", _discrete, _patches)

_SIT = Family("hidden_states", "timestep", "attention_kwargs", _data_at_one, _patches)
_SIT_WITH_STEPS = replace(_SIT, clock=_discrete)  # a DiT in SiT's class

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _UNET,
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": replace(_DIT, mask="attention_mask"),
    "SD3Transformer2DModel": Family(
        "hidden_states",
        "timestep",
        "joint_attention_kwargs",
        _discrete,
        _patches,
        text="encoder_hidden_states",
    ),
    "FluxTransformer2DModel": Family(
        "hidden_states",
        "timestep",
        "joint_attention_kwargs",
        _continuous,
        _packed,
        text="encoder_hidden_states",
        rotary=True,
    ),
    "SiTTransformer2DModel": _SIT,
}


def family_of(model: nn.Module) -> Family | None:
    """The row of a model or of the class it derives from, or None."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            family = FAMILIES[cls.__name__]
            return _SIT_WITH_STEPS if family is _SIT and _config(model).get("predicts_variance") else family
    return None


_USUAL = ("unet", "transformer", "transformer_2", "controlnet")


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that attngen patches, or the model itself under the name "": name -> module.

    Compiled models are unwrapped; several ControlNets count one by one.

    Raises:
        ValueError: if there is none, naming the class that draws, what is known, and the way out.
    """
    found = {name: model for name, model in drawing_models(target).items() if family_of(model) is not None}
    if not found:
        raise ValueError(_refusal(target))
    return found


def drawing_models(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that predict noise from latents, known or not: name -> module; a bare model as ""."""
    if isinstance(target, nn.Module):
        return {suffix: model for suffix, model in _unwrapped(target)}
    # Not by `components`, which raises once somebody has added one.
    names = dict.fromkeys((*getattr(target, "__dict__", {}), *_USUAL))
    found: dict[str, nn.Module] = {}
    for name in names:
        for suffix, model in _unwrapped(getattr(target, name, None)):
            if family_of(model) is not None or _draws(model):
                found[f"{name}{suffix}"] = model
    return found


# Models of diffusers that have attention and predict no noise: decoders, encoders, adapters, safety checkers.
_OTHERS = (
    "Autoencoder",
    "Asymmetric",
    "VQModel",
    "Consistency",
    "Encoder",
    "Connector",
    "Adapter",
    "Upsampler",
    "Prior",
)


def _draws(model: nn.Module) -> bool:
    models = [cls for cls in type(model).__mro__ if issubclass(cls, diffusers.ModelMixin)]
    return (
        bool(models)
        and not any(word in cls.__name__ for cls in models for word in _OTHERS)
        and any(hasattr(module, "set_processor") for module in model.modules())
    )


def _unwrapped(candidate: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(candidate, (list, tuple)):
        return [(f".{i}{s}", model) for i, entry in enumerate(candidate) for s, model in _unwrapped(entry)]
    if not isinstance(candidate, nn.Module):
        return []
    candidate = getattr(candidate, "_orig_mod", candidate)
    # Containers of several ControlNets hold them under this name.
    if isinstance(getattr(candidate, "nets", None), nn.ModuleList):
        return [(f".nets.{i}", net) for i, net in enumerate(candidate.nets)]
    return [("", candidate)]


def why_unknown(model: nn.Module) -> str:
    """Why a model that draws is left exact, and the way out."""
    return f"{type(model).__name__} is not among the models that attngen knows"


def _refusal(target: Any) -> str:
    kind = type(target).__name__
    models = {} if isinstance(target, nn.Module) else drawing_models(target)
    inner = ", ".join(dict.fromkeys(type(model).__name__ for model in models.values()))
    what = (
        f"{kind} draws with {inner}, which attngen does not know"
        if inner
        else f"{kind} has no denoiser that attngen knows"
    )
    return (
        f"{what}; it patches pipelines with, or bare models of, {', '.join(FAMILIES)}; layers of your own can call"
        " attngen.functional"
    )


def halvings(model: nn.Module, layer: str) -> int:
    """How often the latents were halved before a layer of a UNet, by its name; 0 in models that work on one grid."""
    family = family_of(model)
    if family is None or family.spatial_block is None:
        return 0
    deepest = len(_config(model)["block_out_channels"]) - 1
    part, _, rest = layer.partition(".")
    if part == "down_blocks":
        return min(int(rest.split(".")[0]), deepest)
    if part == "up_blocks":
        return max(0, deepest - int(rest.split(".")[0]))
    return deepest


def halved(grid: Grid, times: int) -> Grid:
    """The grid after strided convolutions that round up, as in diffusers' UNets."""
    return -(-grid[0] // 2**times), -(-grid[1] // 2**times)


def default_grid(model: nn.Module) -> Grid:
    """The grid that the model's configuration was made for: latents of a UNet, tokens of a transformer."""
    config = _config(model)
    size = config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    family = family_of(model)
    side = 1 if family is None or family.spatial_block is not None else config.get("patch_size", 1)
    return height // side, width // side


class Slot(NamedTuple):
    """Where an argument of a forward method is: its name, and its position when it is given by position."""

    name: str
    index: int

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument, or None."""
        return args[self.index] if len(args) > self.index else kwargs.get(self.name)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another value for this one."""
        if len(args) > self.index:
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


def slots(module: nn.Module) -> dict[str, Slot]:
    """The arguments of a module's forward method by name, as its class declares them.

    The instance may have a `forward` that another tool put there, which takes anything and passes it on.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {name: Slot(name, index) for index, name in enumerate(names)}
