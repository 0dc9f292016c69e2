"""What sits beside a patched layer, and which attention modules can be patched at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from attngen.checks import Grid
from attngen.kernels.dispatch import AUTO
from attngen.methods.base import AttentionMethod
from attngen.methods.softmax import SoftmaxAttention
from attngen.step import StepInfo

SPEC = "attngen"
"""Attribute of an attention module that holds its `LayerSpec`."""


@dataclass(frozen=True)
class LayerSpec:
    """Beside each patched layer, not in its processor: diffusers makes processors anew without arguments.

    Attributes:
        original: the processor that was there; it computes the layer wherever it is exact.
        methods: one a stage of the plan.
        min_tokens: fewer tokens stay exact.
        level: how many attention resolutions of the model are finer than this layer's.
        max_levels: only layers whose level is below it take part; None for all.
        rotary: whether the layer rotates queries and keys by position.
        kernel: which of attngen's paths computes the methods, see `attngen.kernels.dispatch`.
    """

    original: Any
    methods: tuple[AttentionMethod, ...]
    min_tokens: int = 0
    level: int = 0
    max_levels: int | None = None
    rotary: bool = False
    kernel: str = AUTO

    def why_exact(self, stage: int, grid: Grid, tokens: int) -> str | None:
        """The reason the layer is exact now, in a few words; None where its method runs."""
        method = self.methods[stage]
        if grid[0] * grid[1] != tokens:
            return f"{tokens} tokens do not fill its grid of {grid[0]} x {grid[1]}"
        if isinstance(method, SoftmaxAttention):
            return method.why_exact(grid)
        if self.max_levels is not None and self.level >= self.max_levels:
            return f"not among the {self.max_levels} finest level(s)"
        if tokens < self.min_tokens:
            return f"below {self.min_tokens} tokens"
        if self.rotary and not method.supports_rotary:
            return f"{method.kind} attention does not fit layers with rotary positions"
        return method.why_exact(grid)


def spec_of(attn: nn.Module) -> LayerSpec | None:
    """What a patch put beside a layer, or None."""
    return getattr(attn, SPEC, None)


def active_method(attn: nn.Module, info: StepInfo | None, tokens: int) -> AttentionMethod | None:
    """The method to run now, or None for exact attention.

    Exact wherever the payload does not describe these tokens: merged by another tool, a shard of them, tokens with
    objects among them.
    """
    spec = spec_of(attn)
    if spec is None or info is None or _scores_skipped(attn):
        return None
    stage = int(info.stage)
    return None if spec.why_exact(stage, info.grid, tokens) is not None else spec.methods[stage]


def _scores_skipped(attn: nn.Module) -> bool:
    """Whether a diffusers guider puts the values in place of this layer's attention, which it can if that is exact."""
    registry = getattr(attn, "_diffusers_hook", None)
    if registry is None:
        return False
    return any(isinstance(h, AttentionProcessorSkipHook) and h.skip_attention_scores for h in registry.hooks.values())


def chosen_backend(processor: Any, original: Any) -> AttentionBackendName | None:
    """The attention backend asked for (by model, context manager, environment or xformers), None for torch's own."""
    if processor._attention_backend is not None:
        return processor._attention_backend
    active, _ = _AttentionBackendRegistry.get_active_backend()
    if active != AttentionBackendName.NATIVE:
        return AttentionBackendName(active)
    return AttentionBackendName.XFORMERS if type(original).__name__.startswith("XFormers") else None


# Compared and hashed by identity: a compiler of torch 2.10 hashes what is called before its fields are there.
@dataclass(frozen=True, eq=False)
class BackendAttention:
    """Exact attention over (B, H, N, D) through a diffusers backend; see `attngen.methods.base.Attention`.

    Attributes:
        backend: the one the user chose, or None for torch's own.
        parallel_config: diffusers' context parallelism, or None.
        preferred: attngen's path to take where the user chose neither.
    """

    backend: AttentionBackendName | None
    parallel_config: Any
    preferred: str = AUTO

    @property
    def kernel(self) -> str | None:
        return self.preferred if self.backend is None and self.parallel_config is None else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        if self.kernel is not None:
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
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


def attention_of(processor: Any, original: Any, spec: LayerSpec | None) -> BackendAttention:
    """Exact attention as the user set it for a layer, by its processor and what stands beside it."""
    backend = chosen_backend(processor, original)
    return BackendAttention(backend, processor._parallel_config, AUTO if spec is None else spec.kernel)
