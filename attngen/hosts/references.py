"""Reference images made cheap: one key and one value for each cell of a reference's tokens.

A cell has the mean of its keys and of its values, and weighs as many tokens as it has, so references without detail
stay exact. Means of keys that were rotated by position are no worse than the key at the cell's centre.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from attngen.checks import Grid

Grids = tuple[Grid, ...]
Reader = Callable[[nn.Module, dict[str, Any]], Grids]
"""(model, arguments of its forward by name) -> (height, width) of the tokens of each reference."""


def packed_references(model: nn.Module, arguments: dict[str, Any]) -> Grids:
    """References among FLUX's packed tokens: the first column of the ids differs from the image's, which come first."""
    ids: Tensor | None = arguments.get("img_ids")
    if ids is None:
        return ()
    # Reading waits for the GPU, so it is done once a tensor.
    known = _KNOWN.get(ids)
    if known is None:
        rows = ids[0] if ids.ndim == 3 else ids
        others = rows[rows[:, 0] != rows[0, 0]]
        _, counts = torch.unique_consecutive(others[:, 0], return_counts=True)
        parts = others[:, 1:3].split(counts.tolist())
        known = _KNOWN[ids] = tuple(_extent(part) for part in parts if len(part))
    return known


def _extent(positions: Tensor) -> Grid:
    height, width = (positions.amax(dim=0) - positions.amin(dim=0) + 1).int().tolist()
    return height, width


def shaped_references(model: nn.Module, arguments: dict[str, Any]) -> Grids:
    """References in the shapes that Qwen's models are given for each sample: those after the first, frame by frame."""
    samples: Any = arguments["img_shapes"]
    first = samples[0]
    if not isinstance(first[0], (list, tuple)) or any(list(sample) != list(first) for sample in samples):
        return ()
    return tuple((int(height), int(width)) for frames, height, width in first[1:] for _ in range(int(frames)))


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def num_tokens(grids: Grids) -> int:
    """Tokens of all references."""
    return sum(height * width for height, width in grids)


def num_cells(grids: Grids, factor: int) -> int:
    """Keys that are left of them."""
    return sum(-(-height // factor) * -(-width // factor) for height, width in grids)


def means(x: Tensor, grids: Grids, factor: int) -> Tensor:
    """The mean of each cell: keys or values (B, H, R, D) of all references -> (B, H, cells, D)."""
    parts = x.split([height * width for height, width in grids], dim=2)
    pooled: list[Tensor] = []
    for part, (height, width) in zip(parts, grids, strict=True):
        image = part.flatten(0, 1).transpose(1, 2).unflatten(2, (height, width))
        sides = min(factor, height), min(factor, width)
        cells = F.avg_pool2d(image, sides, ceil_mode=True, count_include_pad=False)
        pooled.append(cells.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2]))
    return torch.cat(pooled, dim=2)


def log_counts(grids: Grids, factor: int, like: Tensor) -> Tensor:
    """(1, 1, cells, 1) logarithm of the number of tokens of each cell, what its key gets as a bias."""
    counts: list[Tensor] = []
    for height, width in grids:
        rows, columns = (
            (side - torch.arange(0, side, factor, device=like.device)).clamp(max=factor) for side in (height, width)
        )
        counts.append((rows[:, None] * columns).flatten())
    return torch.cat(counts).to(torch.promote_types(like.dtype, torch.float32)).log()[None, None, :, None]
