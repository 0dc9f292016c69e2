"""Start the weights of a SiT or DiT from those of another: other attention, classes, resolution or number of mediators.

What attention has beside its projections (position biases, convolution) starts at zero, so the first step is plain
mediator or linear attention on the source's projections. Between resolutions and numbers of mediators the tables of the
position biases are resampled; DiT's table of positions is computed, so it has nothing to resample.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attngen.checks import Grid
from attngen.layers.mediator import MediatorMixer, _resize
from attngen.sit.model import SiTTransformer2DModel
from attngen.tokens import agent_grid
from train.warm.source import Source, read_source

Action = Literal["kept", "adapted", "resampled", "new", "dropped"]
ACTIONS: tuple[Action, ...] = ("kept", "adapted", "resampled", "new", "dropped")
INTERPOLATIONS = ("consistent", "reference")

_BLOCK = re.compile(r"transformer_blocks\.\d+\.")
_TABLE = re.compile(r"(.*\.mixer\.(?:aggregation|broadcast)_bias)\.(map|row|column)")
_LISTED = 8


@dataclass(frozen=True)
class Change:
    """What became of one tensor.

    Attributes:
        name: of the tensor, the model's; the source's if it was dropped.
        action: "kept" as it was, "adapted" (classes or channels in part), "resampled" (a position bias), "new", or
            "dropped".
        before: shape in the source, None for a new tensor.
        after: shape in the model, None for a dropped one.
        note: why, or how.
    """

    name: str
    action: Action
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    note: str = ""


def warm_start(
    model: SiTTransformer2DModel,
    source: str | os.PathLike[str] | Source,
    *,
    interpolation: str = "consistent",
    id2label: Mapping[int, str] | None = None,
    weights: str = "ema",
    allow_pickle: bool = False,
) -> list[Change]:
    """Fill a model with the weights of another, in place; nothing is changed if they do not fit.

    Args:
        model: the network to start. Its attention, classes, size and number of mediators may differ from the source's;
            its width, depth, heads, patches and channels may not.
        source: a path, see `read_source`, or what that returned.
        interpolation: how position biases go to another size. "consistent": as the layer does it at run time, so that
            the model equals the source run at the new size with the new number of mediators. "reference": rows and
            columns with their end points on each other, as the published conversion to higher resolutions; it does not
            change the number of mediators.
        id2label: names of the model's classes. Where the source has names, too, rows of the same name are kept,
            elsewhere rows of the same number. New classes start from the mean of the source's, the null class from the
            null class.
        weights: of a training run, "ema" (the averaged ones) or "model".
        allow_pickle: read a pickled file, with `weights_only=True`.

    Returns:
        What became of every tensor of the model and of the source; `format_changes` makes a table of it.

    Raises:
        ValueError: for an unknown interpolation, a source that cannot be read, or one that does not fit, with the names
            and shapes.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(INTERPOLATIONS)}")
    if isinstance(source, Source):
        found = source
    else:
        heads = model.config["num_attention_heads"]
        found = read_source(source, weights=weights, allow_pickle=allow_pickle, default_heads=heads)
    fitting = _Fitting(model, found, interpolation, id2label)
    tensors = fitting.fit()
    model.load_state_dict(tensors)
    return fitting.changes


class _Fitting:
    """One warm start: collects the model's tensors, what became of them, and what does not fit."""

    def __init__(
        self, model: SiTTransformer2DModel, source: Source, interpolation: str, id2label: Mapping[int, str] | None
    ) -> None:
        self.model, self.source, self.interpolation, self.id2label = model, source, interpolation, id2label
        self.changes: list[Change] = []
        self.problems: list[str] = []

    def fit(self) -> dict[str, Tensor]:
        """The state dict to load; ValueError with everything that does not fit."""
        self._check_settings()
        wanted = self.model.state_dict()
        tensors = {name: self._tensor(name, like).to(like) for name, like in wanted.items()}
        for name, tensor in {**self.source.weights, **self.source.dropped}.items():
            if name in wanted:
                continue
            if name in self.source.dropped:
                self._note(name, "dropped", tensor, None, "the model computes it")
            elif ".mixer." in name:
                self._note(name, "dropped", tensor, None, f"the model has {self.model.config['attention']} attention")
            else:
                self.problems.append(f"{name}: {_shape(tensor)} in the source, not in the model")
        if self.problems:
            rest = len(self.problems) - _LISTED
            listed = "\n  ".join([*self.problems[:_LISTED], *([f"… and {rest} more"] if rest > 0 else [])])
            raise ValueError(f"the checkpoint does not fit the model:\n  {listed}")
        return tensors

    def _check_settings(self) -> None:
        """What shapes do not show."""
        theirs, ours = self.source.settings, self.model.config
        if "num_attention_heads" in theirs and theirs["num_attention_heads"] != ours["num_attention_heads"]:
            self.problems.append(
                f"{theirs['num_attention_heads']} attention heads in the source, {ours['num_attention_heads']} in the"
                " model"
            )
        if theirs.get("predicts_variance", ours["predicts_variance"]) != ours["predicts_variance"]:
            objective = "--objective dit" if theirs["predicts_variance"] else "an --objective other than dit"
            kinds = {
                True: "a DiT (noise and variance, steps 0 to 999)",
                False: "a SiT (times 0 to 1)",
            }
            self.problems.append(
                f"the source is {kinds[bool(theirs['predicts_variance'])]}, the model"
                f" {kinds[ours['predicts_variance']]}; make it with predicts_variance={theirs['predicts_variance']}"
                f" ({objective})"
            )

    def _note(self, name: str, action: Action, before: Tensor | None, after: Tensor | None, note: str = "") -> None:
        old, new = (None if tensor is None else tuple(tensor.shape) for tensor in (before, after))
        self.changes.append(Change(name, action, old, new, note))

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        """The model's tensor `name`, of the shape of `like`."""
        given = self.source.weights.get(name)
        if ".mixer." in name:
            return self._mixer_tensor(name, like, given)
        if given is not None and name == "class_embedder.weight" and given.shape[1:] == like.shape[1:]:
            return self._classes(given, like)
        if given is not None and name.startswith("proj_out.") and given.shape != like.shape:
            channels = self._channels(given, like)
            if channels is not None:
                return self._output(name, given, like, *channels)
        if given is not None and given.shape == like.shape:
            self._note(name, "kept", given, like)
            return given
        there = "missing" if given is None else str(_shape(given))
        self.problems.append(f"{name}: {there} in the source, {_shape(like)} in the model")
        return like

    # Attention's own tensors

    def _mixer_tensor(self, name: str, like: Tensor, given: Tensor | None) -> Tensor:
        table = _TABLE.fullmatch(name)
        zeros = torch.zeros_like(like)
        if given is None:
            self._note(name, "new", None, like, "zero")
            return zeros
        if table is not None:
            return self._position_table(name, table[1], table[2], given, like)
        ours = self.model.config["convolution"]
        theirs = self.source.settings.get("convolution", ours)
        if name.split(".mixer.")[1].startswith("dwc.") and theirs != ours:
            self._note(name, "new", None, like, f"zero: the source convolves its {theirs}, the model its {ours}")
            return zeros
        if given.shape == like.shape:
            self._note(name, "kept", given, like)
            return given
        self.problems.append(f"{name}: {_shape(given)} in the source, {_shape(like)} in the model")
        return like

    def _position_table(self, name: str, bias: str, kind: str, given: Tensor, like: Tensor) -> Tensor:
        """A table of a position bias at the model's grid and mediators."""
        mixer = self.model.get_submodule(bias.rpartition(".")[0])
        assert isinstance(mixer, MediatorMixer)
        row, column = (self.source.weights.get(f"{bias}.{axis}") for axis in ("row", "column"))
        if row is None or column is None or given.shape[0] != like.shape[0]:
            self.problems.append(f"{name}: {_shape(given)} in the source, {_shape(like)} in the model")
            return like
        grid = row.shape[-1], column.shape[-1]
        mediators = self._mediators(row.shape[1], grid)
        if mediators is None:
            self.problems.append(
                f"{name}: {row.shape[1]} mediators do not tell their rows and columns on {_by(grid)} tokens; give the"
                " num_mediators that the source was made with to read_source"
            )
            return like
        same_grid, same_mediators = grid == tuple(mixer.grid), mediators == tuple(mixer.mediators)
        if same_mediators and (same_grid or kind == "map"):
            self._note(name, "kept", given, like)
            return given
        if self.interpolation == "reference" and not same_mediators:
            self.problems.append(
                f"{name}: {mediators[0]} x {mediators[1]} mediators in the source, {mixer.mediators[0]} x"
                f" {mixer.mediators[1]} in the model; the reference's rule keeps their number, so use"
                " interpolation='consistent'"
            )
            return like
        resampled = _resampled(given.float(), kind, mediators, mixer, self.interpolation)
        note = f"{_by(mediators)} mediators on {_by(grid)} tokens → {_by(mixer.mediators)} on {_by(mixer.grid)}"
        self._note(name, "resampled", given, like, note)
        return resampled

    def _mediators(self, count: int, grid: Grid) -> Grid | None:
        """Rows and columns of the source's mediators, chosen as its layers did; None where that cannot be told."""
        told = self.source.settings.get("num_mediators")
        # Layers take no more mediators than asked for, so several numbers lead to one count.
        candidates = range(count, 2 * count + 1) if told is None else [told]
        found = {agent_grid(each, grid) if isinstance(each, int) else tuple(each) for each in candidates}
        found = {mediators for mediators in found if math.prod(mediators) == count}
        return found.pop() if len(found) == 1 else None

    # Classes and output channels

    def _classes(self, given: Tensor, like: Tensor) -> Tensor:
        """The rows of the classes, the null class last."""
        theirs, ours = len(given) - 1, len(like) - 1
        matches = self._matching_classes(theirs, ours)
        if theirs == ours and all(matches.get(number) == number for number in range(ours)):
            self._note("class_embedder.weight", "kept", given, like)
            return given
        mean = given[:-1].double().mean(0).to(given)
        rows = [given[matches[number]] if number in matches else mean for number in range(ours)]
        new, left = ours - len(matches), theirs - len(set(matches.values()))
        note = f"{len(matches)} classes kept, {new} new from the mean, {left} dropped"
        self._note("class_embedder.weight", "adapted", given, like, note)
        return torch.stack([*rows, given[-1]])

    def _matching_classes(self, theirs: int, ours: int) -> dict[int, int]:
        """The source's number of each of the model's classes that it has."""
        if self.id2label is None or self.source.id2label is None:
            return {number: number for number in range(min(theirs, ours))}
        by_name = {label.strip().casefold(): number for number, label in self.source.id2label.items()}
        named = {number: by_name.get(label.strip().casefold()) for number, label in self.id2label.items()}
        return {n: found for n, found in named.items() if found is not None and n < ours and found < theirs}

    def _channels(self, given: Tensor, like: Tensor) -> tuple[int, int] | None:
        """Output channels of the source and the model, where they differ by the unused second half alone."""
        cells = self.model.config["patch_size"] ** 2
        theirs, ours = given.shape[0] // cells, like.shape[0] // cells
        channels = self.model.config["in_channels"]
        fits = given.shape[0] == theirs * cells and {theirs, ours} == {channels, 2 * channels}
        return (theirs, ours) if fits and given.shape[1:] == like.shape[1:] else None

    def _output(self, name: str, given: Tensor, like: Tensor, theirs: int, ours: int) -> Tensor:
        """The projection to patches with half or twice the channels; a SiT does not use the second half."""
        by_channel = given.unflatten(0, (-1, theirs))
        if ours < theirs:
            self._note(name, "adapted", given, like, f"{ours} of {theirs} channels kept")
            return by_channel[:, :ours].flatten(0, 1)
        self._note(name, "adapted", given, like, f"{theirs} channels kept, {ours - theirs} new at zero")
        return torch.cat([by_channel, torch.zeros_like(by_channel)], dim=1).flatten(0, 1)


def _resampled(table: Tensor, kind: str, mediators: Grid, mixer: MediatorMixer, interpolation: str) -> Tensor:
    """A table (H, M, …) for the mediators and grid of `mixer`; see `PositionBias.forward`, which does the same."""
    if mediators != tuple(mixer.mediators):
        rest = table.shape[2:]
        by_grid = table.flatten(2).transpose(1, 2).unflatten(2, mediators)
        table = _resize(by_grid, mixer.mediators, antialias=True).flatten(2).transpose(1, 2).unflatten(2, rest)
    if kind == "map":
        return table
    length = mixer.grid[0] if kind == "row" else mixer.grid[1]
    if interpolation == "reference":
        return F.interpolate(table, size=length, mode="linear", align_corners=True)
    if kind == "row":
        return _resize(table.unsqueeze(-1), (length, 1)).squeeze(-1)
    return _resize(table.unsqueeze(-2), (1, length)).squeeze(-2)


# Reporting


def format_changes(changes: Sequence[Change]) -> str:
    """A short table: tensors of the same name in all blocks, and the same fate, in one line."""
    groups: dict[tuple[str, str, str, str], int] = {}
    for change in sorted(changes, key=lambda change: ACTIONS.index(change.action)):
        shapes = " → ".join(str(list(shape)) for shape in (change.before, change.after) if shape is not None)
        if change.before == change.after:
            shapes = str(list(change.after or ()))
        key = change.action, _BLOCK.sub("transformer_blocks.*.", change.name), shapes, change.note
        groups[key] = groups.get(key, 0) + 1
    kept = sum(count for (action, *_), count in groups.items() if action == "kept")
    lines = [f"kept       {kept} tensors"] if kept else []
    for (action, name, shapes, note), count in groups.items():
        if action != "kept":
            times = f" ×{count}" if count > 1 else ""
            lines.append(f"{action:<10} {name}{times} {shapes}{': ' if note else ''}{note}")
    return "\n".join(lines)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _by(size: Grid) -> str:
    return f"{size[0]} x {size[1]}"
