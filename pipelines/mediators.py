"""Numbers of mediators, for the pipelines that take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.cli import UserError
from pipelines.schedules import parse_counts

# Where the change of the picture decides when the next number comes: at this share of the first change, then each
# time at a smaller one.
FIRST_RATIO, NEXT_RATIO = 0.8, 0.625


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
                f"mediators: {count} is more than {most}, the {rows} x {columns} tokens of this picture;"
                f" give 1 to {most}"
            )


def counts_of(mediators: Any) -> Iterable[Any]:
    """The numbers in a count or a schedule."""
    if mediators is None:
        return ()
    return getattr(mediators, "values", None) or (() if callable(mediators) else (mediators,))
