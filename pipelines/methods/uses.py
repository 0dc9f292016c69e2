"""A use of an attention method: its name and options, as people type them and as a comparison has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines.cli import UserError
from pipelines.methods.catalogue import METHODS
from pipelines.methods.counts import Part
from pipelines.methods.options import PLAN, UNCHANGED, MethodInfo, plain, short


class Use(NamedTuple):
    """A method with options, as one row of a comparison."""

    method: str = UNCHANGED
    options: Mapping[str, Any] = {}

    def checked(self) -> Use:
        """The same with every option.

        Raises:
            UserError: for an unknown method or option, or a bad value.
        """
        return Use(self.method, find_method(self.method).checked(self.options))

    @property
    def label(self) -> str:
        """A few words that tell it from other uses: the name, counts, and other options that are not the default."""
        info = find_method(self.method)
        defaults = {option.name: option for option in info.options}
        told = [info.name if info.name != UNCHANGED else "unchanged"]
        for name, value in self.options.items():
            if name in defaults and defaults[name].kind == "counts":
                told.append(str(value))
            elif name in defaults and name != PLAN and value != defaults[name].default:
                told.append(f"{name} {plain(value)}")
        return " ".join(told)

    @property
    def text(self) -> str:
        """The text that `parse_use` reads; only options that are not the default."""
        known = find_method(self.method).options
        defaults = {option.name: option.default for option in known}
        told = {name: plain(value) for name, value in self.options.items() if value != defaults.get(name)}
        first = [told.pop(known[0].name)] if known and known[0].name in told else []
        return " ".join([self.method, *first, *(f"{name}={value}" for name, value in told.items())])


def parse_use(typed: str) -> Use:
    """A checked use of a text: a method's name, and after a space or a colon its options.

    "agent num_agents=64 min_tokens=256" and "agent:num_agents=64,min_tokens=256" are the same. The first option may go
    without its name: "agent 64", "mediators:1:4,0.5:16".

    Raises:
        UserError: for an unknown method or option, an option that is given twice, or a bad value.
    """
    return split_use(typed).checked()


def split_use(typed: str) -> Use:
    """As `parse_use`, with the options that were typed and no others, as texts."""
    name, _, rest = re.sub(r"[\s:]+", " ", typed.strip(), count=1).partition(" ")
    known = find_method(name).options
    options: dict[str, Any] = {}
    for i, word in enumerate(re.split(r"\s+|,(?=\w+=)", rest) if rest else []):
        key, sign, value = word.partition("=")
        if not known:
            raise UserError(f"method {name!r} has no options, got {word[:60]!r}")
        if not sign and i:
            raise UserError(f"{typed[:60]!r}: write options as name=value, such as {name} {known[0].name}=…")
        if not sign:
            key, value = known[0].name, word
        if key in options:
            raise UserError(f"{typed[:60]!r}: {key} is given twice")
        options[key] = value
    return Use(name, options)


def find_method(name: Any) -> MethodInfo:
    """The method of that name.

    Raises:
        UserError: listing the known ones.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"unknown method {short(name)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def timeline(use: Use) -> list[Part]:
    """What a checked use does when, for `draw_parts`."""
    info = find_method(use.method)
    if info.parts is None:
        return [Part(1.0, info.title, exact=use.method in (UNCHANGED, "softmax"))]
    return info.parts(use.options)
