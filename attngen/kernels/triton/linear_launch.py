"""Tiles, buffers and launches of the linear attention kernels: plans made once a shape. Importing it needs Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngen.kernels.triton import common
from attngen.kernels.triton.common import Launch
from attngen.kernels.triton.linear_call import check
from attngen.kernels.triton.linear_kernels import combine, key_backward, query_backward, read, summarise


class Blocks(NamedTuple):
    """Tile sizes, and what `num_warps`, `num_stages` are; `programs` of them are wanted on a processor."""

    d: int
    e: int
    n: int
    warps: int
    stages: int
    programs: int


def forward_blocks(head_size: int, value_size: int, itemsize: int) -> Blocks:
    """For `summarise` and `read`."""
    d, most = common.power_of_two(head_size), 128 * 128 if itemsize == 2 else 64 * 64
    # One program keeps a float32 matrix of d x e: 128 x 128 are 64 registers a thread in 8 warps, which do not spill.
    # Exact float32 products are unrolled into thousands of instructions, which spill from 64 tokens on.
    e = max(16, min(common.power_of_two(value_size), most // d))
    small = max(d, e) <= 64 and itemsize == 2
    # 64 tokens are the fewest that fill the matrix units of sm_90.
    n = 64 if itemsize == 2 else 32
    # A third buffer hides more latency where it fits.
    stages = 3 if n * (d + e) * itemsize <= 2**15 else 2
    # About 140 registers a thread in 4 warps let 3 programs on a processor, about 200 in 8 warps one and a successor.
    return Blocks(d, e, n, 4 if small else 8, stages, programs=3 if small else 2)


def backward_blocks(head_size: int, value_size: int) -> Blocks:
    """For `query_backward` and `key_backward`, which keep three or four tiles of n x d beside the matrix.

    Larger tiles spill hundreds of bytes a thread on sm_86 and exceed its 99 KB of shared memory, in half precision too.
    """
    d = common.power_of_two(head_size)
    return Blocks(d, min(common.power_of_two(value_size), 64 if d <= 64 else 32), 32 if d < 64 else 16, 8, 2, 2)


def operand_size(dtype: torch.dtype) -> int:
    """Bytes of a factor as the matrix units read it: float16 is multiplied in TF32."""
    return 2 if dtype == torch.bfloat16 else 4


class Pass(NamedTuple):
    """A plan of one pass over tokens: its launch, its splits, and the sum of their states if there are several."""

    launch: Launch
    splits: int
    combine: Launch | None

    def state(self, *tensors: Tensor, head_size: int, value_size: int) -> Tensor:
        """Launch both, writing the state (or its gradient), (B, H, D·E + D + E), behind the tensors."""
        first = tensors[0]
        shape = (*first.shape[:2], self.splits, state_size(head_size, value_size))
        state = common.empty(shape, torch.float32, first.device)
        self.launch(*tensors, state)
        if self.combine is None:
            return state.squeeze(2)
        whole = common.empty((*shape[:2], shape[3]), torch.float32, first.device)
        self.combine(state, whole)
        return whole


class Forward(NamedTuple):
    """Whether inputs must be copied first, and the plans of both passes."""

    copies: bool
    summarise: Pass
    read: Pass


def state_size(head_size: int, value_size: int) -> int:
    """Numbers of a head's state."""
    return head_size * value_size + head_size + value_size


def forward(query: Tensor, key: Tensor, value: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E), and the state (B, H, D·E + D + E) of `linear_kernels`, float32."""
    plan = common.planned(_plan_forward, (query, key, value), feature_map, eps)
    if plan.copies:
        query, key, value = map(common.row_strided, (query, key, value))
    (batch, heads, tokens, head_size), value_size = query.shape, value.shape[3]
    state = plan.summarise.state(key, value, head_size=head_size, value_size=value_size)
    output = common.empty((batch, tokens, heads, value_size), query.dtype, query.device)
    plan.read.launch(query, state, output)
    return output, state


def _plan_forward(tensors: tuple[Tensor, Tensor, Tensor], feature_map: str, eps: float) -> Forward:
    check(*tensors, feature_map)
    query, key, value = map(common.row_strided, tensors)
    blocks = forward_blocks(query.shape[3], value.shape[3], operand_size(query.dtype))
    summary = _plan(summarise, (key, value), value.shape[3], blocks, 1 / key.shape[2], 256, feature_map, True)
    copies = any(tensor.stride(-1) != 1 for tensor in tensors)
    return Forward(copies, summary, _plan(read, (query,), value.shape[3], blocks, eps, 128, feature_map))


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, N, H, D), dk (B, L, H, D) and dv (B, L, H, E). `grad` is (B, H, N, E)."""
    grad, query, key, value = map(common.row_strided, (grad, query, key, value))
    by_query, by_key = common.planned(_plan_backward, (query, key, value, grad), feature_map, eps)
    (batch, heads, tokens, head_size), (keys, value_size) = query.shape, value.shape[2:]
    query_grad = common.empty((batch, tokens, heads, head_size), query.dtype, query.device)
    key_grad = common.empty((batch, keys, heads, head_size), key.dtype, key.device)
    value_grad = common.empty((batch, keys, heads, value_size), value.dtype, value.device)
    sizes = {"head_size": head_size, "value_size": value_size}
    state_grad = by_query.state(query, grad, state, query_grad, **sizes)
    by_key.launch(key, value, state, state_grad, key_grad, value_grad)
    return query_grad, key_grad, value_grad


def _plan_backward(tensors: tuple[Tensor, ...], feature_map: str, eps: float) -> tuple[Pass, Pass]:
    query, key, value, grad = tensors
    width = value.shape[3]
    blocks = backward_blocks(query.shape[3], width)
    by_query = _plan(query_backward, (query, grad), width, blocks, eps, 256, feature_map, False)
    return by_query, _plan(key_backward, (key, value), width, blocks, 1 / key.shape[2], 128, feature_map)


def _plan(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    width: int,
    blocks: Blocks,
    number: float,
    unit: int,
    feature_map: str,
    centre: bool | None = None,
) -> Pass:
    """The launch of a kernel over the tokens of the first tensor.

    Args:
        kernel: the kernel.
        tensors: its inputs with tokens.
        width: E.
        blocks: tiles.
        number: the one that the kernel takes, a scale or eps.
        unit: tokens from which on they cost more than the state, which each program reads or writes.
        feature_map: its name.
        centre: whether the state that it writes is centred; None where it writes none.
    """
    batch, heads, tokens, head_size = tensors[0].shape
    tiles = -(-width // blocks.e)
    rows = batch * heads * (1 if kernel is key_backward else tiles)
    splits, split_size = common.splits(tokens, rows, unit, blocks.programs * common.multiprocessors(tensors[0].device))
    align = common.alignment(*tensors)
    constants = {"D": head_size, "E": width, "BLOCK_D": blocks.d, "BLOCK_E": blocks.e}
    added = None
    if centre is not None and splits > 1:
        e = 16  # 64 bytes, and many programs; with d / 16 warps 8 numbers a thread and part
        block = {"BLOCK_E": e, "CENTRE": centre, "num_warps": max(1, blocks.d // 16)}
        added = Launch(combine, batch * heads * -(-width // e), (batch * heads, splits), constants | block)
    constants |= {"BLOCK_N": blocks.n, "TILES": tiles, "ALIGN": align, "MAP": feature_map}
    constants |= {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if kernel is summarise:
        constants["CENTRE"] = splits == 1
    steps = [step for tensor in tensors for step in common.strides(tensor, align)]
    numbers = (batch, heads, tokens, splits, split_size, number, *steps)
    constants |= common.precision(tensors[0].dtype, wide=True)
    return Pass(Launch(kernel, rows * splits, numbers, constants), splits, added)
