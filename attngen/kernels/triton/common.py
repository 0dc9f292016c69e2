"""What all Triton kernels share on the host side. Imports without Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attngen.kernels.like import Like

LOG2E = 1.4426950408889634
"""Kernels take scores to base 2, the base of the hardware's exponential."""

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
    capability = _capability(first.device.index) if first.device.type == "cuda" else None
    if capability is not None and capability < (8, 0):
        return f"the kernels need a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return None


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    """Of a CUDA device; None for another maker's."""
    return torch.cuda.get_device_capability(index) if torch.version.hip is None else None


@torch.compiler.assume_constant_result
def uses_tf32() -> bool:
    """Whether products of float32 are in TF32, as PyTorch's own matrix products on CUDA devices are."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side, at one a multiprocessor."""
    return _multiprocessors(device.index) if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


@lru_cache(maxsize=16)
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def padded(number: int) -> int:
    """Rows or columns of a tile that holds so many: a power of two, at least the 16 of a matrix instruction."""
    return max(16, power_of_two(number))


def splits(tokens: int, rows: int, unit: int, programs: int) -> tuple[int, int]:
    """(number, tokens of each) of the splits of `tokens` so that `rows` times their number is about `programs`.

    Each split is a whole number of `unit` tokens, and none is empty.
    """
    units = -(-tokens // unit)
    size = -(-units // min(units, max(1, programs // rows)))
    return -(-units // size), size * unit


def precision(dtype: torch.dtype, wide: bool = False) -> dict[str, Any]:
    """Constants of `tiles.multiply` for inputs of a dtype: what factors are rounded to, and how they are multiplied.

    Float32 is multiplied as PyTorch's own products on CUDA devices are. With `wide` float16 is multiplied in TF32, for
    factors beyond its range. Triton's interpreter would multiply the bits of bfloat16 as integers, so there rounded
    factors are multiplied in float32.
    """
    import triton.language as tl

    tf32 = dtype == torch.float16 and wide or dtype == torch.float32 and uses_tf32()
    operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32 if wide else tl.float16}.get(dtype, tl.float32)
    return {"OPERAND": operand, "PRECISION": "rounded" if interpreted() else "tf32" if tf32 else "ieee"}


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
    return torch.empty(shape, dtype=dtype, device=device)


class Launch:
    """A kernel as a plan holds it, without its tensors.

    Args:
        kernel: what Triton made of the function.
        programs: of the grid's one axis.
        numbers: what follows the tensors.
        constants: by keyword, warps and stages among them.
    """

    __slots__ = ("constants", "numbers", "run")

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[int | float | None, ...], constants: dict[str, Any]
    ) -> None:
        self.run, self.numbers, self.constants = kernel[(programs,)], numbers, constants

    def __call__(self, *tensors: Tensor | None) -> None:
        self.run(*tensors, *self.numbers, **self.constants)


PLANS: dict[Any, Any] = {}
"""What does not depend on the numbers in the tensors, made once a shape."""
_MOST_PLANS = 1024


def planned(make: Callable[..., Any], tensors: Sequence[Tensor | None], *options: Any) -> Any:
    """`make(tensors, *options)`, made once for tensors of the same layout and equal options, which are hashable."""
    layouts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    key = (make, options, tensors[0].dtype == torch.float32 and uses_tf32(), *layouts)  # pyright: ignore
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= _MOST_PLANS:
            PLANS.clear()
        plan = PLANS[key] = make(tensors, *options)
    return plan


class Operator:
    """A function of tensors with a gradient: an operator that `torch.compile` leaves whole, and a short way to it.

    Eager calls on plain tensors go past torch's dispatcher, which takes longer than all that the function does.

    Args:
        name: of the operator, with its namespace.
        schema: its arguments and results, in torch's notation.
        function: the first argument is a tensor; returns a tuple with None for results that are not needed, of which
            the operator makes empty tensors.
        fake: gives tensors of the same shapes for the same arguments.
        save: the `setup_context` of an autograd function; None if there is no derivative.
        differentiate: its backward. With `create_graph` it must call operators, whose gradients are refused.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        function: Callable[..., tuple[Tensor | None, ...]],
        fake: Callable[..., tuple[Tensor | None, ...]],
        save: Callable[..., None] | None,
        differentiate: Callable[..., Any],
    ) -> None:
        def filled(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
            like = next(x for x in results if x is not None)
            return tuple(like.new_empty((0,)) if x is None else x for x in results)

        def whole(*arguments: Any) -> tuple[Tensor, ...]:
            return filled(function(*arguments))

        save = save or (lambda ctx, inputs, output: None)
        self.function = function
        self.operator = torch.library.custom_op(name, whole, mutates_args=(), schema=schema)
        self.operator.register_fake(lambda *arguments: filled(fake(*arguments)))
        self.operator.register_autograd(differentiate, setup_context=save)
        members = {"forward": whole, "setup_context": save, "backward": differentiate}
        kind = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in members.items()})
        self.eager = kind.apply

    def __call__(self, records: bool, *arguments: Any) -> tuple[Any, ...]:
        """Call with `arguments`; `records` is whether a gradient can be asked for."""
        first = arguments[0]
        if torch.compiler.is_compiling() or type(first) not in _PLAIN:
            return self.operator(*arguments)
        call = self.eager if records else self.function
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return call(*arguments)
        with torch.cuda.device(first.device):  # Triton launches on the current device, whatever the tensors are on
            return call(*arguments)


_PLAIN = (Tensor, torch.nn.Parameter)


def records(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call with these tensors has a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
