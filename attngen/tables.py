"""Text of reports and traces: names in short, and aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def pattern(names: Sequence[str]) -> str:
    """The names in short: `*` for numbers that differ, `a|b` for other parts that do, one pattern a number of parts."""
    by_length: dict[int, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        by_length.setdefault(len(parts), []).append(parts)
    return ", ".join(".".join(map(_alternatives, zip(*rows, strict=True))) for rows in by_length.values())


def _alternatives(words: tuple[str, ...]) -> str:
    different = list(dict.fromkeys(words))
    if len(different) == 1:
        return different[0]
    return "*" if len(different) > 3 or any(word.isdigit() for word in different) else "|".join(different)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
