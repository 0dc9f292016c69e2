"""What every attention method has: options that describe themselves, and a route for a layer in a call.

A method is one file: a frozen dataclass derived from `AttentionMethod`, with one `option` a field. Presets, JSON,
labels, the options of the programs and of the page, and the table in the README are derived from these.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from attngen.checks import Grid, check_choice, check_count, check_flag, check_number
from attngen.kernels.like import Like
from attngen.layers.call import Call
from attngen.layers.layer import Layer
from attngen.layers.route import Route

Method = TypeVar("Method", bound="AttentionMethod")


class Option(NamedTuple):
    """One option of a method.

    Attributes:
        name: of the field.
        kind: "count" (whole number), "number", "choice" or "flag".
        default: value where none is given.
        help: one line for users.
        low: smallest value.
        high: largest value that programs offer.
        below: a value that it has to be below, or None.
        step: of a slider.
        choices: of a "choice"; None among them means none.
        optional: whether None is a value.
        shown: whether tables show its value after the method's name.
    """

    name: str
    kind: Literal["count", "number", "choice", "flag"]
    default: Any
    help: str
    low: float = 0
    high: float = 1
    below: float | None = None
    step: float = 1
    choices: tuple[str | None, ...] = ()
    optional: bool = False
    shown: bool = False

    def check(self, value: Any) -> None:
        """Raise ValueError, naming the option, unless it can have this value."""
        if self.optional and value is None:
            return
        if self.kind == "flag":
            check_flag(self.name, value)
        elif self.kind == "choice":
            check_choice(self.name, value, self.choices)
        elif self.kind == "count":
            check_count(self.name, value, at_least=int(self.low))
        else:
            check_number(self.name, value, at_least=self.low, below=self.below)


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a method that describes itself; `limits` are attributes of `Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


class Preset(NamedTuple):
    """A plan with a name: one method in every layer at all times.

    Attributes:
        options: of the method, other than their defaults.
        min_tokens: layers with fewer tokens stay exact.
        max_levels: only so many of the finest attention resolutions take part; None for all.
    """

    options: Mapping[str, Any] = types.MappingProxyType({})
    min_tokens: int = 0
    max_levels: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """Sizes that decide the cost of one attention layer for one sample.

    Attributes:
        grid: (height, width) of the layer's image tokens.
        channels: channels of the hidden states.
        width: heads times head size.
        num_heads: heads.
        context: text tokens that take part in joint attention, else 0.
        has_output: whether the layer projects its output (some leave that to the block).
        has_context_output: the same for the text.
    """

    grid: Grid
    channels: int
    width: int
    num_heads: int = 1
    context: int = 0
    has_output: bool = True
    has_context_output: bool = True

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def projection_flops(self, queries: int, keys: int) -> int:
        """Q and output projections of `queries` tokens, K and V of `keys`, and all of the text tokens."""
        image = queries * (1 + self.has_output) + 2 * keys
        text = self.context * (3 + self.has_context_output)
        return 2 * self.channels * self.width * (image + text)

    def core_flops(self, queries: int, keys: int) -> int:
        """Both products of softmax attention, image queries over image keys and text, and text queries over all."""
        return 4 * self.width * (queries + self.context) * (keys + self.context)

    def exact_flops(self) -> int:
        """The whole layer with softmax attention, in floating-point operations (two a multiply-add)."""
        return self.projection_flops(self.tokens, self.tokens) + self.core_flops(self.tokens, self.tokens)


@dataclass(frozen=True)
class AttentionMethod(ABC):
    """Options of one attention method. Frozen and without state: the same object serves every layer and call.

    Attributes:
        kind: name in JSON.
        title: name to display.
        short: name in tables; `kind` where it is empty.
        source: of the formula, such as "arXiv 2312.08874"; "" where there is none to name.
        presets: by name.
        candidates: options of the variants that calibration tries by default.
        needs_metric: whether the method measures similarity on the transformer block's input.
        supports_rotary: whether it fits layers that rotate queries and keys by position.
        needs_tokens: whether the method works on a layer's input, before its projections.
    """

    kind: ClassVar[str] = ""
    title: ClassVar[str] = ""
    short: ClassVar[str] = ""
    source: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Preset]] = {}
    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    needs_metric: ClassVar[bool] = False
    supports_rotary: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for described in self.options():
            described.check(getattr(self, described.name))

    @abstractmethod
    def route(self, layer: Layer, call: Call, like: Like) -> Route:
        """How a layer is computed by this method.

        Args:
            layer: the layer.
            call: of the denoiser; in a report without metric and draws.
            like: of the layer's input (B, N, C). No other property of the input counts, so a report needs no data.
        """

    @abstractmethod
    def flops(self, shape: LayerShape, kernel: str = "") -> int:
        """Floating-point operations (two a multiply-add) of the whole layer for one sample, by a route's kernel."""

    @property
    def needs_draws(self) -> bool:
        """Whether the method needs `Call.draws`."""
        return False

    # Derived from the fields

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options in the order of the fields."""
        return tuple(_described(field, cls) for field in dataclasses.fields(cls) if "help" in field.metadata)

    @classmethod
    def about(cls) -> str:
        """What the method does, in one sentence: the first of its docstring."""
        first = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        return first.split(". ")[0].rstrip(".") + "."

    @property
    def label(self) -> str:
        """The method and the options that distinguish variants, in a few characters."""
        shown = [getattr(self, o.name) for o in self.options() if o.shown]
        values = [v for v in shown if v not in (None, False)]
        return " ".join([self.short or self.kind, *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON: `{"method": kind, option: value, …}`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.kind, **{n: [*v] if type(v) is tuple else v for n, v in values.items()}}

    @classmethod
    def from_options(cls: type[Method], options: Mapping[str, Any]) -> Method:
        """The method with these options.

        Raises:
            ValueError: for an unknown option, naming the known ones, or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"method {cls.kind!r} has no option {name!r}; it has: {', '.join(known) or 'none'}")
        return cls(**options)


_HINTS: dict[type, dict[str, Any]] = {}


def _described(field: dataclasses.Field[Any], cls: type[AttentionMethod]) -> Option:
    """An option from a field: its kind follows from the type."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    hint = _HINTS[cls][field.name]
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    optional = type(None) in parts
    kinds: dict[Any, Literal["count", "number", "flag"]] = {bool: "flag", int: "count", float: "number"}
    (plain,) = [part for part in parts if part is not type(None)]
    limits = dict(field.metadata)
    if typing.get_origin(plain) is Literal:
        choices = (*([None] if optional else []), *typing.get_args(plain))
        return Option(field.name, "choice", field.default, choices=choices, optional=optional, **limits)
    return Option(field.name, kinds[plain], field.default, optional=optional, **limits)


def with_context(key: Tensor, value: Tensor, context: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Image keys and values, followed by the text's where there are any."""
    if context is None:
        return key, value
    return torch.cat([key, context[0]], dim=2), torch.cat([value, context[1]], dim=2)
