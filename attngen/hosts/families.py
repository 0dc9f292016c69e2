"""The table of model families: where latents, time and attention kwargs are among the arguments of each model."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
from torch import nn

from attngen.checks import Grid
from attngen.hosts.family import Family, config_of, continuous, data_at_one, discrete, latents, packed, patches
from attngen.hosts.rows import CORE_ROWS, STAYS

_UNET = Family(
    "sample",
    "timestep",
    "cross_attention_kwargs",
    discrete,
    latents,
    spatial_block="Transformer2DModel",
    mask="attention_mask",
)
_DIT = Family("hidden_states", "timestep", "cross_attention_kwargs", discrete, patches)

_SIT = Family("hidden_states", "timestep", "attention_kwargs", data_at_one, patches)
_SIT_WITH_STEPS = replace(_SIT, clock=discrete)  # a DiT in SiT's class

FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _UNET,
    "ControlNetUnionModel": _UNET,
    "UNetControlNetXSModel": _UNET,
    # Videos: each frame is a sample of its own.
    "UNetMotionModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "I2VGenXLUNet": _UNET,
    "SparseControlNetModel": _UNET,
    "Transformer2DModel": _DIT,
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": replace(_DIT, mask="attention_mask"),
    "SD3Transformer2DModel": Family(
        "hidden_states",
        "timestep",
        "joint_attention_kwargs",
        discrete,
        patches,
        text="encoder_hidden_states",
    ),
    "FluxTransformer2DModel": Family(
        "hidden_states",
        "timestep",
        "joint_attention_kwargs",
        continuous,
        packed,
        text="encoder_hidden_states",
        rotary=True,
    ),
    "SiTTransformer2DModel": _SIT,
    **CORE_ROWS,
}


def family_of(model: nn.Module) -> Family | None:
    """The row of a model or of the class it derives from, or None."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            family = FAMILIES[cls.__name__]
            return _SIT_WITH_STEPS if family is _SIT and config_of(model).get("predicts_variance") else family
    return None


_USUAL = ("unet", "transformer", "transformer_2", "controlnet")


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that attngen patches, or the model itself under the name "": name -> module.

    Compiled models are unwrapped; several ControlNets count one by one.

    Raises:
        ValueError: if there is none, naming the denoiser's class, the known ones, and the way out.
    """
    found = {name: model for name, model in drawing_models(target).items() if why_unknown(model) is None}
    if not found:
        raise ValueError(_refusal(target))
    return found


def drawing_models(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that predict noise from latents, known or not: name -> module; a bare model as ""."""
    if isinstance(target, nn.Module):
        return {suffix: model for suffix, model in _unwrapped(target)}
    # Not by `components`, which raises once a component was added by hand.
    names = dict.fromkeys((*getattr(target, "__dict__", {}), *_USUAL))
    found: dict[str, nn.Module] = {}
    for name in names:
        for suffix, model in _unwrapped(getattr(target, name, None)):
            if _draws(model):
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
    if any(cls.__name__ in FAMILIES or cls.__name__ in STAYS for cls in type(model).__mro__):
        return True
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


def why_unknown(model: nn.Module) -> str | None:
    """Why a model that predicts noise stays exact as a whole, and the way out; None for one with a row."""
    if family_of(model) is not None:
        return None
    for cls in type(model).__mro__:
        if cls.__name__ in STAYS:
            return f"{type(model).__name__}: {STAYS[cls.__name__]}"
    return f"{type(model).__name__} has no row in attngen; attngen.register_model describes one"


def _refusal(target: Any) -> str:
    models = drawing_models(target).values()
    reasons = dict.fromkeys(reason for model in models if _draws(model) and (reason := why_unknown(model)))
    if not reasons:
        reasons[
            f"{type(target).__name__} has no denoiser with a row in attngen; attngen.register_model describes one"
        ] = None
    return (
        f"{'; '.join(reasons)}; {len(FAMILIES)} classes of diffusers have a row, such as UNet2DConditionModel,"
        " FluxTransformer2DModel, QwenImageTransformer2DModel and WanTransformer3DModel, and layers of your own can"
        " call attngen.functional"
    )


def halvings(model: nn.Module, layer: str) -> int:
    """How often the latents were halved before a layer of a UNet, by its name; 0 in models that work on one grid."""
    family = family_of(model)
    if family is None or not has_levels(family):
        return 0
    config = config_of(model)
    deepest = len(config["block_out_channels"]) - 1
    part, _, rest = layer.partition(".")
    if part == "down_blocks":
        level = min(int(rest.split(".")[0]), deepest)
    elif part == "up_blocks":
        level = max(0, deepest - int(rest.split(".")[0]))
    else:
        level = deepest
    switches = config.get("switch_level")  # StableCascade: whether a level has half the sides of the one before
    return level if switches is None else sum(map(bool, switches[:level]))


def has_levels(family: Family) -> bool:
    """Whether layers are on the levels of a UNet, with a grid each."""
    return family.spatial_block is not None or (family.core is not None and family.core.levels)


def halved(grid: Grid, times: int) -> Grid:
    """The grid after strided convolutions that round up, as in diffusers' UNets."""
    *frames, height, width = grid
    return (*frames, -(-height // 2**times), -(-width // 2**times))


def default_grid(model: nn.Module) -> Grid:
    """The grid that the model's configuration was made for: latents of a UNet, tokens of a transformer."""
    config = config_of(model)
    size = config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    family = family_of(model)
    side = 1 if family is None or has_levels(family) else config.get("patch_size") or 1
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
