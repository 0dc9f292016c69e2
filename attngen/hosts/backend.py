"""Exact attention as the user set it: diffusers' attention backends and context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from attngen.hosts.calls import PRODUCTS
from attngen.layers.layer import FusedAttention


# Compared and hashed by identity: a compiler of torch 2.10 hashes what is called before its fields are there.
@dataclass(frozen=True, eq=False)
class BackendAttention:
    """`attngen.layers.layer.Attention` through diffusers' dispatcher.

    Attributes:
        backend: the one the user chose, or None for torch's own.
        parallel_config: diffusers' context parallelism, or None.
    """

    backend: AttentionBackendName | None
    parallel_config: Any = None

    @property
    def name(self) -> str:
        return self.backend.value if self.backend is not None else "parallel"

    @property
    def kernel(self) -> None:
        """None: the user chose a backend, so none of attngen's kernels runs."""
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        # diffusers' layout is (B, N, H, D).
        mixed = dispatch_attention_fn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=scale,
            backend=self.backend,
            parallel_config=self.parallel_config,
        )
        return mixed.transpose(1, 2)


def attention_of(processor: Any, original: Any, kernel: str) -> FusedAttention | BackendAttention:
    """Exact attention for a layer.

    Args:
        processor: of attngen, on which diffusers sets backends.
        original: the layer's own processor.
        kernel: of attngen, to use where the user chose no backend.
    """
    backend, parallel_config = _chosen_backend(processor, original), processor._parallel_config
    if backend is None and parallel_config is None:
        return FusedAttention(kernel)
    return BackendAttention(backend, parallel_config)


def _chosen_backend(processor: Any, original: Any) -> AttentionBackendName | None:
    """The attention backend that was set (by model, context manager, environment or xformers), None for torch's own."""
    if processor._attention_backend is not None:
        return processor._attention_backend
    active, _ = _AttentionBackendRegistry.get_active_backend()
    if active != AttentionBackendName.NATIVE:
        return AttentionBackendName(active)
    return AttentionBackendName.XFORMERS if type(original).__name__.startswith("XFormers") else None


_TORCHS = frozenset(
    (
        AttentionBackendName.NATIVE,
        AttentionBackendName._NATIVE_CUDNN,
        AttentionBackendName._NATIVE_EFFICIENT,
        AttentionBackendName._NATIVE_FLASH,
        AttentionBackendName._NATIVE_MATH,
    )
)
"""Backends that end in torch's `scaled_dot_product_attention`, where the core host catches them."""


class CaughtBackend:
    """A backend's function in diffusers' registry: products of patched layers go through their route.

    Args:
        name: of the backend.
        function: its own; it computes everything else, and whatever of these products is exact.
    """

    def __init__(self, name: AttentionBackendName, function: Callable[..., Tensor]) -> None:
        self.name, self.function = name, function

    def __call__(self, **given: Any) -> Tensor:
        product = PRODUCTS.now
        return self.function(**given) if product is None else product.dispatched(self, given)


_CAUGHT: WeakSet[nn.Module] = WeakSet()


def catch_backends(model: nn.Module) -> None:
    """Have the products of attention backends that are not torch's caught, for a patched model; done at each call.

    The registry is of the process: while some model is patched, its functions are `CaughtBackend`s.
    """
    _CAUGHT.add(model)
    backends: dict[Any, Any] = _AttentionBackendRegistry._backends
    for name, function in backends.items():
        if name not in _TORCHS and not isinstance(function, CaughtBackend):
            backends[name] = CaughtBackend(name, function)


def release_backends(model: nn.Module) -> None:
    """The end of `catch_backends` for a model; after that of the last one the registry is as it was."""
    _CAUGHT.discard(model)
    backends: dict[Any, Any] = _AttentionBackendRegistry._backends
    for name, function in backends.items() if not _CAUGHT else ():
        if isinstance(function, CaughtBackend):
            backends[name] = function.function
