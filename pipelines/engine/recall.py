"""Settings out of a PNG: ours, those of the other programs here, and the `parameters` text that other tools write.

A file comes from a stranger: it is parsed, known entries are taken, and all of them are checked like any other input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.cli import UserError, public_name
from pipelines.cli.provenance import model_hash, versions
from pipelines.engine.models import ModelStore
from pipelines.engine.parameters import parse_parameters, program_of
from pipelines.engine.runs import resolve
from pipelines.engine.settings import Limits, Settings
from pipelines.engine.shipped import shipped_models
from pipelines.images import PARAMETERS_CHUNK, SETTINGS_CHUNK, settings_of
from pipelines.methods.catalogue import METHODS
from pipelines.methods.options import MEDIATORS, UNCHANGED
from pipelines.png_text import read_texts

MAX_BYTES = 64 * 2**20
# Packages whose version decides a picture.
DECISIVE = ("attngen", "torch", "diffusers")


@dataclass(frozen=True)
class Recalled:
    """What a file says.

    Attributes:
        settings: checked; enough to draw the picture again.
        notes: why the new picture may differ from the old one; empty where nothing speaks for that.
        missing: name of the model, where it is none of those here; the settings have the first one instead.
    """

    settings: Settings
    notes: list[str] = field(default_factory=list)
    missing: str | None = None


def recall(path: str | Path, models: ModelStore, limits: Limits | None = None) -> Recalled:
    """Read the settings in a PNG.

    Args:
        path: the file.
        models: those that can be drawn with.
        limits: the most that is drawn.

    Raises:
        UserError: if there are none in it, or they cannot be used, with the reason.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}") from error
    if size > MAX_BYTES:
        raise UserError(f"the file has {size:,} bytes, more than the {MAX_BYTES:,} that are read")
    notes: list[str] = []
    try:
        texts = read_texts(path)
        data = settings_of(texts) if SETTINGS_CHUNK in texts else _foreign(texts)
    except ValueError as error:
        raise UserError(f"this file cannot be recalled: {error}") from error
    given = _settings_of(data, notes)
    missing = _missing_model(data, models)
    given["model"] = _model_of(data, models, notes)
    _compare_versions(data, notes)
    return Recalled(Settings.from_dict(given).checked(limits or Limits()), notes, missing)


def _settings_of(data: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The entries that `Settings` has, from files of all programs."""
    names = ("prompt", "negative_prompt", "sampler", "steps", "guidance_scale", "seed", "images")
    given = {name: data[name] for name in names if data.get(name) is not None}
    prompts = data.get("prompts") or data.get("labels")
    if isinstance(prompts, list) and len(prompts) > 1:
        notes.append("The file is a sheet of several prompts; only the first is restored")
        first = given.get("prompt") if isinstance(given.get("prompt"), str) else ""
        given["prompt"] = prompts[0] if "prompts" in data else str(first).split(", ")[0]
    given["method"], given["options"] = _method_of(data, notes)
    size = data.get("size")
    if isinstance(size, str) and (found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)):
        given["width"], given["height"] = int(found[1]), int(found[2])
    return given


def _method_of(data: Mapping[str, Any], notes: list[str]) -> tuple[Any, Any]:
    method, options = data.get("method"), data.get("options")
    if isinstance(method, str) and method in METHODS:
        return method, options if isinstance(options, Mapping) else {}
    if data.get("mediators") is not None:
        return MEDIATORS, {"mediators": data["mediators"]}
    if method is not None:
        notes.append(f"The method {str(method)[:60]!r} is not in the file; the attention is left unchanged")
    return UNCHANGED, {}


def _missing_model(data: Mapping[str, Any], models: ModelStore) -> str | None:
    """The name of a file's model if that is none of those here; "" where the file names none."""
    name = data.get("model")
    name = name if isinstance(name, str) else ""
    return None if name in {public_name(known) for known in models.names} else name[:100]


def _model_of(data: Mapping[str, Any], models: ModelStore, notes: list[str]) -> str:
    """The model of that name here; where there is none the first one, and a note."""
    name, wanted = data.get("model"), data.get("model_hash")
    name = name if isinstance(name, str) and len(name) <= 1024 else ""
    known = {public_name(known): known for known in models.names}
    found = known.get(name)
    if found is None:
        found = next(iter(models.names), "")
        notes.append(f"The model {name[:100]!r} is not among those loaded here; choose it and draw again")
        return found
    here = model_hash(shipped_models().get(found) or resolve(found))
    if wanted and here and wanted != here:
        notes.append(f"The file was drawn with other weights of {name} ({str(wanted)[:20]}, here {here})")
    return found


def _compare_versions(data: Mapping[str, Any], notes: list[str]) -> None:
    old, now = data.get("versions"), versions()
    if not isinstance(old, Mapping):
        return
    other = [f"{name} {str(old[name])[:20]}" for name in DECISIVE if name in old and old[name] != now[name]]
    if other:
        notes.append(f"The file was drawn with {', '.join(other)}; the new image may differ a little")


def _foreign(texts: Mapping[str, str]) -> dict[str, Any]:
    """What the `parameters` text of another program holds.

    Raises:
        UserError: naming the program, if there is none.
    """
    data = parse_parameters(texts.get(PARAMETERS_CHUNK, ""))
    if data is not None:
        return data
    program = program_of(texts)
    if program is not None:
        raise UserError(
            f"this picture was made by {program}, whose settings are not read here; type its prompt instead"
        )
    raise UserError("this picture cannot be recalled: it holds no settings")
