"""What a model computes besides the attention products of its patched layers, estimated from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from attngen.checks import Grid
from attngen.hosts.families import family_of, halved, halvings, has_levels

_OF_VECTORS = re.compile(r"norm|modulation|(^|[._])mod([._]|$)|ada|time|emb|guidance|pooled|router")
_OF_TEXT = re.compile(r"add_|context|txt|text|caption|encoder|attn2\.to_[kv]|cross_attn\.to_[kv]")


def matrices(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and operations a token, two a multiply-add, of each linear layer and convolution."""
    for name, module in model.named_modules():
        sides: Any = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(sides[0], int) and isinstance(sides[1], int):
            yield name, 2 * sides[0] * sides[1]
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield name, 2 * module.weight[0].numel() * module.out_channels


def other_flops(model: nn.Module, grid: Grid, text: int, references: int = 0) -> int:
    """Operations of one sample and call besides attention products, in linear layers and convolutions.

    Every weight of these counts once for each token that it sees, by its name: those of text the text's, those that
    make scales and shifts of a timestep none, the others the tokens of image and references, and of text where no
    weights are the text's own.

    Args:
        model: the denoiser.
        grid: of the latents of a UNet, of the tokens of a transformer.
        text: text tokens in joint attention.
        references: tokens of reference images.
    """
    family = family_of(model)
    levels = family is not None and has_levels(family)
    found = [(name, each) for name, each in matrices(model) if not _OF_VECTORS.search(name)]
    blocks = {_block(name) for name, _ in found if _OF_TEXT.search(name)}
    total = 0
    for name, each in found:
        if _OF_TEXT.search(name):
            total += each * text
        elif levels:
            total += each * math.prod(halved(grid, halvings(model, name)))
        else:
            total += each * (math.prod(grid) + references + (0 if _block(name) in blocks else text))
    return total


def _block(name: str) -> str:
    """The block that a module is in: its name up to the first number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
