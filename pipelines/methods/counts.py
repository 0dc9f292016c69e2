"""Counts over time as people write them: "16", or "1:4,0.5:16,0.2:64"; and a picture of what a method does when.

Time runs from 1 (noise) to 0 (the finished picture), as everywhere in attngen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.cli import UserError

if TYPE_CHECKING:
    from PIL import Image

# Where the change of the picture decides when the next number comes: at this share of the first change, then each
# time at a smaller one.
FIRST_RATIO, NEXT_RATIO = 0.8, 0.625
MAX_PARTS = 16
MAX_COUNT = 1 << 16
WIDTH, HEIGHT, MARGIN = 640, 150, 12  # of the picture, in pixels
# Readable on a light page and on a dark one, which shows through.
BAR, BAR_EXACT, INK, QUIET = (78, 121, 167), (196, 200, 208), (32, 34, 40), (124, 128, 136)


class Part(NamedTuple):
    """What holds from a time on.

    Attributes:
        start: time, 1 is noise.
        label: a few words.
        level: height of the bar, 0 to 1.
        exact: whether attention is exact.
    """

    start: float
    label: str
    level: float = 1.0
    exact: bool = False


def parse_counts(
    name: str, value: object, least: int = 1, most: int = MAX_COUNT
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(times, counts) of a count, or of a text of time:count pairs.

    Args:
        name: what is counted, for messages.
        value: 16, "16" or "1:4,0.5:16".
        least: smallest count.
        most: largest count.

    Raises:
        UserError: naming the value, if it is neither, or the times do not fall from 1.
    """
    text = str(value).strip()
    pairs = [part.split(":") for part in text.split(",")] if ":" in text else [["1", text]]
    try:
        if len(pairs) > MAX_PARTS or isinstance(value, bool):
            raise ValueError
        starts = tuple(float(start) for start, _ in pairs)
        counts = tuple(int(count) for _, count in pairs)
    except ValueError:
        raise UserError(
            f"{name}: {text[:60]!r} is neither a count, like 16, nor time:count pairs, like 1:4,0.5:16"
        ) from None
    for count in counts:
        if not least <= count <= most:
            raise UserError(f"{name}: {count} is not between {least} and {most}")
    falls = all(0 <= later < earlier for earlier, later in zip(starts, starts[1:], strict=False))
    if starts[0] != 1 or not falls or not all(map(math.isfinite, starts)):
        raise UserError(f"{name}: times must fall from 1 (noise) towards 0 (image), got {text[:60]!r}")
    return starts, counts


def counts_argument(typed: str) -> str:
    """An argument type: "16", or "1:4,0.5:16,0.2:64", as `parse_counts` reads it."""
    try:
        return counts_text(*parse_counts("", typed))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def counts_text(starts: Sequence[float], counts: Sequence[int]) -> str:
    """The text that `parse_counts` reads."""
    if len(counts) == 1:
        return str(counts[0])
    return ",".join(f"{start:g}:{count}" for start, count in zip(starts, counts, strict=True))


def count_parts(starts: Sequence[float], counts: Sequence[int], unit: str) -> list[Part]:
    """Parts for the picture; 0 is exact."""
    most = max(*counts, 2)
    return [
        Part(start, f"{count} {unit}" if count else "exact", bar_level(count, most), count == 0)
        for start, count in zip(starts, counts, strict=True)
    ]


def bar_level(count: int, most: int) -> float:
    """Height of a bar, 0 to 1: it grows with the logarithm of the count; 1 for no count."""
    return math.log1p(count) / math.log1p(most) if count else 1.0


def draw_parts(parts: Sequence[Part], title: str) -> Image.Image:
    """Bars over time, noise on the left and the picture on the right.

    Args:
        parts: by falling start, the first at 1; none for the title alone.
        title: stands above the bars, or in their place.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    if not parts:
        draw.text((WIDTH / 2, HEIGHT / 2), _fitting(title, WIDTH - 2 * MARGIN, font), QUIET, font, anchor="mm")
        return picture
    draw.text((MARGIN, 8), title, QUIET, font)
    top, floor, span = 36, HEIGHT - 30, WIDTH - 2 * MARGIN
    for part, end in zip(parts, [*(later.start for later in parts[1:]), 0.0], strict=True):
        left, right = MARGIN + span * (1 - part.start), MARGIN + span * (1 - end)
        height = max(22.0, part.level * (floor - top))
        draw.rectangle((left, floor - height, right - 2, floor), BAR_EXACT if part.exact else BAR)
        label = _fitting(part.label, right - left - 8, small)
        draw.text(((left + right) / 2, floor - 11), label, INK if part.exact else "white", small, anchor="mm")
        time = "noise, 1" if part is parts[0] else f"{part.start:g}"
        draw.text((left, floor + 6), time, QUIET, small)
    draw.text((WIDTH - MARGIN, floor + 6), "0, picture", QUIET, small, anchor="ra")
    return picture


def _fitting(text: str, width: float, font: object) -> str:
    while text and font.getlength(text) > width:  # pyright: ignore[reportAttributeAccessIssue]
        text = text[:-1]
    return text


# Numbers of mediators, for the pipelines that take them


def make_mediators(mediators: Any, follow: str = "time") -> Any:
    """What `SiTPipeline` takes as `num_mediators`: a count, or a schedule, anew for each picture.

    Args:
        mediators: a count, or time:count pairs, see `parse_counts`.
        follow: "time", or "change" for counts that come when the picture changes less, whatever the times say.

    Raises:
        UserError: for anything else.
    """
    from attngen import ChangeSchedule, Schedule

    starts, counts = parse_counts("mediators", mediators)
    if len(counts) == 1:
        return counts[0]
    if follow == "change":
        ratios = [FIRST_RATIO * NEXT_RATIO**i for i in range(len(counts) - 1)]
        return ChangeSchedule(ratios=ratios, values=counts)
    return Schedule(starts=starts, values=counts)


def check_mediators(pipe: Any, mediators: Any, height: int | None, width: int | None) -> None:
    """Every number of mediators, also one whose turn comes late or never, has to fit the picture.

    Args:
        pipe: a pipeline; with mediators given, one whose network has them.
        mediators: what `make_mediators` gave, or None.
        height: of the picture in pixels, or None for the trained size.
        width: likewise.

    Raises:
        UserError: naming the number and the most there can be.
    """
    counts = list(counts_of(mediators))
    if not counts:
        return  # also for networks that are no transformers
    config = pipe.transformer.config
    trained = config["sample_size"]
    scale = pipe.vae_scale_factor
    sides = (trained, trained) if isinstance(trained, int) else trained
    rows, columns = (
        side // config["patch_size"] if given is None else given // scale // config["patch_size"]
        for given, side in zip((height, width), sides, strict=True)
    )
    most = rows * columns
    for count in counts:
        if isinstance(count, int) and count > most:
            raise UserError(
                f"mediators: {count} is more than {most}, the {rows} x {columns} tokens of this image; give 1 to {most}"
            )


def counts_of(mediators: Any) -> Iterable[Any]:
    """The numbers in a count or a schedule."""
    if mediators is None:
        return ()
    return getattr(mediators, "values", None) or (() if callable(mediators) else (mediators,))
