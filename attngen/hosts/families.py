"""The table of model families: where each model keeps its latents, its time and its attention kwargs."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.step import Slot


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
    """

    sample: str
    time: str
    channel: str
    clock: Callable[[float], float]
    grid: Callable[[nn.Module, dict[str, Any]], Grid]
    spatial_block: str | None = None
    text: str | None = None
    rotary: bool = False


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


@dataclass
class _PackedGrid:
    """Grid of FLUX's packed tokens, from their position ids; read once a tensor, for reading waits for the GPU."""

    last: tuple[Any, Grid] | None = field(default=None, compare=False)

    def __call__(self, model: nn.Module, arguments: dict[str, Any]) -> Grid:
        ids: Tensor | None = arguments.get("img_ids")
        tokens = int(arguments["hidden_states"].shape[1])
        if ids is None:
            side = math.isqrt(tokens)
            return side, tokens // max(1, side)
        last = self.last
        if last is not None and last[0]() is ids:
            return last[1]
        rows, columns = (ids[..., 1:3].reshape(-1, 2).amax(dim=0) + 1).int().tolist()
        self.last = (weakref.ref(ids), (rows, columns))
        return rows, columns

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackedGrid:
        return _PackedGrid()

    def __reduce__(self) -> tuple[type[_PackedGrid], tuple[()]]:
        return _PackedGrid, ()


_UNET = Family("sample", "timestep", "cross_attention_kwargs", _discrete, _latents, spatial_block="Transformer2DModel")
_DIT = Family("hidden_states", "timestep", "cross_attention_kwargs", _discrete, _patches)

_SIT = Family("hidden_states", "timestep", "attention_kwargs", _data_at_one, _patches)
_SIT_WITH_STEPS = replace(_SIT, clock=_discrete)  # a DiT in SiT's class

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _UNET,
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": _DIT,
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
        _PackedGrid(),
        text="encoder_hidden_states",
        rotary=True,
    ),
    "SiTTransformer2DModel": _SIT,
}

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")
"""Components of a pipeline that draw; the others (text encoders, VAE) are left alone."""


def family_of(model: nn.Module) -> Family | None:
    """The row of a model or of the class it derives from, or None."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            family = FAMILIES[cls.__name__]
            return _SIT_WITH_STEPS if family is _SIT and _config(model).get("predicts_variance") else family
    return None


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that draw, or the model itself under the name "": name -> module.

    Compiled models are unwrapped; several ControlNets count one by one.

    Raises:
        ValueError: if there is none that attngen knows, naming what was given and what is known.
    """
    if isinstance(target, nn.Module):
        candidates = {"": target}
    else:
        candidates = {name: getattr(target, name, None) for name in DENOISERS}
    found: dict[str, nn.Module] = {}
    for name, candidate in candidates.items():
        for suffix, module in _unwrapped(candidate):
            if family_of(module) is not None:
                found[f"{name}{suffix}"] = module
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no denoiser that attngen knows; it patches pipelines with, or bare models of,"
            f" {', '.join(FAMILIES)}"
        )
    return found


def _unwrapped(candidate: Any) -> list[tuple[str, nn.Module]]:
    if not isinstance(candidate, nn.Module):
        return []
    candidate = getattr(candidate, "_orig_mod", candidate)
    if isinstance(candidate, diffusers.MultiControlNetModel):
        return [(f".nets.{i}", net) for i, net in enumerate(candidate.nets)]
    return [("", candidate)]


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


def slot(function: Callable[..., Any], name: str) -> Slot:
    """Where the bound method `function` takes the argument `name`."""
    return Slot(name, list(inspect.signature(function).parameters).index(name))
