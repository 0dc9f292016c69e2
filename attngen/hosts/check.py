"""A row tried on a call of its model: what `attngen.register_model` does with an example."""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attngen.checks import Grid
from attngen.hosts.families import family_of
from attngen.hosts.hooks import RootHook, root_hook
from attngen.hosts.install import Patching, attention_modules, detach, install, patchable_layers
from attngen.layers.call import Call
from attngen.layers.layer import Layer, Selection
from attngen.layers.route import Route
from attngen.layers.trace import COUNTS, Counts
from attngen.methods.base import AttentionMethod, LayerShape, with_context
from attngen.methods.softmax import SoftmaxAttention
from attngen.plan import Plan
from attngen.tokens import join_heads

TOLERANCE = 1e-3
"""Of the output, relative, where each product is computed in another order; half precision takes more of it."""

_LAYOUTS = {3: ("bnc",), 4: ("bchw", "bhwc"), 5: ("bcfhw", "bfchw", "bfhwc")}

_Seen = list[tuple[Tensor, Grid]]
"""Image queries (B, H, N, D) and their grid, layer by layer."""


def check_row(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model's row is right in a call, with the argument of the row that is not.

    Args:
        model: in evaluation mode, without a patch; it is as it was afterwards.
        inputs: arguments of its forward by name.
    """
    family = family_of(model)
    assert family is not None and family.core is not None
    name, core = type(model).__name__, family.core
    if not patchable_layers(model):
        names = [layer for layer, _ in attention_modules(model)]
        has = f"it has {', '.join(names[:3])} …" if names else "it has no module with an attribute `processor`"
        raise ValueError(f"layers={core.layers!r} matches no self-attention module of {name}: {has}")
    want = _output(model, inputs)
    if not torch.equal(_output(model, inputs), want):
        raise ValueError(f"two calls of {name} with the same inputs differ; call eval() and fix its random numbers")
    with _patched(model, SoftmaxAttention()):
        if not torch.equal(_output(model, inputs), want):
            raise ValueError(f"{name} is another with exact attention: its hooks do not reach it, please report this")
    seen: _Seen = []
    with _patched(model, _everything(seen)) as (root, counts):
        got = _output(model, inputs)
        if root.unread is not None:
            raise ValueError(f"grid: {root.unread}")
        if not seen:
            whys = dict.fromkeys(noted.why for noted in counts.eager) or {"no layer was called"}
            raise ValueError(
                f"no product of {name} is over its image: {'; '.join(whys)}; grid, text or layers is wrong"
            )
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        if not error <= TOLERANCE:
            raise ValueError(
                f"keeping every token changes {name} by {error:.1e}: text={core.text!r} or layers={core.layers!r} is"
                " wrong"
            )
        for last in (False, True):
            _check_corner(model, inputs, seen, last)


def _check_corner(model: nn.Module, inputs: Mapping[str, Any], seen: _Seen, last: bool) -> None:
    """The tokens that change most with a corner of the latents have to be that corner's, or beside it."""
    family, (before, grid) = family_of(model), seen[0]
    assert family is not None and family.core is not None
    found: list[int] = []
    for changed in _changed(inputs[family.sample], grid, last):
        seen.clear()
        _output(model, {**inputs, family.sample: changed})
        (after, _), tokens = seen[0], math.prod(grid)
        change = (after - before).abs().amax(dim=(0, 1, 3))
        found.append(int(change.argmax()))
        strong = (change > change.max() / 3).nonzero().flatten().tolist()
        corner = tokens - 1 if last else 0
        if _beside(found[-1], corner, grid, 1) and all(_beside(token, corner, grid, 2) for token in strong):
            break
    else:
        if not found:
            return  # latents of an unknown layout
        sides, which = " x ".join(map(str, grid)), "last" if last else "first"
        raise ValueError(
            f"changing the {which} corner of {family.sample} changes token {found[0]} of the image's {sides} most:"
            f" text={family.core.text!r} puts the image elsewhere, or grid has its sides exchanged"
        )
    seen[:] = [(before, grid)]


def _beside(place: int, corner: int, grid: Grid, most: int) -> bool:
    """Whether a token is the corner's or near it; convolutions before attention spread a change."""
    for side in reversed(grid):
        if abs(place % side - corner % side) > most:
            return False
        place, corner = place // side, corner // side
    return True


def _changed(latents: Any, grid: Grid, last: bool) -> Iterator[Any]:
    """The latents with one corner changed, by each layout that fits the grid."""
    single = isinstance(latents, Tensor)
    samples: list[Tensor] = [latents] if single else list(latents)
    if not samples[0].is_floating_point():
        return  # numbers of a codebook
    for layout in _LAYOUTS.get(samples[0].ndim + (not single), ()):
        for place in _places(layout if single else layout[1:], tuple(samples[0].shape), grid, last):
            changed = [sample.clone() for sample in samples]
            for sample in changed:
                sample[place] = -sample[place].flip(layout.index("c") - (not single)) - 1
            yield changed[0] if single else changed


def _places(axes: str, shape: tuple[int, ...], grid: Grid, last: bool) -> Iterator[tuple[slice, ...]]:
    """Where a corner is in latents of such axes; packed ones ("n") may have other tokens behind or before them."""
    sizes = dict(zip("fhw", (1, *grid)[-3:], strict=True))
    if "n" in axes:
        tokens, length = math.prod(grid), shape[axes.index("n")]
        for start in dict.fromkeys((0, length - tokens)):
            at = start + (tokens - 1 if last else 0)
            yield tuple(slice(at, at + 1) if letter == "n" else slice(None) for letter in axes)
        return
    lengths = {letter: side // sizes[letter] for letter, side in zip(axes, shape, strict=True) if letter in sizes}
    if all(lengths.values()):
        starts = {letter: length * (sizes[letter] - 1) if last else 0 for letter, length in lengths.items()}
        yield tuple(
            slice(starts[letter], starts[letter] + lengths[letter]) if letter in lengths else slice(None)
            for letter in axes
        )


@contextmanager
def _patched(model: nn.Module, method: AttentionMethod) -> Generator[tuple[RootHook, Counts]]:
    """The model with a method in every layer, and a count of its routes."""
    key = uuid.uuid4().hex
    install(model, Patching(Plan.of(method), key, lambda model, seen: None))
    root = root_hook(model)
    assert root is not None
    counts = COUNTS[key] = Counts()
    root.trace = key
    try:
        yield root, counts
    finally:
        detach(model)
        del COUNTS[key]


@torch.no_grad()
def _output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    tensors = list(_tensors(model(**copy.deepcopy(dict(inputs)))))
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _everything(seen: _Seen) -> AttentionMethod:
    """Exact attention computed through the route, and a record of the image queries."""

    @dataclass(frozen=True)
    class Everything(AttentionMethod):
        kind: ClassVar[str] = "everything"

        def route(self, layer: Layer, call: Call, like: Any) -> Route:
            return Route(self._run, "sdpa")

        def _run(self, layer: Layer, hidden_states: Tensor, call: Call) -> Tensor:
            query, key, value = layer.project(Selection(hidden_states, hidden_states))
            seen.append((query, call.grid))
            mixed = layer.attention(query, *with_context(key, value, layer.context))
            return layer.output(join_heads(mixed).to(query.dtype))

        def flops(self, shape: LayerShape, kernel: str = "") -> int:
            return shape.exact_flops()

    return Everything()
