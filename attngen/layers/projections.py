"""Projections as matrices: the weight that a module multiplies by, or None where it may do anything else."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
# Results of some of torch's methods have no types, and whether a module has hooks is private.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attngen.kernels.absorbed import Projection


def effective_projection(module: nn.Module) -> Projection | None:
    """The one matrix and bias that `module` applies, or None where it may do anything else.

    A plain `nn.Linear`, or peft's LoRA around one: W + Σ scaling · B A of the active adapters, summed in float32 for C²
    multiply-adds a rank, differentiable in all parts. None for dropout in training, other adapters (DoRA), adapters to
    be unmerged, quantised or sharded weights, hooks, and every other module: these have to be called.
    """
    if _is_plain_linear(module):
        linear: Any = module
        return Projection(linear.weight, linear.bias)
    adapters = _adapters(module)
    if adapters is None:
        return None
    lora: Any = module
    weight, bias = lora.base_layer.weight, lora.base_layer.bias
    for name in adapters:
        down, up = lora.lora_A[name], lora.lora_B[name]
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(wide) + lora.scaling[name] * (up.weight.to(wide) @ down.weight.to(wide))
        if up.bias is not None:
            added = lora.scaling[name] * up.bias
            bias = added if bias is None else bias + added
    return Projection(weight, bias)


def is_one_matrix(module: nn.Module) -> bool:
    """Whether `effective_projection` gives a matrix, without computing it."""
    return _is_plain_linear(module) or _adapters(module) is not None


def _adapters(module: nn.Module) -> list[str] | None:
    """Names of the adapters that peft's LoRA adds to a plain `nn.Linear`; None where it is, or does, anything else."""
    # By name, so that peft is imported only where a model already has such a layer.
    kind = type(module)
    if (kind.__module__, kind.__qualname__) != ("peft.tuners.lora.layer", "Linear") or _is_hooked(module):
        return None
    lora: Any = module
    if not _is_plain_linear(lora.base_layer) or (lora.disable_adapters and lora.merged):
        return None
    if lora.disable_adapters or lora.merged:
        return []
    active = [name for name in lora.active_adapters if name in lora.lora_A]
    for name in active:
        down, up, dropout = lora.lora_A[name], lora.lora_B[name], lora.lora_dropout[name]
        drops = not isinstance(dropout, nn.Identity) and dropout.training
        if drops or name in lora.lora_variant or not (_is_plain_linear(down) and _is_plain_linear(up)):
            return None
    return active


def _is_plain_linear(module: nn.Module) -> bool:
    # Quantised and sharded weights are subclasses of Tensor inside of a plain nn.Linear.
    return (
        type(module) is nn.Linear
        and not _is_hooked(module)
        and type(module.weight) in (nn.Parameter, Tensor)
        and module.weight.is_floating_point()
        and module.weight.dtype.itemsize > 1
    )


def _is_hooked(module: nn.Module) -> bool:
    """Hooks of PyTorch, and replaced `forward`s: offloading, layerwise casting."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
