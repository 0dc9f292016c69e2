"""Rows of a table that were measured before, so that a program that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import cli


def measured_rows(
    path: Path, settings: Mapping[str, Any], free: tuple[str, ...], way_out: str
) -> dict[str, dict[str, Any]]:
    """Rows of a file of results by name; none where there is no file.

    Args:
        path: a JSON object of settings and `rows`, each with its name as `row`.
        settings: what decides the numbers now.
        free: names of settings that may differ.
        way_out: what to do where others differ, such as "choose another --name".

    Raises:
        UserError: if the file cannot be read or holds results of another measurement.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["row"]: row for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.UserError(f"{path} cannot be read as results of this program: {error!r}") from error
    for name, value in settings.items():
        if name not in free and found.get(name) != value:
            raise cli.UserError(f"{path} was measured with {name} = {found.get(name)!r}, not {value!r}; {way_out}")
    return rows
