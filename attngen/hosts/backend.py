"""Exact attention as the user set it: diffusers' attention backends and context parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor

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
