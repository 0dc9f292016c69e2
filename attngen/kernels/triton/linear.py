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
bit for bit from run to run. Triton is imported if it is there; `why_not` says so if not.
"""

from __future__ import annotations

# Types inside kernels are Triton's own, which a checker of Python cannot follow.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attngen.kernels.like import Like
from attngen.kernels.triton.common import (
    alignment,
    interpreted,
    multiprocessors,
    power_of_two,
    row_strided,
    strides,
    why_no_kernels,
)

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # not on this platform: `why_not` tells
        triton = tl = None

FUSED_FEATURE_MAPS = ("elu", "relu", "focused", "identity")
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 160
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


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
        feature_map: one of `FUSED_FEATURE_MAPS`.
        eps: added to φ(qᵢ) · meanⱼ φ(kⱼ).

    Returns:
        (B, H, N, E), a transposed view of contiguous (B, N, H, E).

    Raises:
        ValueError: for tensors which the kernels do not take, with the reason of `why_not`.
        RuntimeError: when a second derivative is asked for.
    """
    reason = why_not(query, key, value, feature_map)
    if reason is not None:
        raise ValueError(f"no fused linear attention: {reason}")
    output, _ = _forward_op(query, key, value, feature_map, eps)
    return output.transpose(1, 2)


def why_not(
    query: Tensor | Like,
    key: Tensor | Like,
    value: Tensor | Like,
    feature_map: str | Callable[[Tensor], Tensor],
) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can.

    Args:
        query: (B, H, N, D).
        key: (B, H, L, D).
        value: (B, H, L, E).
        feature_map: a name or a function.
    """
    if not isinstance(feature_map, str):
        return "the feature map is a function, which only runs outside a kernel"
    if feature_map not in FUSED_FEATURE_MAPS:
        return f"feature map {feature_map!r} is not one of {', '.join(FUSED_FEATURE_MAPS)}"
    return _shapes_differ(query, key, value) or why_no_kernels((query, key, value))


def _shapes_differ(query: Tensor | Like, key: Tensor | Like, value: Tensor | Like) -> str | None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        return f"not all tensors have 4 dimensions: {shapes}"
    same_heads = query.shape[:2] == key.shape[:2] == value.shape[:2]
    if not same_heads or query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        return f"shapes do not fit together: {shapes}"
    if any(size == 0 for size in (*query.shape, *value.shape)):
        return f"a tensor is empty: {shapes}"
    for size in (query.shape[3], value.shape[3]):
        if not MIN_HEAD_SIZE <= size <= MAX_HEAD_SIZE or size % 8:
            return f"head size {size} is not a multiple of 8 from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
    return None


# Kernels. Axis 0 of a grid is one (batch, head), so that programs beside each other read heads beside each other; axis
# 1 is a range of tokens, axis 2 a tile of the value's columns.


@_jit
def _features(x, keep, MAP: tl.constexpr, OPERAND: tl.constexpr):
    """φ(x) for float32 rows `x`, zero where not `keep`; comparisons are such that NaN stays NaN.

    Rounded as the matrix units want it, so that weights and what they weight see the same features.
    """
    if MAP == "elu":
        mapped = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == "relu":
        mapped = tl.where(x < 0, 0.0, x)
    elif MAP == "focused":
        direction, length, largest, _ = _focus(x, keep)
        mapped = direction * (length * largest)[:, None]
    else:
        mapped = x
    return tl.where(keep, mapped, 0.0).to(OPERAND).to(tl.float32)


@_jit
def _focus(x, keep):
    """Cubed relu(x) + 1e-6: unit direction, norm of u = relu(x) / max, max, and 3 u² / ‖u³‖, which is its slope."""
    positive = tl.where(keep, tl.where(x < 0, 0.0, x) + 1e-6, 0.0)
    largest = tl.max(positive, 1)
    # Rows beyond the last token have no column to keep.
    largest = tl.where(largest > 0, largest, 1.0)
    scaled = positive / largest[:, None]
    square = scaled * scaled
    cube = square * scaled
    inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(cube * cube, 1), 1e-30))
    return cube * inverse[:, None], tl.sqrt(tl.sum(square, 1)), largest, 3.0 * square * inverse[:, None]


@_jit
def _features_backward(x, gradient, keep, MAP: tl.constexpr):
    """The gradient of x from that of φ(x), which must be zero where not `keep`."""
    if MAP == "elu":
        result = gradient * tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == "relu":
        result = tl.where(x > 0, gradient, 0.0)
    elif MAP == "focused":
        direction, length, largest, slope = _focus(x, keep)
        along = tl.sum(direction * gradient, 1)[:, None]
        norm = length[:, None]
        scaled = tl.where(x < 0, 0.0, x) + 1e-6
        radial = scaled / (largest[:, None] * tl.maximum(norm, 1e-30)) * along
        result = tl.where(x > 0, radial + norm * slope * (gradient - along * direction), 0.0)
    else:
        result = gradient
    return result


@_jit
def _rows(tensor, batch_stride, head_stride, heads, ALIGN: tl.constexpr):
    """The first token of this program's head. Strides come divided by ALIGN, so that the compiler knows the divisor."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    return tensor + (batch * batch_stride + head * head_stride) * ALIGN


@_jit
def _load(rows, start, end, stride, first, SIZE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """N tokens from `start` and C columns from `first`, zero from token `end` and column SIZE on."""
    token = tl.arange(0, N)
    column = first + tl.arange(0, C)
    offsets = token[:, None] * (stride * ALIGN) + column[None, :]
    mask = (token < end - start)[:, None] & (column < SIZE)[None, :]
    return tl.load(rows + tl.cast(start, tl.int64) * (stride * ALIGN) + offsets, mask=mask, other=0.0)


@_jit
def _store(
    rows, x, start, end, stride, first, SIZE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr
):
    """The opposite of `_load`."""
    token = tl.arange(0, N)
    column = first + tl.arange(0, C)
    offsets = token[:, None] * (stride * ALIGN) + column[None, :]
    mask = (token < end - start)[:, None] & (column < SIZE)[None, :]
    tl.store(rows + tl.cast(start, tl.int64) * (stride * ALIGN) + offsets, x.to(rows.dtype.element_ty), mask=mask)


@_jit
def _load_matrix(matrix, first, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns from `first` of a float32 (D, E) matrix."""
    row = tl.arange(0, BLOCK_D)
    column = first + tl.arange(0, BLOCK_E)
    mask = (row < D)[:, None] & (column < E)[None, :]
    return tl.load(matrix + row[:, None] * E + column[None, :], mask=mask, other=0.0)


@_jit
def _load_vector(vector, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = first + tl.arange(0, BLOCK)
    return tl.load(vector + index, mask=index < SIZE, other=0.0)


@_jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    if PRECISION == "rounded":
        return tl.dot(a.to(OPERAND).to(tl.float32), b.to(OPERAND).to(tl.float32), out_dtype=tl.float32)
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION, out_dtype=tl.float32)


@_jit
def _keep(start, end, N: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr):
    return (tl.arange(0, N) < end - start)[:, None] & (tl.arange(0, C) < SIZE)[None, :]


@_jit
def _write_state(
    state,
    summary,
    mean,
    first,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Write a (D, E) sum, centred if asked, then the (D,) sum, then the (E,) centre if asked; zero where D has none."""
    row = tl.arange(0, BLOCK_D)
    column = first + tl.arange(0, BLOCK_E)
    if CENTRE:
        total = tl.sum(mean, 0)
        # No feature at all, or features of both signs (identity): any centre is exact, and zero is safe.
        whole = tl.min(mean, 0) >= 0 and total > 0
        centre = tl.where(whole, tl.sum(summary, 0) / tl.where(whole, total, 1.0), 0.0)
        summary -= mean[:, None] * centre[None, :]
        tl.store(state + D * E + D + column, centre, mask=column < E)
    mask = (row < D)[:, None] & (column < E)[None, :]
    tl.store(state + row[:, None] * E + column[None, :], summary, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(state + D * E + row, mean, mask=row < D)


@_jit
def _summarise(
    key,
    value,
    result,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    heads,
    tokens,
    chunk,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP: tl.constexpr,
    CENTRE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ φ(k)ᵀ v and Σ φ(k) over a range of keys, times `scale`."""
    first = tl.program_id(2) * BLOCK_E
    keys = _rows(key, key_batch, key_head, heads, ALIGN)
    values = _rows(value, value_batch, value_head, heads, ALIGN)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tokens)
    summary = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        k = _load(keys, start, end, key_token, 0, D, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
        v = _load(values, start, end, value_token, first, E, BLOCK_N, BLOCK_E, ALIGN)
        phi = _features(k, _keep(start, end, BLOCK_N, BLOCK_D, D), MAP, OPERAND)
        summary += _dot(tl.trans(phi), v, OPERAND, PRECISION)
        mean += tl.sum(phi, 0)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    state = result + part * (D * E + D + E)
    _write_state(state, summary * scale, mean * scale, first, D, E, BLOCK_D, BLOCK_E, CENTRE)


@_jit
def _combine(
    parts,
    result,
    count,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """The sum of `count` results of programs that each saw a part of the tokens, in their order."""
    first = tl.program_id(2) * BLOCK_E
    size: tl.constexpr = D * E + D + E
    source = parts + tl.program_id(0).to(tl.int64) * size
    step = tl.num_programs(0).to(tl.int64) * size
    summary = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    # Unrolled for many loads on the way at once.
    for _ in tl.range(0, count, loop_unroll_factor=8):
        summary += _load_matrix(source, first, D, E, BLOCK_D, BLOCK_E)
        mean += _load_vector(source + D * E, 0, D, BLOCK_D)
        source += step
    state = result + tl.program_id(0).to(tl.int64) * size
    _write_state(state, summary, mean, first, D, E, BLOCK_D, BLOCK_E, CENTRE)


@_jit
def _read(
    query,
    state,
    output,
    query_batch,
    query_head,
    query_token,
    output_batch,
    output_head,
    output_token,
    heads,
    tokens,
    chunk,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of a range of queries."""
    first = tl.program_id(2) * BLOCK_E
    queries = _rows(query, query_batch, query_head, heads, ALIGN)
    outputs = _rows(output, output_batch, output_head, heads, 8)
    state += tl.program_id(0).to(tl.int64) * (D * E + D + E)
    summary = _load_matrix(state, first, D, E, BLOCK_D, BLOCK_E).to(OPERAND)
    mean = _load_vector(state + D * E, 0, D, BLOCK_D)
    centre = _load_vector(state + D * E + D, first, E, BLOCK_E)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tokens)
    for start in range(begin, end, BLOCK_N):
        q = _load(queries, start, end, query_token, 0, D, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
        phi = _features(q, _keep(start, end, BLOCK_N, BLOCK_D, D), MAP, OPERAND)
        weight = tl.sum(phi * mean[None, :], 1)
        product = _dot(phi, summary, OPERAND, PRECISION) + weight[:, None] * centre[None, :]
        result = product / (weight + eps)[:, None]
        _store(outputs, result, start, end, output_token, first, E, BLOCK_N, BLOCK_E, 8)


@_jit
def _backward_query(
    query,
    gradient,
    state,
    query_gradient,
    result,
    query_batch,
    query_head,
    query_token,
    gradient_batch,
    gradient_head,
    gradient_token,
    output_batch,
    output_head,
    output_token,
    heads,
    tokens,
    chunk,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a range of queries, and their part of dS and r."""
    first = tl.program_id(2) * BLOCK_E
    queries = _rows(query, query_batch, query_head, heads, ALIGN)
    gradients = _rows(gradient, gradient_batch, gradient_head, heads, ALIGN)
    outputs = _rows(query_gradient, output_batch, output_head, heads, 8)
    state += tl.program_id(0).to(tl.int64) * (D * E + D + E)
    mean = _load_vector(state + D * E, 0, D, BLOCK_D)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tokens)
    # The compiler moves no load out of a loop that stores. Here and below: what fits a tile is read once.
    summary = _load_matrix(state, 0, D, E, BLOCK_D, BLOCK_E).to(OPERAND)
    centre = _load_vector(state + D * E + D, 0, E, BLOCK_E)
    summary_gradient = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean_gradient = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        q = _load(queries, start, end, query_token, 0, D, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
        keep = _keep(start, end, BLOCK_N, BLOCK_D, D)
        phi = _features(q, keep, MAP, OPERAND)
        inverse = 1.0 / (tl.sum(phi * mean[None, :], 1) + eps)
        if TILES == 1:
            g = _load(gradients, start, end, gradient_token, 0, E, BLOCK_N, BLOCK_E, ALIGN)
            h = _dot(g, tl.trans(summary), OPERAND, PRECISION)
            along = tl.sum(g.to(tl.float32) * centre[None, :], 1)
        else:
            h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            along = tl.zeros([BLOCK_N], tl.float32)
            for tile in range(TILES):
                g = _load(gradients, start, end, gradient_token, tile * BLOCK_E, E, BLOCK_N, BLOCK_E, ALIGN)
                summary = _load_matrix(state, tile * BLOCK_E, D, E, BLOCK_D, BLOCK_E).to(OPERAND)
                centre = _load_vector(state + D * E + D, tile * BLOCK_E, E, BLOCK_E)
                h += _dot(g, tl.trans(summary), OPERAND, PRECISION)
                along += tl.sum(g.to(tl.float32) * centre[None, :], 1)
            g = _load(gradients, start, end, gradient_token, first, E, BLOCK_N, BLOCK_E, ALIGN)
        c = (eps * along - tl.sum(phi * h, 1)) * inverse
        summary_gradient += _dot(tl.trans(phi), g.to(tl.float32) * inverse[:, None], OPERAND, PRECISION)
        mean_gradient += tl.sum(phi * (c * inverse)[:, None], 0)
        dq = _features_backward(q, (h + c[:, None] * mean[None, :]) * inverse[:, None], keep, MAP)
        if tl.program_id(2) == 0:
            _store(outputs, dq, start, end, output_token, 0, D, BLOCK_N, BLOCK_D, 8)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    result += part * (D * E + D + E)
    _write_state(result, summary_gradient, mean_gradient, first, D, E, BLOCK_D, BLOCK_E, False)


@_jit
def _backward_key(
    key,
    value,
    state,
    state_gradient,
    key_gradient,
    value_gradient,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    key_output_batch,
    key_output_head,
    key_output_token,
    value_output_batch,
    value_output_head,
    value_output_token,
    heads,
    tokens,
    chunk,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a range of keys."""
    keys = _rows(key, key_batch, key_head, heads, ALIGN)
    values = _rows(value, value_batch, value_head, heads, ALIGN)
    key_outputs = _rows(key_gradient, key_output_batch, key_output_head, heads, 8)
    value_outputs = _rows(value_gradient, value_output_batch, value_output_head, heads, 8)
    state += tl.program_id(0).to(tl.int64) * (D * E + D + E)
    state_gradient += tl.program_id(0).to(tl.int64) * (D * E + D + E)
    mean_gradient = _load_vector(state_gradient + D * E, 0, D, BLOCK_D)
    matrix = _load_matrix(state_gradient, 0, D, E, BLOCK_D, BLOCK_E).to(OPERAND)
    centre = _load_vector(state + D * E + D, 0, E, BLOCK_E)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tokens)
    for start in range(begin, end, BLOCK_N):
        k = _load(keys, start, end, key_token, 0, D, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
        keep = _keep(start, end, BLOCK_N, BLOCK_D, D)
        phi = _features(k, keep, MAP, OPERAND)
        gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for tile in range(TILES):
            v = _load(values, start, end, value_token, tile * BLOCK_E, E, BLOCK_N, BLOCK_E, ALIGN)
            if TILES > 1:
                centre = _load_vector(state + D * E + D, tile * BLOCK_E, E, BLOCK_E)
                matrix = _load_matrix(state_gradient, tile * BLOCK_E, D, E, BLOCK_D, BLOCK_E).to(OPERAND)
            dv = _dot(phi, matrix, OPERAND, PRECISION) * scale
            _store(value_outputs, dv, start, end, value_output_token, tile * BLOCK_E, E, BLOCK_N, BLOCK_E, 8)
            gradient += _dot(v.to(tl.float32) - centre[None, :], tl.trans(matrix), OPERAND, PRECISION)
        dk = _features_backward(k, (gradient + mean_gradient[None, :]) * scale, keep, MAP)
        _store(key_outputs, dk, start, end, key_output_token, 0, D, BLOCK_N, BLOCK_D, 8)


# Launches.


class _Blocks(NamedTuple):
    """Tile sizes, and what `num_warps`, `num_stages` are; `programs` of them are wanted on a processor."""

    d: int
    e: int
    n: int
    warps: int
    stages: int
    programs: int


def _forward_blocks(head_size: int, value_size: int, itemsize: int) -> _Blocks:
    """For `_summarise` and `_read`."""
    d, most = power_of_two(head_size), 128 * 128 if itemsize == 2 else 64 * 64
    # One program keeps a float32 matrix of d x e: 128 x 128 are 64 registers a thread in 8 warps, which do not spill.
    # Exact float32 products are unrolled into thousands of instructions, which spill from 64 tokens on.
    e = max(16, min(power_of_two(value_size), most // d))
    small = max(d, e) <= 64 and itemsize == 2
    # 64 tokens are the fewest that fill the matrix units of sm_90.
    n = 64 if itemsize == 2 else 32
    # A third buffer hides more latency where it fits.
    stages = 3 if n * (d + e) * itemsize <= 2**15 else 2
    # About 140 registers a thread in 4 warps let 3 programs on a processor, about 200 in 8 warps one and a successor.
    return _Blocks(d, e, n, 4 if small else 8, stages, programs=3 if small else 2)


def _backward_blocks(head_size: int, value_size: int, itemsize: int) -> _Blocks:
    """For `_backward_query` and `_backward_key`, which keep three or four tiles of n x d beside the matrix."""
    d = power_of_two(head_size)
    # Fewer columns make `_backward_query` repeat its first product for each tile of them, more spill.
    e = min(power_of_two(value_size), 128 if itemsize == 2 and d <= 128 else 64 if d <= 64 else 32)
    # 64 tokens of the larger heads, and 32 of the largest, spill hundreds of bytes a thread; float32 does so earlier.
    if itemsize == 2:
        n = 64 if max(d, e) <= 64 else 32 if d <= 128 else 16
    else:
        n = 32 if d < 64 else 16
    return _Blocks(d, e, n, 8, 3 if d <= 128 and itemsize == 2 else 2, programs=2)


def _chunk(tokens: int, rows: int, blocks: _Blocks, device: torch.device, smallest: int) -> int:
    """Tokens of a program, where all tokens are read for each of `rows` heads and tiles.

    Enough programs for all processors, but each also writes or reads a D x E matrix, which costs less than its tokens
    only from `smallest` tokens on.
    """
    wanted = max(1, blocks.programs * multiprocessors(device) // rows)
    return smallest * max(1, math.ceil(tokens / (wanted * smallest)))


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    """In which dtype and precision matrix products are taken, see `linear_attention`."""
    if dtype == torch.bfloat16:
        # The interpreter would multiply the bits of bfloat16 numbers as integers.
        return {"OPERAND": tl.bfloat16, "PRECISION": "rounded" if interpreted() else "ieee"}
    tf32 = dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"OPERAND": tl.float32, "PRECISION": "tf32" if tf32 else "ieee"}


def _on(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Every buffer that kernels write comes from here, so that tests can fill it first."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _state_size(head_size: int, value_size: int) -> int:
    return head_size * value_size + head_size + value_size


def _summed(parts: Tensor, batch: int, heads: int, head_size: int, value_size: int, centre: bool) -> Tensor:
    """(B, H, D·E + D + E) from (parts, B·H, ...)."""
    d = power_of_two(head_size)
    e = 16  # 64 bytes, and many programs; with d / 16 warps 8 numbers a thread and part
    state = _empty((batch, heads, parts.shape[2]), parts)
    grid = (parts.shape[1], 1, triton.cdiv(value_size, e))
    warps = max(1, d // 16)
    _combine[grid](parts, state, parts.shape[0], head_size, value_size, d, e, centre, num_warps=warps)
    return state


def _forward(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor]:
    query, key, value = row_strided(query), row_strided(key), row_strided(value)
    batch, heads, tokens, head_size = query.shape
    value_size = value.shape[3]
    with _on(query):
        state = _summary(key, value, feature_map)
        output = _empty((batch, tokens, heads, value_size), query)
        blocks = _forward_blocks(head_size, value_size, query.element_size())
        tiles = triton.cdiv(value_size, blocks.e)
        chunk = _chunk(tokens, batch * heads * tiles, blocks, query.device, 128)
        align = alignment(query)
        _read[(batch * heads, triton.cdiv(tokens, chunk), tiles)](
            query,
            state,
            output,
            *strides(query, align),
            *strides(output.transpose(1, 2), 8),
            heads,
            tokens,
            chunk,
            eps,
            D=head_size,
            E=value_size,
            BLOCK_D=blocks.d,
            BLOCK_E=blocks.e,
            BLOCK_N=blocks.n,
            ALIGN=align,
            MAP=feature_map,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **_precision(query.dtype),
        )
    return output, state


def _summary(key: Tensor, value: Tensor, feature_map: str) -> Tensor:
    """C, z and m of all heads, (B, H, D·E + D + E) float32."""
    batch, heads, tokens, head_size = key.shape
    value_size = value.shape[3]
    blocks = _forward_blocks(head_size, value_size, key.element_size())
    tiles = triton.cdiv(value_size, blocks.e)
    chunk = _chunk(tokens, batch * heads * tiles, blocks, key.device, 256)
    count = triton.cdiv(tokens, chunk)
    parts = _empty((count, batch * heads, _state_size(head_size, value_size)), key, torch.float32)
    align = alignment(key, value)
    _summarise[(batch * heads, count, tiles)](
        key,
        value,
        parts,
        *strides(key, align),
        *strides(value, align),
        heads,
        tokens,
        chunk,
        1 / tokens,
        D=head_size,
        E=value_size,
        BLOCK_D=blocks.d,
        BLOCK_E=blocks.e,
        BLOCK_N=blocks.n,
        ALIGN=align,
        MAP=feature_map,
        CENTRE=count == 1,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_precision(key.dtype),
    )
    if count == 1:
        return parts.view(batch, heads, -1)
    return _summed(parts, batch, heads, head_size, value_size, centre=True)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, query, key, value = map(row_strided, (gradient, query, key, value))
    with _on(query):
        query_gradient, state_gradient = _query_gradients(gradient, query, state, feature_map, eps)
        key_gradient, value_gradient = _key_gradients(key, value, state, state_gradient, feature_map)
    return query_gradient, key_gradient, value_gradient


def _query_gradients(
    gradient: Tensor, query: Tensor, state: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor]:
    """dq (B, N, H, D), and dS and r as `state` is laid out."""
    batch, heads, tokens, head_size = query.shape
    value_size = gradient.shape[3]
    blocks = _backward_blocks(head_size, value_size, query.element_size())
    tiles = triton.cdiv(value_size, blocks.e)
    chunk = _chunk(tokens, batch * heads * tiles, blocks, query.device, 256)
    count = triton.cdiv(tokens, chunk)
    parts = _empty((count, batch * heads, _state_size(head_size, value_size)), query, torch.float32)
    result = _empty((batch, tokens, heads, head_size), query)
    align = alignment(query, gradient)
    _backward_query[(batch * heads, count, tiles)](
        query,
        gradient,
        state,
        result,
        parts,
        *strides(query, align),
        *strides(gradient, align),
        *strides(result.transpose(1, 2), 8),
        heads,
        tokens,
        chunk,
        eps,
        D=head_size,
        E=value_size,
        BLOCK_D=blocks.d,
        BLOCK_E=blocks.e,
        BLOCK_N=blocks.n,
        TILES=tiles,
        ALIGN=align,
        MAP=feature_map,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_precision(query.dtype),
    )
    if count == 1:
        return result, parts.view(batch, heads, -1)
    return result, _summed(parts, batch, heads, head_size, value_size, centre=False)


def _key_gradients(
    key: Tensor, value: Tensor, state: Tensor, state_gradient: Tensor, feature_map: str
) -> tuple[Tensor, Tensor]:
    """dk (B, L, H, D) and dv (B, L, H, E)."""
    batch, heads, tokens, head_size = key.shape
    value_size = value.shape[3]
    blocks = _backward_blocks(head_size, value_size, key.element_size())
    chunk = _chunk(tokens, batch * heads, blocks, key.device, 128)
    key_gradient = _empty((batch, tokens, heads, head_size), key)
    value_gradient = _empty((batch, tokens, heads, value_size), value)
    align = alignment(key, value)
    _backward_key[(batch * heads, triton.cdiv(tokens, chunk))](
        key,
        value,
        state,
        state_gradient,
        key_gradient,
        value_gradient,
        *strides(key, align),
        *strides(value, align),
        *strides(key_gradient.transpose(1, 2), 8),
        *strides(value_gradient.transpose(1, 2), 8),
        heads,
        tokens,
        chunk,
        1 / tokens,
        D=head_size,
        E=value_size,
        BLOCK_D=blocks.d,
        BLOCK_E=blocks.e,
        BLOCK_N=blocks.n,
        TILES=triton.cdiv(value_size, blocks.e),
        ALIGN=align,
        MAP=feature_map,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_precision(key.dtype),
    )
    return key_gradient, value_gradient


# Operators.


@torch.library.custom_op("attngen::fused_linear_attention", mutates_args=())
def _forward_op(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(query, key, value, feature_map, eps)


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_size = query.shape
    value_size = value.shape[3]
    output = query.new_empty((batch, tokens, heads, value_size))
    state = query.new_empty((batch, heads, _state_size(head_size, value_size)), dtype=torch.float32)
    return output, state


@torch.library.custom_op("attngen::fused_linear_attention_backward", mutates_args=())
def _backward_op(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gradient, query, key, value, state, feature_map, eps)


@_backward_op.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [tensor.transpose(1, 2).shape for tensor in (query, key, value)]
    query_gradient, key_gradient, value_gradient = (query.new_empty(shape) for shape in shapes)
    return query_gradient, key_gradient, value_gradient


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _state_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None, None
    gradients = _backward_op(gradient.transpose(1, 2), *ctx.saved_tensors, ctx.feature_map, ctx.eps)
    return *(tensor.transpose(1, 2) for tensor in gradients), None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "fused linear attention has first derivatives only; for second ones use attngen.methods.linear.linear_attention"
    )


_forward_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_refuse)
