"""What a patch does at a given size, layer by layer: for reports, and for the warning at a size not seen before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.hosts import hooks
from attngen.hosts.absorb import layer_size, why_direct
from attngen.hosts.families import default_grid, family_of, halved, halvings
from attngen.hosts.image import AttnGenProcessor
from attngen.hosts.layers import LayerSpec, attention_of, spec_of
from attngen.hosts.learned import describe_learned, learned_weights
from attngen.kernels.crossovers import Choice
from attngen.kernels.dispatch import AUTO
from attngen.learned.methods import LearnedMethod
from attngen.methods.base import AttentionMethod, LayerShape
from attngen.methods.softmax import SoftmaxAttention
from attngen.report import LayerReport, StageReport


class Review:
    """What `RootHook` says about a new size: that a patch does nothing there, or costs more than it saves."""

    def __init__(self, starts: tuple[float, ...]) -> None:
        self.starts = starts

    def __call__(self, model: nn.Module, size: hooks.CallSize) -> str | None:
        layers = describe_model(model, "", self.starts, size)
        wanted = [layer for layer in layers if any(stage.method != SoftmaxAttention.kind for stage in layer.stages)]
        if not wanted:
            return None
        what = f"{type(model).__name__} at a grid of {size.grid[0]} x {size.grid[1]}"
        if not any(layer.is_active for layer in wanted):
            reason = next(stage.why_exact for stage in wanted[0].stages if stage.method != SoftmaxAttention.kind)
            return f"the patch does nothing for {what}: {wanted[0].name} is exact because {reason}"
        for layer in wanted:
            assert layer.flops_exact is not None
            for stage in layer.stages:
                if stage.why_exact is None and stage.flops > layer.flops_exact:
                    return (
                        f"{stage.method} costs more than softmax attention in {layer.name} of {what}: "
                        f"{stage.flops / layer.flops_exact:.2f} times the operations"
                    )
                if stage.is_slower:
                    return (
                        f"{stage.method} attention by {stage.kernel} is slower than softmax attention in {layer.name} "
                        f"of {what}: {stage.speedup:.2f} times its speed, as measured at sizes like these; "
                        "min_tokens leaves small layers exact"
                    )
        return None


def default_size(model: nn.Module) -> hooks.CallSize:
    """The size that the model's configuration was made for."""
    grid = default_grid(model)
    return hooks.CallSize(grid, 0, grid[0] * grid[1], batch=2)


def describe_model(
    model: nn.Module, component: str, starts: tuple[float, ...], size: hooks.CallSize
) -> list[LayerReport]:
    """Rows of the layers whose processors are ours."""
    reports = []
    for name, attn in hooks.patched_layers(model).items():
        spec = spec_of(attn)
        assert spec is not None
        if isinstance(attn.processor, hooks.PROCESSORS):
            grid = halved(size.grid, halvings(model, name))
            tokens = size.tokens if _works_on_one_grid(model) else grid[0] * grid[1]
            here = size._replace(grid=grid, tokens=tokens)
            reports.append(_describe_layer(component, name, attn, spec, starts, here))
    return reports


def _works_on_one_grid(model: nn.Module) -> bool:
    family = family_of(model)
    return family is not None and family.spatial_block is None


def _describe_layer(
    component: str,
    name: str,
    attn: Any,
    spec: LayerSpec,
    starts: tuple[float, ...],
    size: hooks.CallSize,
) -> LayerReport:
    grid, tokens = size.grid, size.tokens
    shape = _shape(attn, grid, size.text)
    stages = []
    for i, start in enumerate(starts):
        method = spec.methods[i]
        reason = spec.why_exact(i, grid, tokens)
        if reason is not None:
            stages.append(StageReport(start, method.kind, None, shape.exact_flops(), reason))
            continue
        choice, flops = _path(attn, spec, method, shape, size.batch)
        agents = method.num_agents_at(grid)
        stages.append(
            StageReport(start, method.kind, agents, flops, None, choice.kernel or None, choice.speedup, choice.reason)
        )
    return LayerReport(
        component,
        name,
        grid,
        tokens,
        shape.num_heads,
        shape.width // shape.num_heads,
        shape.exact_flops(),
        tuple(stages),
        None,
        learned_weights(attn),
    )


def _path(attn: Any, spec: LayerSpec, method: AttentionMethod, shape: LayerShape, batch: int) -> tuple[Choice, int]:
    """The path that computes a layer's method, asked for with tensors that have its sizes and no content; operations.

    Its name is "" for a method that is exact attention over fewer tokens.
    """
    attention = attention_of(attn.processor, spec.original, spec)
    parameter = next(attn.parameters())
    training = attn.training and torch.is_grad_enabled()

    def tensor(*sizes: int) -> Tensor:
        return parameter.detach().new_empty((1,) * len(sizes)).requires_grad_(training).expand(*sizes)

    head_dim, tokens = shape.width // shape.num_heads, method.tokens_at(shape.grid)
    num_agents = method.num_agents_at(shape.grid)
    hidden_states = tensor(batch, tokens, shape.channels)
    query = tensor(batch, shape.num_heads, tokens, head_dim)
    agents = None if num_agents is None else tensor(batch, shape.num_heads, num_agents, head_dim)
    if isinstance(method, LearnedMethod):
        return describe_learned(attn, method, shape, hidden_states, (query, agents))
    choice = method.choose_kernel(query, query, query, agents, attention.kernel or AUTO)
    if choice is None:
        return Choice(""), method.flops(shape)
    if attention.kernel is None:
        name = attention.backend.value if attention.backend is not None else "parallel"
        return Choice(name), method.flops(shape)
    if isinstance(attn.processor, AttnGenProcessor):
        why_direct_ = why_direct(attn, hidden_states, method, shape.grid, attention.kernel)
        if why_direct_ is None:
            return Choice("absorbed"), layer_size(attn, shape.channels, method, shape.grid).flops
        if attention.kernel == "absorbed":
            choice = choice._replace(reason=why_direct_)
    return choice, method.flops(shape)


def _shape(attn: Any, grid: Grid, text: int) -> LayerShape:
    """Sizes of a layer; which projections it has says whether text takes part and who projects the output."""
    single_stream = getattr(attn, "pre_only", False)
    sees_text = single_stream or getattr(attn, "add_k_proj", None) is not None
    return LayerShape(
        grid,
        channels=getattr(attn, "query_dim", None) or attn.inner_dim,
        width=attn.inner_dim,
        num_heads=attn.heads,
        context=text if sees_text else 0,
        has_output=not single_stream,
        has_context_output=getattr(attn, "to_add_out", None) is not None,
    )


def left_alone(component: str, name: str, reason: str) -> LayerReport:
    """The row of a layer that the patch did not touch."""
    return LayerReport(component, name, None, None, None, None, None, (), reason)
