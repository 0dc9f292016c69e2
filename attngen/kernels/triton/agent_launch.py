"""Tiles, buffers and launches of the agent attention kernels: plans made once a shape. Importing it needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngen.kernels.triton import common
from attngen.kernels.triton.agent_backward import differentiate
from attngen.kernels.triton.agent_call import Inputs, Options, check
from attngen.kernels.triton.agent_forward import aggregate, broadcast, combine
from attngen.kernels.triton.common import Launch

Tensors = Sequence[Any]
"""Tensors, or None in place of those that there are not."""


class Tiles(NamedTuple):
    """How one kernel cuts its work: tokens of a tile, warps of a program, tiles loaded ahead."""

    block_n: int
    num_warps: int
    num_stages: int


def aggregation_tiles(row: int, agents: int, width: int) -> Tiles:
    """Of the pass over keys and values, which waits for memory: tiles are loaded ahead.

    Args:
        row: bytes of a padded head of one token.
        agents: M, padded.
        width: D or E, padded.
    """
    return Tiles(_tokens(8192 // row, 64 if agents <= 32 else 32), 4, 3)


def broadcast_tiles(row: int, agents: int, width: int) -> Tiles:
    """Of the pass over the queries, where other programs hide the waiting of one. Arguments as above."""
    return Tiles(_tokens(16384 // row, 128), 8, 1)


def backward_tiles(row: int, agents: int, width: int) -> Tiles:
    """Of both backward passes, which hold sums as large as the agents and gradients as large as the tile at once."""
    most = 64 * width // row  # half as many in float32, which needs more registers
    return Tiles(_tokens(8192 // row, most), 4 if agents * width <= 1024 else 8, 1)


def _tokens(number: int, most: int) -> int:
    return max(16, min(number, most))


class Forward(NamedTuple):
    """A plan: whether inputs must be copied first, shapes of the buffers, and launches."""

    copies: bool
    state: tuple[int, ...]
    whole: tuple[int, ...]
    output: tuple[int, ...]
    aggregate: Launch
    combine: Launch | None
    broadcast: Launch


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E) and the state of `agent_forward`, in one split.

    Arguments: the tensors of `Inputs`, numbers (of `Options`, without the grid), grid.
    """
    *tensors, numbers, grid = arguments
    plan = common.planned(_plan_forward, tensors, tuple(numbers), tuple(grid))
    query, key, value, agents, aggregation_bias, broadcast_bias, weight, weight_bias = (
        _row_strided(tensors) if plan.copies else tensors
    )
    device, dtype = query.device, query.dtype
    state = common.empty(plan.state, torch.float32, device)
    plan.aggregate(agents, key, value, aggregation_bias, state)
    if plan.combine is not None:
        parts, state = state, common.empty(plan.whole, torch.float32, device)
        plan.combine(parts, state)
    output = common.empty(plan.output, dtype, device)
    plan.broadcast(query, agents, state, value, broadcast_bias, weight, weight_bias, output)
    return output, state


def _row_strided(tensors: Tensors) -> list[Any]:
    """Copies where the last axis is not contiguous, and of weights that are not; biases may have any strides."""
    heads, biases, weights = tensors[:4], tensors[4:6], tensors[6:]
    rows = [common.row_strided(x) for x in heads if x is not None]
    return [*rows, *biases, *(None if x is None else x.contiguous() for x in weights)]


def _copies(tensors: Tensors) -> tuple[Inputs, bool]:
    """The inputs as kernels read them, and whether any is a copy."""
    rows = _row_strided(tensors)
    changed = any(x is not y for x, y in zip(rows, tensors, strict=True))
    return Inputs(*rows), changed


def _plan_forward(tensors: Tensors, numbers: tuple[float, ...], grid: tuple[int, int]) -> Forward:
    options = Options._make((*numbers, *grid))
    check(Inputs(*tensors), options)
    inputs, copies = _copies(tensors)
    query, key, value, agents, aggregation_bias, broadcast_bias, _, _ = inputs
    (batch, heads, tokens, _), (keys, width), num_agents = query.shape, value.shape[2:], agents.shape[2]
    sizes, constants = _sizes(inputs), _constants(inputs)
    processors = common.multiprocessors(query.device)
    tiles = aggregation_tiles(*sizes)
    # Fewer than four tiles a split cost less than its combination.
    splits, split_size = common.splits(keys, batch * heads, 4 * tiles.block_n, 2 * processors)
    align = common.alignment(agents, key, value)
    first = Launch(
        aggregate,
        batch * heads * splits,
        (
            *(batch, heads, keys, splits, split_size, options.scale * common.LOG2E),
            *(*common.strides(agents, align), *common.strides(key, align), *common.strides(value, align)),
            *_bias_strides(aggregation_bias),
        ),
        constants | _of(tiles, align),
    )
    tiles = broadcast_tiles(*sizes)
    align = common.alignment(query, agents, value)
    last = Launch(
        broadcast,
        batch * heads * -(-tokens // tiles.block_n),
        (
            *(batch, heads, tokens, options.height, options.width),
            *(options.broadcast_scale * common.LOG2E, options.gain, options.shortcut or None),
            *(*common.strides(query, align), *common.strides(agents, align), *common.strides(value, align)),
            *_bias_strides(broadcast_bias),
        ),
        constants | _of(tiles, align),
    )
    added = None if splits == 1 else _combination(constants, batch * heads, splits)
    sums = num_agents * (width + 1)
    shape = (batch * heads * splits * sums,), (batch * heads * sums,), (batch, tokens, heads, width)
    return Forward(copies, *shape, first, added, last)


def _combination(constants: dict[str, Any], heads: int, splits: int) -> Launch:
    names = ("M", "E", "BLOCK_M", "BLOCK_E")
    return Launch(combine, heads, (heads, splits), {name: constants[name] for name in names} | {"num_warps": 8})


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """What tiles depend on."""
    width = common.padded(max(inputs.query.shape[3], inputs.value.shape[3]))
    return width * inputs.query.element_size(), common.padded(inputs.agents.shape[2]), width


def _constants(inputs: Inputs) -> dict[str, Any]:
    """The constants that all kernels share."""
    sizes = {"M": inputs.agents.shape[2], "D": inputs.query.shape[3], "E": inputs.value.shape[3]}
    blocks = {f"BLOCK_{name}": common.padded(size) for name, size in sizes.items()}
    return sizes | blocks | common.precision(inputs.query.dtype)


def _of(tiles: Tiles, align: int) -> dict[str, int]:
    return {"ALIGN": align, "BLOCK_N": tiles.block_n, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _bias_strides(bias: Tensor | None) -> list[int]:
    """The four strides of a bias that broadcasts, 0 on every axis of size 1 or missing."""
    if bias is None:
        return [0, 0, 0, 0]
    steps = [stride if size > 1 else 0 for stride, size in zip(bias.stride(), bias.shape, strict=True)]
    return [0] * (4 - bias.ndim) + steps


class Backward(NamedTuple):
    """A plan: whether inputs must be copied first, shapes of the partial sums of dP and dA, and a launch a pass."""

    copies: bool
    agents: tuple[int, ...]
    matrix: tuple[int, ...]
    broadcast: Launch
    aggregation: Launch | None


def backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value (B, tokens, H, ...), agents (B, H, M, D) and both biases; None if not needed.

    Arguments: the gradient (B, N, H, E), the first seven tensors of `Inputs`, the state that the forward pass kept,
    numbers, grid, and whether anything that comes through the aggregation, and each of the biases, has a gradient.
    Gradients of biases have four axes.
    """
    grad, *tensors, state, numbers, grid, needs = arguments
    grad, needs = grad.transpose(1, 2), tuple(needs)
    plan = common.planned(_plan_backward, (*tensors, grad), tuple(numbers), tuple(grid), needs)
    if plan.copies:
        *tensors, _ = _row_strided((*tensors, None))
        grad = common.row_strided(grad)
    query, key, value, agents, aggregation_bias, broadcast_bias, weight = tensors
    agents_parts = common.empty(plan.agents, torch.float32, query.device)
    matrix = common.empty(plan.matrix, torch.float32, query.device)
    query_grad, key_grad, value_grad = _heads_last(query), None, None
    buffers = [
        _bias_buffer(aggregation_bias, agents, key, needs[1]),
        _bias_buffer(broadcast_bias, query, agents, needs[2]),
    ]
    plan.broadcast(
        query, grad, agents, state, None, broadcast_bias, None, None,
        query_grad, None, agents_parts, matrix, buffers[1],
    )  # fmt: skip
    if plan.aggregation is not None:
        matrix = matrix.squeeze(2) if matrix.shape[2] == 1 else matrix.sum(2)
        key_grad, value_grad = _heads_last(key), _heads_last(value)
        plan.aggregation(
            key, value, agents, matrix, state, aggregation_bias, weight, grad,
            key_grad, value_grad, agents_parts, None, buffers[0],
        )  # fmt: skip
    biases = zip(buffers, (aggregation_bias, broadcast_bias), strict=True)
    bias_grads = [None if x is None else x.sum_to_size(common.four_axes(bias.shape)) for x, bias in biases]
    return query_grad, key_grad, value_grad, agents_parts.sum(2).to(agents.dtype), *bias_grads


def _heads_last(tensor: Tensor) -> Tensor:
    batch, heads, tokens, width = tensor.shape
    return common.empty((batch, tokens, heads, width), tensor.dtype, tensor.device)


def _bias_buffer(bias: Tensor | None, rows: Tensor, columns: Tensor, needed: bool) -> Tensor | None:
    """For the gradients of all elements of the batch, to be summed over the axes that the bias has not."""
    if bias is None or not needed:
        return None
    return common.empty((*rows.shape[:3], columns.shape[2]), bias.dtype, rows.device)


def _plan_backward(
    tensors: Tensors, numbers: tuple[float, ...], grid: tuple[int, int], needs: tuple[bool, ...]
) -> Backward:
    inputs, copies = _copies((*tensors[:-1], None))
    grad, options = tensors[-1], Options._make((*numbers, *grid))
    query, key, value, agents, aggregation_bias, broadcast_bias, _, _ = inputs
    copies, grad = copies or grad.stride(-1) != 1, common.row_strided(grad)
    tiles = backward_tiles(*_sizes(inputs))
    (batch, heads, num_agents, width), value_width = agents.shape, value.shape[3]
    align = common.alignment(query, key, value, agents, grad)
    constants = _constants(inputs) | _of(tiles, align)
    programs = 2 * common.multiprocessors(query.device)
    first = common.splits(query.shape[2], batch * heads, tiles.block_n, programs)
    second = common.splits(key.shape[2], batch * heads, tiles.block_n, programs) if needs[0] else (0, 0)
    parts = first[0] + second[0]

    def through(x: Tensor, y: Tensor, bias: list[int], splits: tuple[int, int], before: int, scale: float) -> Launch:
        shortcut = None if y is grad else options.shortcut or None
        numbers = (
            *(batch, heads, x.shape[2], *splits, before, parts, options.height, options.width),
            *(scale * common.LOG2E, options.gain, shortcut),
            *(step for tensor in (x, y, agents, grad) for step in common.strides(tensor, align)),
            *bias,
        )
        return Launch(differentiate, batch * heads * splits[0], numbers, constants)

    by_broadcast = through(query, grad, _bias_strides(broadcast_bias), first, 0, options.broadcast_scale)
    by_aggregation = None
    if needs[0]:
        *outer, of_agents, of_keys = _bias_strides(aggregation_bias)
        by_aggregation = through(key, value, [*outer, of_keys, of_agents], second, first[0], options.scale)
    shapes = (batch, heads, parts, num_agents, width), (batch, heads, first[0], num_agents, value_width)
    return Backward(copies, *shapes, by_broadcast, by_aggregation)
