"""A kernel that shows which programs run one after another. Importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attngen.kernels.triton.tiles import place


@triton.jit
def write_place(places, batch, heads, tiles, BATCH_FIRST: tl.constexpr):
    b, h, tile = place(batch, heads, tiles, BATCH_FIRST)
    places += tl.program_id(0) * 3
    tl.store(places, b)
    tl.store(places + 1, h)
    tl.store(places + 2, tile)


def places(batch: int, heads: int, tiles: int, batch_first: bool) -> list[tuple[int, ...]]:
    """(b, h, tile) of all programs, in their order."""
    found = torch.zeros(batch * heads * tiles, 3, dtype=torch.int64)
    write_place[(len(found),)](found, batch, heads, tiles, batch_first)
    return [tuple(row) for row in found.tolist()]
