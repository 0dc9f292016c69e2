"""Learned layers as a file: weights attached to a model's attention layers, saved and loaded separately from it.

A file is one .safetensors. Its tensors are named LAYER.attngen_core.WEIGHT; its metadata has one entry, "attngen", with
the method, the layers' sizes and the model they were made for, as JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attngen.checks import Grid, check_choice, check_count
from attngen.files import write_file
from attngen.hosts.families import default_grid, halved, halvings
from attngen.hosts.install import attention_modules, learnable_layers
from attngen.layers.layer import CORE, FusedAttention, Layer
from attngen.learned import linfusion
from attngen.learned.methods import LEARNED_METHODS, LearnedMethod
from attngen.learned.modules import HiddenModule, LayerSizes, LearnedCore
from attngen.methods import one_of
from attngen.plan import Plan, Stage
from attngen.version import __version__

FORMAT, VERSION = "attngen-layers", 1
METADATA_KEY = "attngen"
SUFFIX = ".safetensors"

STARTS = ("plain", "agent")
"""Initial values of new mediators: agent attention, or `AgentAttention` with its default scales."""

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class LearnedLayers:
    """Weights of a `LearnedMethod` for some layers of one kind of model: `attngen.apply` takes it as a method.

    `dataclasses.replace(layers, method=...)` changes options that the weights do not depend on, such as
    `num_mediators`.

    Attributes:
        method: the method and its options.
        sizes: layer name -> sizes of the layer.
        tensors: layer name -> name in the layer's `LearnedCore` -> weight.
        model_class: class name of the model they were made for.
        config_hash: of that model's configuration, see `config_hash`; None where it is not known.
        source: the file, for messages.
    """

    method: LearnedMethod
    sizes: Mapping[str, LayerSizes]
    tensors: Mapping[str, Mapping[str, Tensor]]
    model_class: str
    config_hash: str | None = None
    source: str = field(default="these learned layers")

    @classmethod
    def create(cls, model: nn.Module, method: LearnedMethod, *, start: str = "agent", seed: int = 0) -> LearnedLayers:
        """New weights for all self-attention layers of image tokens in which the method is not exact.

        Args:
            model: a bare model; it is not changed.
            method: of the layers.
            start: of mediators: "plain" is agent attention, "agent" `AgentAttention` with its default scales.
            seed: of random weights; the global random state is not used.

        Raises:
            ValueError: if there is no such layer.
        """
        check_choice("start", start, STARTS)
        sizes, tensors = {}, {}
        generator = torch.Generator().manual_seed(seed)
        for name, attn in learnable_layers(model).items():
            grid = halved(default_grid(model), halvings(model, name))
            if method.why_exact(grid) is not None:
                continue
            sizes[name] = sizes_of(attn, grid, method.stored_mediators)
            core = _empty_core(method, sizes[name]).to_empty(device="cpu")
            core.start(start, generator)
            core.copy_projections(Layer(attn, FusedAttention()))
            tensors[name] = core.state_dict()
        if not sizes:
            raise ValueError(
                f"{type(model).__name__} has no layer of image tokens alone that {method.kind} would change at its size"
            )
        return cls(method, sizes, tensors, type(model).__name__, config_hash(model))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LearnedLayers:
        """Read a file that `save` wrote, or the weights of LinFusion with their config.json in the same folder.

        Raises:
            ValueError: naming the file, if it is missing, damaged, or something else.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                if METADATA_KEY not in metadata and linfusion.is_layout(names):
                    found = linfusion.read(path, file)
                    for name, weights in found.tensors.items():
                        check_weights(name, found.method, found.sizes[name], weights)
                    return cls(*found, linfusion.MODEL_CLASS, None, str(path))
                return _read(path, metadata, {name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the learned layers in {path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str], note: Mapping[str, Any] | None = None) -> None:
        """Write the file; an older one of that name stays intact until the new one is complete.

        Args:
            path: to write, ending in .safetensors.
            note: JSON values to keep in the metadata, such as how the weights were trained.

        Raises:
            ValueError: if the name ends otherwise, because `apply` depends on it.
        """
        if not os.fspath(path).endswith(SUFFIX):
            raise ValueError(f"learned layers are saved as {SUFFIX}, got {os.fspath(path)}")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method.to_dict(),
            "layers": {name: sizes._asdict() for name, sizes in self.sizes.items()},
            "model": {"class": self.model_class, "config_hash": self.config_hash},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
            "note": dict(note or {}),
        }
        tensors = {
            f"{layer}.{CORE}.{name}": tensor.detach().cpu().contiguous()
            for layer, weights in self.tensors.items()
            for name, tensor in weights.items()
        }
        write_file(Path(path), save(tensors, {METADATA_KEY: json.dumps(content)}))

    @property
    def plan(self) -> Plan:
        """The method in the layers that have weights, at all times."""
        return Plan((Stage(1.0, dict.fromkeys(self.sizes, self.method)),))

    @property
    def num_weights(self) -> int:
        """Number of parameters in the file."""
        return sum(tensor.numel() for weights in self.tensors.values() for tensor in weights.values())

    def models_of(self, models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of a pipeline's models that the layers were made for.

        Raises:
            ValueError: if there is none, or one of them does not fit, with the differences.
        """
        found = {name: model for name, model in models.items() if self._is_for(model)}
        if not found:
            have = ", ".join(dict.fromkeys(type(model).__name__ for model in models.values()))
            raise ValueError(f"{self.source} was made for a {self.model_class}, and this is a {have}")
        for model in found.values():
            self.check(model)
        return found

    def _is_for(self, model: nn.Module) -> bool:
        return self.model_class in (cls.__name__ for cls in type(model).__mro__)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, with the differences, unless every layer is in the model with the sizes it had."""
        there, learnable = dict(attention_modules(model)), learnable_layers(model)
        wrong: list[str] = []
        for name, sizes in self.sizes.items():
            if name not in there:
                wrong.append(f"it has no layer {name}")
            elif name not in learnable:
                processor = type(there[name].processor).__name__
                wrong.append(f"{name} cannot have learned weights: its processor is {processor}")
            else:
                found = sizes_of(there[name], sizes.grid, sizes.num_mediators)
                wrong += _differences(name, sizes, found, self.method)
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ValueError(f"{self.source} does not fit {type(model).__name__}: {'; '.join(wrong[:_SHOWN])}{more}")

    def other_model(self, model: nn.Module) -> str | None:
        """A warning where the layers fit a model configured differently from the one they were made for, or None."""
        if self.config_hash is None or self.config_hash == config_hash(model):
            return None
        return (
            f"{self.source} was made for a {self.model_class} with another configuration; its layers fit this one, "
            "but they imitate the attention of that one"
        )

    def cores(self, model: nn.Module) -> dict[str, HiddenModule]:
        """New modules with the weights, by layer, on the device and in the dtype of the model's layers."""
        cores = {}
        for name, sizes in self.sizes.items():
            core = _empty_core(self.method, sizes)
            core.load_state_dict({n: t.detach().clone() for n, t in self.tensors[name].items()}, assign=True)
            core.requires_grad_(False)
            device, dtype = _place(model.get_submodule(name), model)
            cores[name] = HiddenModule(core.to(device, dtype))
        return cores

    def with_cores(self, cores: Mapping[str, HiddenModule]) -> LearnedLayers:
        """The same layers with the present weights of `cores`."""
        tensors = {
            name: {n: t.detach().cpu().clone() for n, t in hidden.content.state_dict().items()}
            for name, hidden in cores.items()
        }
        return dataclasses.replace(self, tensors=tensors)


def config_hash(model: nn.Module) -> str:
    """SHA-256 of a model's configuration where it differs from the defaults, without names, versions and size."""
    defaults = {n: p.default for n, p in inspect.signature(type(model).__init__).parameters.items()}
    config: Any = getattr(model, "config", {})
    kept = {
        name: value
        for name, value in dict(config).items()
        if not name.startswith("_") and name not in ("sample_size", "out_channels") and value != defaults.get(name)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> LearnedLayers:
    """Content of a file -> layers; raises ValueError with the reason where it is not that."""
    content = _content(metadata)
    method = one_of(LEARNED_METHODS, content.get("method"))
    sizes = {name: _sizes_from_dict(name, value) for name, value in content["layers"].items()}
    by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
    for key, tensor in tensors.items():
        layer, found, name = key.partition(f".{CORE}.")
        if not found or layer not in sizes:
            raise ValueError(f"the tensor {key} belongs to none of its layers")
        by_layer[layer][name] = tensor
    for name, weights in by_layer.items():
        check_weights(name, method, sizes[name], weights)
    model = content["model"]
    return LearnedLayers(method, sizes, by_layer, model["class"], model.get("config_hash"), str(path))


def _content(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(metadata.get(METADATA_KEY, "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its metadata is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'this holds no learned layers: its metadata has no "format": "{FORMAT}"')
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"version {version!r} of learned layers is not supported; this attngen reads {VERSION}")
    layers, model = content.get("layers"), content.get("model")
    if not isinstance(layers, dict) or not layers or not all(isinstance(v, dict) for v in layers.values()):
        raise ValueError('its metadata has no "layers"')
    if not isinstance(model, dict) or not isinstance(model.get("class"), str):
        raise ValueError('its metadata does not say for what "model" it is')
    return content


def _sizes_from_dict(layer: str, data: Mapping[str, Any]) -> LayerSizes:
    if set(data) != set(LayerSizes._fields):
        raise ValueError(f"the sizes of {layer} are {', '.join(LayerSizes._fields)}, got {', '.join(data)}")
    grid = data["grid"]
    if not isinstance(grid, list) or len(grid) != 2:
        raise ValueError(f"the grid of {layer} must be (height, width), got {grid!r}")
    for name, value in {**data, "grid height": grid[0], "grid width": grid[1]}.items():
        if name in ("qkv_bias", "out_bias"):
            if not isinstance(value, bool):
                raise ValueError(f"{name} of {layer} must be true or false, got {value!r}")
        elif name != "grid":
            check_count(f"{name} of {layer}", value, at_least=0 if name == "num_mediators" else 1)
    if data["width"] % data["num_heads"]:
        raise ValueError(f"{data['num_heads']} heads of {layer} do not divide its width {data['width']}")
    return LayerSizes(**{**data, "grid": (grid[0], grid[1])})


def sizes_of(attn: Any, grid: Grid, num_mediators: int) -> LayerSizes:
    """Sizes of a layer, with learned weights stored for a grid and a number of mediators."""
    layer = Layer(attn, FusedAttention())
    biases = [getattr(module, "bias", None) is not None for module in (attn.to_q, attn.to_out[0])]
    return LayerSizes(layer.channels, layer.width, layer.heads, grid, num_mediators, *biases)


def check_weights(layer: str, method: LearnedMethod, sizes: LayerSizes, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the weights are those of a layer, by name and shape, and finite."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _empty_core(method, sizes).state_dict().items()}
    for name in [*wanted, *weights]:
        if name not in weights:
            raise ValueError(f"the weight {name} of {layer} is missing")
        if name not in wanted:
            raise ValueError(f"{layer} has a weight {name} that {method.kind} does not have")
        tensor = weights[name]
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} of {layer} has shape {tuple(tensor.shape)}, not {wanted[name]}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} of {layer} holds values that are not finite numbers")


def _differences(layer: str, ours: LayerSizes, found: LayerSizes, method: LearnedMethod) -> list[str]:
    names = ["channels", "width", "num_heads"]
    if getattr(method, "own_projections", False):
        names.append("out_bias")
    pairs = [(name, getattr(ours, name), getattr(found, name)) for name in names]
    return [f"{name} of {layer} is {there}, not {wanted}" for name, wanted, there in pairs if wanted != there]


def _empty_core(method: LearnedMethod, sizes: LayerSizes) -> LearnedCore:
    """A core on the meta device: it allocates nothing of the size in a file, and uses no random number."""
    with torch.device("meta"):
        return method.make_core(sizes)


def _place(attn: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the weights of a layer; storage dtypes too narrow to compute in do not count."""
    tensors: Sequence[Tensor] = [*attn.parameters(), *model.parameters()]
    wide = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
    device = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
    return device, next(wide, torch.float32)


def _versions() -> dict[str, str]:
    return {"attngen": __version__, "torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}
