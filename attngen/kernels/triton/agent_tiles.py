"""Tile sizes, warps and splits of the agent attention kernels: plain functions of the shapes, so nothing is timed.

Chosen from what the compiler reports for Hopper (255 registers a thread, 227 KB of shared memory a multiprocessor): the
largest tiles that spill nothing, or next to nothing, and leave room for a second program on the multiprocessor.
Forward tiles load ahead because those kernels wait for memory; backward tiles are bound by registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attngen.kernels.triton.common import power_of_two, split_width


class Tiles(NamedTuple):
    """How one kernel cuts its work: agents and tokens of a tile, warps of a program, tiles loaded ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def aggregate_tiles(num_agents: int, widths: tuple[int, int], dtype: torch.dtype, precision: str) -> Tiles:
    """For the pass over keys and values, of head sizes `widths`."""
    width = _width(widths)
    if _multiplies_in_float32(dtype, precision):
        return _scalar_tiles(width)
    if precision == "tf32":
        return Tiles(_chunk(num_agents, 64), 32, 4, 2 if width <= 128 else 1)
    return Tiles(_chunk(num_agents, 64), 64 if width <= 160 else 32, 4, 3 if width <= 128 else 2)


def broadcast_tiles(num_agents: int, widths: tuple[int, int], dtype: torch.dtype, precision: str) -> Tiles:
    """For the pass over the queries. It has no loop to load ahead in, but tiles enough to hide each other's waiting."""
    width = _width(widths)
    if _multiplies_in_float32(dtype, precision):
        return _scalar_tiles(width)
    if precision == "tf32":
        return Tiles(_chunk(num_agents, 64), 64 if width <= 64 else 32, 4, 1)
    # Agents and aggregated values are read again by every tile, from the L2 cache: the more queries, the less of that.
    return Tiles(_chunk(num_agents, 64), 128 if width <= 128 else 64, 8, 2)


def backward_tiles(num_agents: int, widths: tuple[int, int], dtype: torch.dtype, precision: str) -> Tiles:
    """For all backward kernels, which hold sums as large as the agents and gradients as large as the tile at once."""
    width = _width(widths)
    if _multiplies_in_float32(dtype, precision):
        return _scalar_tiles(width)
    if precision == "tf32" or width > 160:
        return Tiles(_chunk(num_agents, 32 if width > 128 else 64), 32, 8, 1)
    chunk = _chunk(num_agents, 64)
    return Tiles(chunk, 32, 4 if chunk == 16 else 8, 2)


def splits(tokens: int, programs: int, block_n: int, multiprocessors: int) -> tuple[int, int]:
    """(number, tokens of each) of the splits of `tokens` so that each of `programs` becomes enough for the device.

    Two programs a multiprocessor hide each other's waiting. Each split is a whole number of tiles, and none is empty.
    """
    tiles = -(-tokens // block_n)
    wanted = min(tiles, max(1, -(-2 * multiprocessors // programs)))
    size = -(-tiles // wanted)
    return -(-tiles // size), size * block_n


def _width(widths: tuple[int, int]) -> int:
    """Columns of the wider of the two tiles, padding included."""
    return max(sum(split_width(width)) for width in widths)


def _chunk(num_agents: int, most: int) -> int:
    """Agents of a tile: a power of two, at least the 16 of a matrix instruction."""
    return min(max(16, power_of_two(num_agents)), most)


def _multiplies_in_float32(dtype: torch.dtype, precision: str) -> bool:
    return dtype == torch.float32 and precision == "ieee"


def _scalar_tiles(width: int) -> Tiles:
    """Without matrix units every thread holds whole rows and columns of the factors, so only small tiles fit."""
    return Tiles(16, 32 if width <= 64 else 16, 4, 1)
