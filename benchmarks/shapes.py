"""The attention layers to measure, by name: `sd15-512-l0` is the top level of Stable Diffusion 1.5 at 512 px."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIZES = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Shape:
    """One self-attention layer.

    Attributes:
        name: family, picture side in pixels and level.
        heads: attention heads.
        head_dim: size of a head; heads times head size is the width.
        side: height and width in tokens.
        bias: whether queries, keys and values have a bias.
    """

    name: str
    heads: int
    head_dim: int
    side: int
    bias: bool

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side


# Heads, head size and pixels a side of a token for each level of a family.
_FAMILIES: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "sd15": ((8, 40, 8), (8, 80, 16), (8, 160, 32)),
    "sdxl": ((10, 64, 16), (20, 64, 32)),
    "d64": ((8, 64, 16),),
    "sit-s": ((6, 64, 16),),
    "sit-b": ((12, 64, 16),),
    "sit-xl": ((16, 72, 16),),
}


def _all_shapes() -> dict[str, Shape]:
    shapes = {}
    for family, levels in _FAMILIES.items():
        for size in SIZES:
            for level, (heads, head_dim, pixels) in enumerate(levels):
                name = f"{family}-{size}" + (f"-l{level}" if len(levels) > 1 else "")
                shapes[name] = Shape(name, heads, head_dim, size // pixels, family.startswith("sit"))
    return shapes


SHAPES: Mapping[str, Shape] = _all_shapes()


def select(patterns: Sequence[str]) -> list[Shape]:
    """The shapes whose name matches any of the shell patterns, smallest first.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    found: dict[str, Shape] = {}
    for pattern in patterns:
        names = fnmatch.filter(SHAPES, pattern)
        if not names:
            raise ValueError(f"no shape is called {pattern!r}; names are like {', '.join(list(SHAPES)[::7])}")
        found |= {name: SHAPES[name] for name in names}
    return sorted(found.values(), key=lambda shape: (shape.tokens, shape.channels))
