"""Settings in the texts that other programs write into PNGs: A1111's `parameters`, and who wrote anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipelines.images import MAX_SETTINGS_CHARACTERS, PARAMETERS_CHUNK

NEGATIVE = "Negative prompt:"
# A line of settings begins so in every program that writes this form.
SETTINGS_LINE = re.compile(r"^Steps: \d", re.MULTILINE)
PAIR = re.compile(r'([A-Za-z][\w \-/.]{0,60}): *("(?:[^"\\]|\\.)*"|[^,\n]*) *(?:,|\n|$)')
# Keywords of texts that hold no such settings -> the program that writes them.
PROGRAMS = {
    "workflow": "ComfyUI",
    "prompt": "ComfyUI",
    "fooocus_scheme": "Fooocus",
    "invokeai_metadata": "InvokeAI",
    "invokeai_graph": "InvokeAI",
    "sd-metadata": "InvokeAI",
}


def program_of(texts: Mapping[str, str]) -> str | None:
    """The program that wrote a PNG's texts, as far as their keywords show; None for others."""
    if texts.get(PARAMETERS_CHUNK, "").lstrip().startswith("{"):
        return "Fooocus"
    return next((name for keyword, name in PROGRAMS.items() if keyword in texts), None)


def parse_parameters(text: str) -> dict[str, Any] | None:
    """The settings of a `parameters` text, under the names of our files; None if it holds none.

    Prompt and negative prompt may be missing or have several lines, settings may go over several lines, their values
    may be quoted, and more lines may follow.
    """
    if len(text) > MAX_SETTINGS_CHARACTERS:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    starts = [found.start() for found in SETTINGS_LINE.finditer(text)]
    for start in reversed(starts):
        pairs = _pairs(text[start:])
        if {"Steps", "Seed"} <= set(pairs):
            break
    else:
        return None
    prompt, negative = _prompts(text[:start])
    found: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "model": pairs.get("Model", "")}
    try:
        found["steps"], found["seed"] = int(pairs["Steps"]), int(pairs["Seed"])
        if "CFG scale" in pairs:
            found["guidance_scale"] = float(pairs["CFG scale"])
    except ValueError:
        return None
    if size := re.fullmatch(r"(\d{1,6}) *[x×] *(\d{1,6})", pairs.get("Size", "")):
        found["size"] = f"{size[1]}x{size[2]}"
    # Of our own files, where another program has kept this text alone.
    for name, key in (("Attention", "method"), ("Mediators", "mediators")):
        if name in pairs:
            found[key] = pairs[name]
    return found


def _pairs(text: str) -> dict[str, str]:
    """Names and values, the first of each name."""
    found: dict[str, str] = {}
    for name, value in PAIR.findall(text):
        found.setdefault(name.strip(), _unquoted(value.strip()))
    return found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value.strip('"')


def _prompts(text: str) -> tuple[str, str]:
    """(prompt, negative prompt) of what stands before the settings."""
    prompt, mark, negative = f"\n{text}".partition(f"\n{NEGATIVE}")
    return prompt.strip(), negative.strip() if mark else ""
