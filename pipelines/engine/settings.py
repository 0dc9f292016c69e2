"""What makes a picture, checked before any work: the one form that the page, the API, the programs and PNGs share."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.cli import UserError
from pipelines.methods.options import UNCHANGED
from pipelines.methods.uses import Use

MAX_SEED = 2**32 - 1
MAX_NEW_SEED = 2**31 - 1  # short enough to read out and to type
MAX_NAME_CHARACTERS = 1024


@dataclass(frozen=True)
class Limits:
    """The most that is drawn.

    Attributes:
        pixels: height times width.
        steps: sampling steps.
        images: pictures of one request.
        characters: of a prompt.
        seed: largest one.
        guidance_scale: largest one.
        seconds: of work on one request, for programs that bound it.
    """

    pixels: int = 4096 * 4096
    steps: int = 1000
    images: int = 64
    characters: int = 4000
    seed: int = MAX_SEED
    guidance_scale: float = 100.0
    seconds: float = math.inf


# For programs, whose user pays for what they ask; torch takes seeds of 63 bits.
UNLIMITED = Limits(2**62, 2**62, 2**62, 2**62, 2**63 - 1, math.inf)


@dataclass(frozen=True)
class Settings:
    """What makes pictures; picture k (from 0) has seed + k, and is the same whatever is drawn with it.

    Attributes:
        prompt: a text; for a model of classes the name or the number of a class.
        negative_prompt: what not to draw; texts only.
        model: name of a model that ships, hub id, folder or single file.
        method: of attention, see `pipelines.methods.catalogue.METHODS`.
        options: of the method; what is missing has its default.
        sampler: see `pipelines.samplers`; None for the model's own.
        steps: None for the model's usual number.
        guidance_scale: likewise; 1 is off.
        height: in pixels; None, with the width, for the trained size.
        width: likewise.
        seed: 0 to 2**32 - 1; None for a new one.
        images: number of pictures.
    """

    prompt: str = ""
    negative_prompt: str = ""
    model: str = "emoji"
    method: str = UNCHANGED
    options: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = 0
    images: int = 1

    def checked(self, limits: Limits = Limits()) -> Settings:
        """The same with every value in its own type, all options, and a seed.

        Raises:
            UserError: for the first value that cannot be used, naming it and the way out.
        """
        method, options = self.use.checked()
        images = whole("images", self.images, 1, limits.images)
        height = None if self.height is None else whole("height", self.height, 1, limits.pixels)
        width = None if self.width is None else whole("width", self.width, 1, limits.pixels)
        if (height is None) != (width is None):
            raise UserError("give height and width together, or neither")
        if height and width and height * width > limits.pixels:
            raise UserError(f"{width} x {height} is more than {limits.pixels:,} pixels, the most allowed here")
        seed = secrets.randbelow(MAX_NEW_SEED) if self.seed is None else whole("seed", self.seed, 0, limits.seed)
        return Settings(
            prompt=text("prompt", self.prompt, limits.characters),
            negative_prompt=text("negative_prompt", self.negative_prompt, limits.characters),
            model=text("model", self.model, MAX_NAME_CHARACTERS),
            method=method,
            options=options,
            sampler=None if self.sampler is None else text("sampler", self.sampler, MAX_NAME_CHARACTERS),
            steps=None if self.steps is None else whole("steps", self.steps, 1, limits.steps),
            guidance_scale=None if self.guidance_scale is None else _guidance(self.guidance_scale, limits),
            height=height,
            width=width,
            seed=seed,
            images=images,
        )

    @property
    def use(self) -> Use:
        """The method with its options."""
        return Use(self.method, self.options)

    def with_use(self, use: Use) -> Settings:
        """The same picture by another method."""
        return dataclasses.replace(self, method=use.method, options=use.options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """The settings that `to_dict` wrote; unchecked, like any other input.

        Raises:
            UserError: for something that is not one of the settings.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise UserError(f"there is no setting {str(name)[:60]!r}; there are: {', '.join(sorted(known))}")
        return cls(**data)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number between two bounds.

    Raises:
        UserError: naming the value, if it is something else.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value != int(value) or not low <= value <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:60]!r}")
    return int(value)


def text(name: str, value: Any, most: int) -> str:
    """A text of at most so many characters.

    Raises:
        UserError: if it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, got {str(value)[:60]!r}")
    if len(value) > most:
        raise UserError(f"{name} has {len(value)} characters, more than the {most} allowed")
    return value


def _guidance(value: Any, limits: Limits) -> float:
    most = limits.guidance_scale
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= most:
        raise UserError(f"guidance_scale must be a number from 0 to {most:g} (1 is off), got {str(value)[:60]!r}")
    return float(value)
