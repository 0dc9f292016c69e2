"""What the rows of the zoo share: `Tiny`, weights that make every layer matter, and inputs without the global RNG."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
"""Frames, rows and columns of image tokens."""

IMAGES: tuple[Grid, Grid] = ((1, 4, 6), (1, 8, 4))
"""Token grids of the image models, where a class does not need others."""

_LAYOUTS = {3: "bnc", 4: "bchw", 5: "bcfhw"}


def build(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A `Tiny.build` for a class of diffusers."""
    return lambda: getattr(diffusers, name)(**config)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a shape; the global RNG is untouched."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(grid: Grid, batch: int, channels: int, seed: int = 0) -> Tensor:
    """Latents (batch, tokens, channels) of a grid, one token after the other."""
    return noise(batch, math.prod(grid), channels, seed=seed)


def times(batch: int, most: float = 1000.0) -> Tensor:
    """Timesteps (batch,), different for every sample, on a clock that runs from 0 to `most`."""
    return most * (0.7 - 0.2 * torch.arange(batch) / batch)


def lengths(batch: int, length: int) -> list[int]:
    """Number of true text tokens of each sample, all smaller than `length`: every mask has padding."""
    return [length - 1 - sample % 3 for sample in range(batch)]


def text_mask(batch: int, length: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Mask (batch, length) of text tokens padded on the right, 1 or True where a token counts."""
    return (torch.arange(length) < torch.tensor(lengths(batch, length))[:, None]).to(dtype)


def positions(grid: Grid, frame: int = 0, axes: int = 3) -> Tensor:
    """Ids (tokens, axes) of the tokens of a grid: `frame` plus the frame, row, column, and zeros in further axes."""
    axis = [torch.arange(frame, frame + grid[0]), torch.arange(grid[1]), torch.arange(grid[2])]
    ids = torch.stack(torch.meshgrid(*axis, indexing="ij"), -1).reshape(-1, 3).float()
    return nn.functional.pad(ids, (0, axes - 3))


def corner_of(layout: str) -> Callable[[Tensor, Grid, bool], Tensor]:
    """A `Tiny.corner` for latents whose axes are the letters of `layout`.

    `f`, `h` and `w` are frames, rows and columns of latents, `n` packed tokens of which the first frames · rows ·
    columns are the sample's; all other axes (batch, channels) are changed whole.
    """

    def corner(latents: Tensor, grid: Grid, last: bool) -> Tensor:
        tokens = dict(zip("fhwn", (*grid, math.prod(grid)), strict=True))
        place: list[slice] = [slice(None)] * latents.ndim
        for axis, letter in enumerate(layout):
            if letter in tokens:
                size = latents.shape[axis] // tokens[letter] if letter != "n" else 1
                start = size * (tokens[letter] - 1) if last else 0
                place[axis] = slice(start, start + size)
        changed = latents.clone()
        changed[tuple(place)] += 1.0
        return changed

    return corner


def change_corner(latents: Any, grid: Grid, last: bool) -> Any:
    """The latents with those of the first (or last) image token of every sample changed by 1, others untouched.

    Takes packed (B, N, C), (B, C, H, W) or (B, C, F, H, W), or a list of samples (C, F, H, W).
    """
    if isinstance(latents, list):
        return [corner_of("cfhw")(sample, grid, last) for sample in latents]
    return corner_of(_LAYOUTS[latents.ndim])(latents, grid, last)


def change_tail(latents: Tensor, grid: Grid, last: bool) -> Tensor:
    """`change_corner` for packed latents (B, N, C) in which the sample's tokens are the last ones."""
    rest = latents.shape[1] - math.prod(grid)
    return torch.cat([latents[:, :rest], change_corner(latents[:, rest:], grid, last)], 1)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def everything(output: Any) -> Tensor:
    """All tensors of a model's output, each (B, …), as one flat tensor in which a sample's numbers are contiguous."""
    return torch.cat([value.flatten(1) for value in _tensors(output)], 1).float().flatten()


def list_of_samples(output: Any) -> Tensor:
    """The same for an output that is a list of tensors, one for each sample, without an axis of samples."""
    return torch.cat([value.flatten() for value in _tensors(output)]).float()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights of a model, so that no layer, gate or output of it is zero.

    Matrices and kernels are normal with variance 1 / fan-in; weights that are all ones (norms) are 1 plus a tenth of a
    normal number, all other vectors and scalars (biases, gates) a tenth of one.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            drawn = torch.empty_like(weight)
            if weight.ndim > 1:
                kernel = isinstance(module, nn.modules.conv._ConvNd)
                fan_in = weight[0].numel() if kernel else weight.shape[-1]
                weight.copy_(drawn.normal_(0, fan_in**-0.5, generator=generator))
            else:
                weight.copy_(drawn.normal_(0, 0.1, generator=generator) + float(bool((weight == 1).all())))
    return model


@dataclass(frozen=True)
class Tiny:
    """One of diffusers' denoisers, small."""

    name: str
    """Class name in diffusers, with a variant after "@"."""

    build: Callable[[], nn.Module]
    """Calls the constructor."""

    inputs: Callable[[Grid, int], dict[str, Any]]
    """(frames, rows, columns) of the image tokens of the sample, batch → keyword arguments of forward."""

    grids: tuple[Grid, Grid] = IMAGES
    """Two token grids to run it at, not square, of 24 tokens or more."""

    latents: str = "hidden_states"
    """The argument that holds the latents."""

    drawn: Callable[[Any], Tensor] = everything
    """The model's output → one flat float tensor of all it predicts, sample after sample."""

    corner: Callable[[Any, Grid, bool], Any] = change_corner
    """(latents, grid, last) → the latents with those of the first or last image token changed, and no others."""

    note: str = ""

    @property
    def cls(self) -> str:
        """Class name in diffusers, without the variant."""
        return self.name.partition("@")[0]

    def model(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, weights drawn from `seed` by `randomise`; the global RNG is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for what is drawn at construction and is not a parameter
            model = self.build()
        return randomise(model, seed).eval()


def rows(*tiny: Tiny) -> dict[str, Tiny]:
    """Rows by name."""
    return {one.name: one for one in tiny}
