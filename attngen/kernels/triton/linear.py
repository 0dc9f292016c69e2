"""Linear attention in two streaming Triton passes, and three more for its gradients; no mapped feature meets memory.

Papers: Katharopoulos et al. 2020, arXiv 2006.16236; focused linear attention, Han et al., ICCV 2023, arXiv 2308.00442.
With features φ, L keys, means z = Σⱼ φ(kⱼ) / L and S = Σⱼ φ(kⱼ)ᵀ vⱼ / L, an output is φ(q) S / (φ(q)·z + eps).

Half precision rounds S before the matrix units read it, and in the gradients almost all of S cancels against z times
the mean value. So S is kept centred: C = S - zᵀ m, with m the mean of the values weighted by their keys' features. With
p = φ(q), d = p·z + eps and g the gradient of the output, exactly:

    output   = (p C + (p·z) m) / d
    h        = C gᵀ,  c = (eps · g·m - p·h) / d
    dφ(q)    = (h + c z) / d
    dS       = Σᵢ pᵢᵀ gᵢ / dᵢ,  r = Σᵢ cᵢ pᵢ / dᵢ
    dv       = φ(k) dS / L
    dφ(k)    = (dS (v - m)ᵀ + r) / L

Every sum over tokens is split among programs, whose float32 parts are added in one fixed order: results are the same
bit for bit from run to run. Imports without Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngen.kernels.triton import common
from attngen.kernels.triton.linear_call import check, why_not

__all__ = ["linear_attention", "why_not"]


def linear_attention(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> Tensor:
    """φ(qᵢ) Σⱼ φ(kⱼ)ᵀvⱼ / (φ(qᵢ) · Σⱼ φ(kⱼ)), fused; the function of `attngen.methods.linear.linear_attention`.

    Eq. 5 of arXiv 2006.16236. Gradients are computed from the features again: saved are the inputs and H · (D + 1) ·
    (E + 1) float32 numbers a picture. First derivatives only. Inputs may be views with any strides; only a last axis
    whose elements are not neighbours in memory is copied.

    Products are taken on the matrix units in bfloat16 for bfloat16, TF32 for float16 (its range would not hold sums of
    products), and for float32 in IEEE single precision unless `torch.backends.cuda.matmul.fp32_precision` is "tf32";
    features and sums are float32. Autocast changes nothing: the output has the inputs' dtype.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: one of `linear_call.FUSED_FEATURE_MAPS`.
        eps: added to φ(qᵢ) · meanⱼ φ(kⱼ).

    Returns:
        (B, H, N, E), a transposed view of contiguous (B, N, H, E).

    Raises:
        ValueError: for tensors which the kernels do not take, with the reason of `why_not`.
        RuntimeError: when a second derivative is asked for.
    """
    if torch.compiler.is_compiling():
        check(query, key, value, feature_map)  # else where a plan for these shapes is made
    return _forward(common.records((query, key, value)), query, key, value, feature_map, eps)[0].transpose(1, 2)


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    from attngen.kernels.triton import linear_launch

    return linear_launch.forward(*arguments)


def _fake(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> tuple[Tensor, ...]:
    (batch, heads, tokens, head_size), width = query.shape, value.shape[3]
    state = query.new_empty((batch, heads, head_size * width + head_size + width), dtype=torch.float32)
    return query.new_empty((batch, tokens, heads, width)), state


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from attngen.kernels.triton import linear_launch

    return linear_launch.backward(*arguments)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.transpose(1, 2).shape) for tensor in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    saved = ctx.saved_tensors
    gradients = _backward(torch.is_grad_enabled(), grad.transpose(1, 2), *saved, ctx.feature_map, ctx.eps)
    return *(tensor.transpose(1, 2) for tensor in gradients), None, None


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "fused linear attention has first derivatives only; for second ones use attngen.methods.linear.linear_attention"
    )


_TENSORS = "Tensor query, Tensor key, Tensor value"
_forward = common.Operator(
    "attngen::fused_linear_attention",
    f"({_TENSORS}, str feature_map, float eps) -> (Tensor, Tensor)",
    _run, _fake, _save, _differentiate,
)  # fmt: skip
_backward = common.Operator(
    "attngen::fused_linear_attention_backward",
    f"(Tensor grad, {_TENSORS}, Tensor state, str feature_map, float eps) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward, None, _refuse,
)  # fmt: skip
