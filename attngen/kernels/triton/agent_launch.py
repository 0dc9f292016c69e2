"""Buffers, tile sizes and launches of the agent attention kernels. Importing it needs Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngen.kernels.triton import agent_backward as backward_kernels
from attngen.kernels.triton import agent_forward as forward_kernels
from attngen.kernels.triton import agent_tiles as choose
from attngen.kernels.triton import common

# Up to this many bytes of partial sums every broadcast program combines its head's splits itself, which saves a launch.
_COMBINED_IN_PLACE = 32 * 1024


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    grid: tuple[int, int],
    keep: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, H, E); where `keep`, also gain · A (B, H, M, E), float32, and log-sums (B, H, M)."""
    query, key, value, agents = (common.row_strided(x) for x in (query, key, value, agents))
    weight, weight_bias = (None if x is None else x.contiguous() for x in (weight, weight_bias))
    (batch, heads, num_queries, _), num_agents = query.shape, agents.shape[2]
    tiles = choose.broadcast_tiles(num_agents, *_kind(query, value))
    single = num_agents <= tiles.block_m
    combine = keep or not single
    aggregated, lse, splits = _aggregate(query, key, value, agents, scale, aggregation_bias, combine)
    if gain != 1:
        aggregated *= gain  # each split's part; they are added up later
    align = common.alignment(query, agents, value)
    output = common.empty((batch, num_queries, heads, value.shape[-1]), query.dtype, query.device)
    common.launch(
        forward_kernels.broadcast,
        batch * heads * -(-num_queries // tiles.block_n),
        query,
        agents,
        aggregated,
        None if splits == 1 else lse,
        broadcast_bias,
        value,
        weight,
        weight_bias,
        output,
        batch,
        num_agents,
        num_queries,
        splits,
        heads,
        *grid,
        broadcast_scale * common.LOG2E,
        shortcut,
        *common.strides(query, align),
        *common.strides(agents, align),
        *common.strides(value, align),
        *_bias_strides(broadcast_bias),
        SHORTCUT=shortcut != 0,
        SINGLE=single,
        **_constants(query, value, align, tiles),
    )
    if keep:
        return output, aggregated.view(batch, heads, num_agents, -1), lse.view(batch, heads, num_agents)
    return output, common.empty((0,), torch.float32, query.device), common.empty((0,), torch.float32, query.device)


def _aggregate(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, scale: float, bias: Tensor | None, combine: bool
) -> tuple[Tensor, Tensor, int]:
    """A (B, H, S, M, E), its log-sums (B, H, S, M) and S: 1 if they had to be, or were cheaper, combined."""
    (batch, heads, num_agents, _), (num_keys, width) = agents.shape, value.shape[2:]
    tiles = choose.aggregate_tiles(num_agents, *_kind(query, value))
    chunks = -(-num_agents // tiles.block_m)
    processors = common.multiprocessors(query.device)
    splits, split_size = choose.splits(num_keys, batch * heads * chunks, tiles.block_n, processors)
    align = common.alignment(agents, key, value)
    partial = common.empty((batch, heads, splits, num_agents, width), torch.float32, query.device)
    lse = common.empty((batch, heads, splits, num_agents), torch.float32, query.device)
    common.launch(
        forward_kernels.aggregate,
        batch * heads * chunks * splits,
        agents,
        key,
        value,
        bias,
        partial,
        lse,
        batch,
        num_agents,
        num_keys,
        splits,
        split_size,
        heads,
        scale * common.LOG2E,
        *common.strides(agents, align),
        *common.strides(key, align),
        *common.strides(value, align),
        *_bias_strides(bias),
        **_constants(query, value, align, tiles),
    )
    if splits == 1 or not combine and splits * num_agents * width * 4 <= _COMBINED_IN_PLACE:
        return partial, lse, splits
    whole = common.empty((batch, heads, 1, num_agents, width), torch.float32, query.device)
    whole_lse = common.empty((batch, heads, 1, num_agents), torch.float32, query.device)
    part0, part1 = common.split_width(width)
    # Few programs with little work each: small chunks spread them over more multiprocessors.
    common.launch(
        forward_kernels.combine,
        batch * heads * -(-num_agents // 16),
        partial,
        lse,
        whole,
        whole_lse,
        num_agents,
        splits,
        E=width,
        E0=part0,
        E1=part1,
        BLOCK_M=16,
        num_warps=4,
        num_stages=3,
    )
    return whole, whole_lse, 1


def _kind(query: Tensor, value: Tensor) -> tuple[tuple[int, int], torch.dtype, str]:
    """What tile sizes depend on beside the agents: head sizes, dtype and how float32 is multiplied."""
    return (query.shape[-1], value.shape[-1]), query.dtype, common.dot_precision(query.dtype)


def _constants(query: Tensor, value: Tensor, align: int, tiles: choose.Tiles) -> dict[str, Any]:
    """The constants that all kernels but `combine` share."""
    width, value_width = query.shape[-1], value.shape[-1]
    part0, part1 = common.split_width(width)
    value_part0, value_part1 = common.split_width(value_width)
    return {
        "D": width,
        "D0": part0,
        "D1": part1,
        "E": value_width,
        "E0": value_part0,
        "E1": value_part1,
        "ALIGN": align,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": common.dot_precision(query.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _bias_strides(bias: Tensor | None) -> list[int]:
    """The four strides of a bias that broadcasts, 0 on every axis of size 1 or missing."""
    if bias is None:
        return [0, 0, 0, 0]
    steps = [stride if size > 1 else 0 for stride, size in zip(bias.stride(), bias.shape, strict=True)]
    return [0] * (4 - bias.ndim) + steps


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    aggregated: Tensor,
    lse: Tensor,
    scale: float,
    broadcast_scale: float,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    shortcut: float,
    weight: Tensor | None,
    grid: tuple[int, int],
    needs: tuple[bool, bool, bool],
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value (B, tokens, H, ...), agents (B, H, M, D) and both biases.

    Those of the biases are (1 or B, 1 or H, 1 or M, 1 or tokens), agents before tokens. `grad` is (B, N, H, E), and
    `aggregated` and `lse` are what the forward pass kept. `needs` says whether the aggregation is passed at all, and
    whether the biases of aggregation and broadcast have gradients; what is not needed is empty.
    """
    query, key, value, agents = (common.row_strided(x) for x in (query, key, value, agents))
    weight = None if weight is None else weight.contiguous()
    (batch, heads, num_queries, width), (num_keys, value_width) = query.shape, value.shape[2:]
    state = _Backward(query, key, value, agents, aggregated, common.row_strided(grad.transpose(1, 2)), lse)
    missing = [common.empty((0,), torch.float32, query.device) for _ in range(4)]

    query_splits = state.splits(num_queries)
    key_splits, key_split_size = state.splits(num_keys) if needs[0] else (0, 0)
    parts = (batch, heads, query_splits[0] + key_splits, agents.shape[2], width)
    agents_parts = common.empty(parts, torch.float32, query.device)
    query_grad = common.empty((batch, num_queries, heads, width), query.dtype, query.device)
    aggregated_grad = state.through_broadcast(
        query_grad, agents_parts, query_splits, broadcast_scale * common.LOG2E, broadcast_bias
    )
    broadcast_bias_grad = missing[0]
    if needs[2] and broadcast_bias is not None:
        broadcast_bias_grad = state.broadcast_bias_gradient(broadcast_scale * common.LOG2E, broadcast_bias)
    key_grad, value_grad, aggregation_bias_grad = missing[1:]
    if needs[0]:
        key_grad = common.empty((batch, num_keys, heads, width), key.dtype, key.device)
        value_grad = common.empty((batch, num_keys, heads, value_width), value.dtype, value.device)
        means = (aggregated_grad * aggregated).sum(-1)
        # The means do not change, for what one factor gains the other has lost.
        sums = (aggregated_grad if gain == 1 else aggregated_grad * gain, lse, means)
        state.through_aggregation(
            (key_grad, value_grad, agents_parts),
            sums,
            (key_splits, key_split_size, query_splits[0]),
            scale * common.LOG2E,
            aggregation_bias,
            (shortcut, weight, grid),
        )
        if needs[1] and aggregation_bias is not None:
            aggregation_bias_grad = state.aggregation_bias_gradient(sums, scale * common.LOG2E, aggregation_bias)
    agents_grad = agents_parts.sum(2).to(agents.dtype)
    return query_grad, key_grad, value_grad, agents_grad, aggregation_bias_grad, broadcast_bias_grad


class _Backward:
    """Tensors and sizes that the backward kernels share. `grad` is (B, H, N, E)."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor, aggregated: Tensor, grad: Tensor, lse: Tensor
    ) -> None:
        self.query, self.key, self.value, self.agents = query, key, value, agents
        self.aggregated, self.grad, self.lse = aggregated, grad, lse
        self.batch, self.heads, self.num_agents, _ = agents.shape
        self.tiles = choose.backward_tiles(self.num_agents, *_kind(query, value))
        self.chunks = -(-self.num_agents // self.tiles.block_m)
        self.single = self.chunks == 1
        align = common.alignment(query, key, value, agents, grad)
        self.strides = {
            name: common.strides(tensor, align)
            for name, tensor in (("query", query), ("key", key), ("value", value), ("agents", agents), ("grad", grad))
        }
        self.constants = _constants(query, value, align, self.tiles)
        # Sums of rows over several chunks: log-sums of the broadcast, and means of its raised scores.
        stats = (self.batch, self.heads, 2, query.shape[2])
        self.stats = None if self.single else common.empty(stats, torch.float32, query.device)

    def splits(self, tokens: int) -> tuple[int, int]:
        programs = self.batch * self.heads * self.chunks
        return choose.splits(tokens, programs, self.tiles.block_n, common.multiprocessors(self.query.device))

    def through_broadcast(
        self, query_grad: Tensor, agents_parts: Tensor, splits: tuple[int, int], scale: float, bias: Tensor | None
    ) -> Tensor:
        """Write the gradient of the queries and parts of that of the agents; returns that of A, (B, H, M, E)."""
        number, size = splits
        tokens = self.query.shape[2]
        layout = [
            *self.strides["grad"],
            *self.strides["query"],
            *self.strides["agents"],
            *_bias_strides(bias),
        ]
        tensors = (self.grad, self.query, self.agents, self.aggregated, bias, self.stats)
        if not self.single:
            common.launch(
                backward_kernels.query_backward,
                self.batch * self.heads * -(-tokens // self.tiles.block_n),
                *tensors,
                query_grad,
                self.batch,
                self.num_agents,
                tokens,
                self.heads,
                scale,
                *layout,
                **self.constants,
            )
        shape = (self.batch, self.heads, number, self.num_agents, self.value.shape[-1])
        aggregated_parts = common.empty(shape, torch.float32, self.query.device)
        common.launch(
            backward_kernels.broadcast_backward,
            self.batch * self.heads * self.chunks * number,
            *tensors,
            query_grad,
            agents_parts,
            aggregated_parts,
            self.batch,
            self.num_agents,
            tokens,
            number,
            size,
            agents_parts.shape[2],
            self.heads,
            scale,
            *layout,
            SINGLE=self.single,
            **self.constants,
        )
        return aggregated_parts.squeeze(2) if number == 1 else aggregated_parts.sum(2)

    def broadcast_bias_gradient(self, scale: float, bias: Tensor) -> Tensor:
        tokens = self.query.shape[2]
        number, share = self._batch_shares(bias, tokens)
        shape = (number, self.heads, self.num_agents, tokens)
        parts = common.empty(shape, torch.float32, self.query.device)
        common.launch(
            backward_kernels.broadcast_bias_backward,
            number * self.heads * self.chunks * -(-tokens // self.tiles.block_n),
            self.grad,
            self.query,
            self.agents,
            self.aggregated,
            bias,
            self.stats,
            parts,
            self.batch,
            share,
            self.num_agents,
            tokens,
            self.heads,
            scale,
            *self.strides["grad"],
            *self.strides["query"],
            *self.strides["agents"],
            *_bias_strides(bias),
            SINGLE=self.single,
            **self.constants,
        )
        batch, heads, rows, columns = common.four_axes(bias.shape)
        return parts.sum_to_size(batch, heads, columns, rows).to(bias.dtype)

    def through_aggregation(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        sums: tuple[Tensor, Tensor, Tensor],
        splits: tuple[int, int, int],
        scale: float,
        bias: Tensor | None,
        branches: tuple[float, Tensor | None, tuple[int, int]],
    ) -> None:
        """Write the gradients of keys and values, and the rest of the parts of that of the agents.

        Args:
            gradients: buffers for keys, values and parts of the agents.
            sums: gradient of A, log-sums, and means of the raised scores.
            splits: number and size of the splits of the keys, and how many of the agents' parts are before them.
            scale: of the scores, to base 2.
            bias: of the aggregation.
            branches: share of the values in the output, weight of the convolution, its grid.
        """
        key_grad, value_grad, agents_parts = gradients
        number, size, before = splits
        shortcut, weight, grid = branches
        tokens = self.key.shape[2]
        tensors = (self.grad, self.key, self.value, self.agents, *sums, bias, weight, key_grad, value_grad)
        layout = [
            *self.strides["grad"],
            *self.strides["key"],
            *self.strides["value"],
            *self.strides["agents"],
            *_bias_strides(bias),
        ]
        if not self.single:
            common.launch(
                backward_kernels.key_backward,
                self.batch * self.heads * -(-tokens // self.tiles.block_n),
                *tensors,
                self.batch,
                self.num_agents,
                tokens,
                self.heads,
                *grid,
                scale,
                shortcut,
                *layout,
                SHORTCUT=shortcut != 0,
                **self.constants,
            )
        common.launch(
            backward_kernels.aggregation_backward,
            self.batch * self.heads * self.chunks * number,
            *tensors,
            agents_parts,
            self.batch,
            self.num_agents,
            tokens,
            number,
            size,
            before,
            agents_parts.shape[2],
            self.heads,
            *grid,
            scale,
            shortcut,
            *layout,
            SHORTCUT=shortcut != 0,
            SINGLE=self.single,
            **self.constants,
        )

    def aggregation_bias_gradient(self, sums: tuple[Tensor, Tensor, Tensor], scale: float, bias: Tensor) -> Tensor:
        tokens = self.key.shape[2]
        number, share = self._batch_shares(bias, tokens)
        shape = (number, self.heads, self.num_agents, tokens)
        parts = common.empty(shape, torch.float32, self.query.device)
        common.launch(
            backward_kernels.aggregation_bias_backward,
            number * self.heads * self.chunks * -(-tokens // self.tiles.block_n),
            self.key,
            self.value,
            self.agents,
            *sums,
            bias,
            parts,
            self.batch,
            share,
            self.num_agents,
            tokens,
            self.heads,
            scale,
            *self.strides["key"],
            *self.strides["value"],
            *self.strides["agents"],
            *_bias_strides(bias),
            **self.constants,
        )
        return parts.sum_to_size(*common.four_axes(bias.shape)).to(bias.dtype)

    def _batch_shares(self, bias: Tensor, tokens: int) -> tuple[int, int]:
        """(number of programs that share the batch, elements of each) for the gradient of one tile of a bias."""
        if common.four_axes(bias.shape)[0] != 1:
            return self.batch, 1
        programs = self.heads * self.chunks * -(-tokens // self.tiles.block_n)
        return choose.splits(self.batch, programs, 1, common.multiprocessors(self.query.device))
