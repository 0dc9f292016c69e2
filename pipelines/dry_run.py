"""How much memory a large picture needs, found before any work: the networks run on tensors that hold no numbers.

PyTorch's fake tensors have shapes and no content, so a pass through a network takes seconds at any size and allocates
nothing, while every tensor that a real pass would make is seen to come and go.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import attngen
from attngen import Plan, Stage

Size = tuple[int, int]
DENOISERS = ("unet", "transformer")
GIB = 2**30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the device that draws. The networks run one after the other, so the largest counts.

    Attributes:
        weights: of all that lies on the device at once.
        denoiser: most that is alive during one call of the denoiser, inputs counted, weights not.
        encode: the same for the VAE's encoder.
        decode: the same for the VAE's decoder.
    """

    weights: int
    denoiser: int
    encode: int
    decode: int

    @property
    def total(self) -> int:
        """Weights and the most that any network adds. Scratch space of the libraries is not in it."""
        return self.weights + max(self.denoiser, self.encode, self.decode)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class TensorPeak(TorchDispatchMode):
    """Within it `peak` is the most bytes that tensors made in it held at the same time; real and fake ones count alike.

    Tensors that existed before, such as weights, are given as `known` and do not count.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no new storage gets their address
        self._seen: dict[int, Any] = {storage._cdata: None for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self._now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


class DryRun:
    """Empty copies of a pipeline's networks. Made before offloading puts its hooks on them.

    Args:
        pipe: a pipeline with a VAE and a UNet or transformer.

    Raises:
        ValueError: for one without.
    """

    def __init__(self, pipe: Any) -> None:
        self.denoiser_name = next((name for name in DENOISERS if getattr(pipe, name, None) is not None), None)
        if self.denoiser_name is None or getattr(pipe, "vae", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no VAE with a UNet or transformer")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._denoiser = self._empty(getattr(pipe, self.denoiser_name))
        self._vae = self._empty(pipe.vae)
        self._upcasts = hasattr(pipe, "upcast_vae") and bool(getattr(pipe.vae.config, "force_upcast", False))
        self._scale = int(pipe.vae_scale_factor)
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self._weights = {name: _bytes(part) for name, part in modules.items()}
        leaves = [_bytes(leaf) for part in modules.values() for leaf in part.modules() if not list(leaf.children())]
        self._largest_leaf = max(leaves, default=0)

    def enlargement(
        self,
        pipe: Any,
        size: Size,
        method: Any = None,
        tiling: bool = True,
        offload: str = "none",
        arguments: Mapping[str, Any] | None = None,
    ) -> MemoryNeed:
        """What a picture of `size` (height, width in pixels) needs on the device of `pipe`.

        A plan of several stages in time counts with the most hungry one.

        Args:
            pipe: the text-to-image pipeline, on its device; its text encoders run once.
            size: of the picture.
            method: as for `attngen.apply`, or None for unchanged attention.
            tiling: whether the VAE works in tiles.
            offload: "none", "model" or "sequential".
            arguments: for the pipeline, such as prompt and guidance_scale.

        Raises:
            ValueError: for arguments that the pipeline refuses, or a method that does not fit.
        """
        assert self.denoiser_name is not None
        args, kwargs = denoiser_inputs(pipe, self.denoiser_name, size, arguments or {})
        device = next(value.device for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        self._move(self._denoiser, device)
        self._move(self._vae, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real run says it
            return MemoryNeed(
                weights=self._weights_on_device(offload),
                denoiser=self._denoiser_peak(method, args, kwargs),
                encode=self._vae_peak(size, tiling, encode=True),
                decode=self._vae_peak(size, tiling),
            )

    def _empty(self, module: nn.Module) -> Any:
        with FakeCopyMode(self._mode):
            return copy.deepcopy(module).requires_grad_(False).eval()

    def _move(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """`module.to`, which refuses parameters without content."""
        with self._mode:
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        part._parameters[name] = nn.Parameter(value.to(device, dtype), requires_grad=False)
                for name, value in part._buffers.items():
                    if value is not None:
                        part._buffers[name] = value.to(device, dtype if value.is_floating_point() else None)

    def _weights_on_device(self, offload: str) -> int:
        if offload == "none":
            return sum(self._weights.values())
        return max(self._weights.values(), default=0) if offload == "model" else self._largest_leaf

    def _denoiser_peak(self, method: Any, args: Any, kwargs: Any) -> int:
        with self._mode:
            args, kwargs = tree_map(self._empty_like, (args, kwargs))
            if method is None:
                return self._peak(self._denoiser, args, kwargs)
            with attngen.apply(self._denoiser, method) as patch:
                if len(patch.plan.stages) == 1 or patch.learned:
                    return self._peak(self._denoiser, args, kwargs)
            # Which stage is on depends on the time step, a number that empty tensors do not have: each counts.
            return max(self._plan_peak(stage.layers, patch.plan, args, kwargs) for stage in patch.plan.stages)

    def _plan_peak(self, layers: Any, plan: Plan, args: Any, kwargs: Any) -> int:
        """The denoiser with one stage of a plan at all times."""
        only = Plan((Stage(1.0, layers),), plan.min_tokens, plan.max_levels)
        with attngen.apply(self._denoiser, only):
            return self._peak(self._denoiser, args, kwargs)

    def _vae_peak(self, size: Size, tiling: bool, encode: bool = False) -> int:
        vae = self._vae
        vae.use_tiling = tiling
        dtype = torch.float32 if self._upcasts and vae.dtype == torch.float16 else vae.dtype
        with self._mode:
            self._move(vae, vae.device, dtype)
            if encode:
                return self._peak(vae.encode, (torch.empty(1, 3, *size, dtype=dtype, device=vae.device),))
            grid = (side // self._scale for side in size)
            latents = torch.empty(1, vae.config.latent_channels, *grid, dtype=dtype, device=vae.device)
            return self._peak(vae.decode, (latents,))

    def _peak(self, call: Any, args: Any, kwargs: Any = None) -> int:
        known = [tensor for part in (self._denoiser, self._vae) for tensor in (*part.parameters(), *part.buffers())]
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        with torch.no_grad(), TensorPeak(known + inputs) as peak:
            call(*args, **(kwargs or {}))
        return peak.peak + sum(value.untyped_storage().nbytes() for value in inputs)

    def _empty_like(self, value: Any) -> Any:
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value


class _Caught(Exception):
    """Carries the denoiser's arguments out of a pipeline's call."""


def denoiser_inputs(pipe: Any, name: str, size: Size, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the pipeline passes to its denoiser at that size: it is called, and stopped before the denoiser runs."""

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Caught(args, kwargs)

    handle = getattr(pipe, name).register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        pipe(height=size[0], width=size[1], generator=torch.Generator().manual_seed(0), **arguments)
    except _Caught as caught:
        return caught.args
    finally:
        handle.remove()
        pipe.maybe_free_model_hooks()
    raise ValueError(f"{type(pipe).__name__} did not call its {name}")


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or importlib.util.find_spec("psutil") is None:  # accelerate brings it
        return None
    import psutil

    return psutil.virtual_memory().available


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
