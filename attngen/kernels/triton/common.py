"""What all Triton kernels share on the host side. Imports without Triton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attngen.kernels.like import Like

# Kernels take scores to base 2, the base of the hardware's exponential.
LOG2E = 1.4426950408889634

# The interpreter has no multiprocessors; a few, so that small tensors are split as large ones are on a GPU.
_INTERPRETED_MULTIPROCESSORS = 6


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, as it does where TRITON_INTERPRET=1 was set before its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton can be imported; PyTorch's wheels for CPUs come without it."""
    return _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def why_no_kernels(tensors: Sequence[Tensor | Like]) -> str | None:
    """Why Triton cannot work on `tensors` (its absence, their device or dtype), or None if it can."""
    first = tensors[0]
    if not has_triton():
        return "Triton is not installed"
    if any(tensor.device != first.device for tensor in tensors):
        return f"the tensors lie on several devices: {', '.join(sorted({str(t.device) for t in tensors}))}"
    if first.device.type != "cuda" and not (first.device.type == "cpu" and interpreted()):
        return f"the tensors lie on {first.device.type}, and the kernels need a CUDA device"
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return f"the tensors have several dtypes: {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in float32, float16 and bfloat16, not in {first.dtype}"
    if first.dtype == torch.bfloat16 and first.is_cuda and _is_before_ampere(first.device.index):
        return "this GPU has no bfloat16"
    return None


@torch.compiler.assume_constant_result
def _is_before_ampere(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side, at one a multiprocessor."""
    return _multiprocessors(device.index) if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


@lru_cache(maxsize=16)
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def split_width(width: int) -> tuple[int, int]:
    """Powers of two (first, second) that cover `width`: 72 -> (64, 16), 64 -> (64, 0), 120 -> (128, 0).

    Triton's tiles are powers of two wide, and one tile of 128 for 72 would spend 1.8 times the work. The second part is
    0 where two are no narrower than one; no part is narrower than 16, the least a matrix unit multiplies.
    """
    single = max(16, power_of_two(width))
    first = single // 2
    second = max(16, power_of_two(width - first))
    return (first, second) if single > 16 and first + second < single else (single, 0)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32: exactly, or in TF32 where PyTorch's own matrix products on CUDA do.

    "wide" converts the factors to float32 first: Triton's interpreter multiplies the bits of bfloat16 as integers.
    """
    if interpreted():
        return "wide"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def row_strided(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last axis is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def alignment(*tensors: Tensor | None) -> int:
    """8 if all strides but the last are multiples of 8, else 1.

    Kernels get strides divided by it and multiply them back by the constant. Otherwise Triton, which sees of a number
    only whether it is a multiple of 16, would load tensors with heads of 40 or 72 one element at a time.
    """
    strides = (
        s for t in tensors if t is not None for s, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1
    )
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def strides(tensor: Tensor, align: int) -> list[int]:
    """Strides of all axes but the last, in units of `align`; 0 for an axis of one element, which is never stepped."""
    return [s // align if size > 1 else 0 for s, size in zip(tensor.stride()[:-1], tensor.shape, strict=False)]


def four_axes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """`shape` with ones in front, as broadcasting sees it."""
    batch, heads, rows, columns = [1] * (4 - len(shape)) + list(shape)
    return batch, heads, rows, columns


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer of the kernels comes from here; tests fill it with NaN to show that all of it is written."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `tensor` the current one, on which Triton launches whatever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Every launch goes through here; tests replace it to compile for a GPU that is not there."""
    kernel[(programs,)](*arguments, **constants)
