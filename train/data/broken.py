"""Unreadable pictures: how many a run bears, and which they were."""

from __future__ import annotations

import threading
import warnings

MAX_BROKEN = 0.01


def check_max_broken(limit: int | float) -> None:
    """Raise ValueError unless `limit` is a count or a share."""
    if isinstance(limit, bool) or not limit >= 0 or (isinstance(limit, float) and limit > 1):
        raise ValueError(f"max_broken is {limit!r}; expected a count (0, 1, 2, …) or a fraction (0.0 to 1.0)")


def parse_max_broken(text: str) -> int | float:
    """A count ("3") or a share ("0.01") from the command line.

    Raises:
        ValueError: if it is neither.
    """
    try:
        limit = float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"max_broken is {text!r}; expected a count (3) or a fraction (0.01)") from None
    check_max_broken(limit)
    return limit


class Broken:
    """Unreadable pictures: each is reported once, and too many end the run.

    Args:
        limit: pictures that may be broken; a float is a share of `total`.
        total: pictures in the data.
    """

    def __init__(self, limit: int | float, total: int) -> None:
        self.limit, self.total = limit, total
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Note a broken picture.

        Raises:
            ValueError: if there are now more than the limit, naming them.
        """
        with self._lock:
            if name in self.reasons:
                return
            self.reasons[name] = reason
        # 29 % of 100 is a little under 29 in floating point.
        allowed = self.limit * self.total + 1e-6 if isinstance(self.limit, float) else self.limit
        if len(self.reasons) > allowed:
            raise ValueError(
                f"{len(self.reasons)} of {self.total} images cannot be read, more than max_broken = {self.limit} "
                f"allows: {self}"
            )
        warnings.warn(f"{name} cannot be read and is left out: {reason}", stacklevel=2)

    def __str__(self) -> str:
        from train.data.sources import shown  # which imports torch

        return shown([f"{name} ({reason})" for name, reason in list(self.reasons.items())])
