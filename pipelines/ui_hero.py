"""The top of the page: what mediators change and save, in samples that are drawn already; see `pipelines.hero`."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.hero import HERE, MODEL, NUMBERS, SPRITE

FILES = Path(__file__).parent / "ui_files"


def make_hero() -> gr.HTML | None:
    """The component, whose `submit` asks for a live drawing; None where its files are not there."""
    if not (HERE / NUMBERS).is_file():
        return None
    data = json.loads((HERE / NUMBERS).read_text(encoding="utf-8"))
    sprite = base64.b64encode((HERE / SPRITE).read_bytes()).decode()
    counts, sizes = data["counts"], data["sizes"]
    words = {
        "machine": html.escape(data["machine"]),
        "most": counts[-1],
        "last": len(counts) - 1,
        "start": counts.index(4),
        "classes": "".join(_choice(name) for name in data["classes"]),
        "sizes": "".join(_choice(f"{size['side']} px, {size['tokens']:,} tokens") for size in sizes),
    }
    look = {"width": 100 * len(counts), "sprite": f"data:image/webp;base64,{sprite}"}
    return gr.HTML(
        filled("hero.html", words), css_template=filled("hero.css", look),
        js_on_load=filled("hero.js", {"data": json.dumps(data)}), apply_default_css=False, elem_id="hero",
    )  # fmt: skip


def filled(name: str, words: Mapping[str, Any]) -> str:
    """A file of the page with its __words__ filled in."""
    text = (FILES / name).read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"__{word}__", str(value))
    return text


def _choice(name: str) -> str:
    return f'<button role="radio">{html.escape(name)}</button>'


def settings_of(data: Any) -> dict[str, Any]:
    """What a live drawing asks for, as keyword arguments of `Settings`; unchecked, for it comes from a browser."""
    return {
        "prompt": getattr(data, "label", ""),
        "model": MODEL,
        "method": "mediators",
        "options": {"mediators": str(getattr(data, "mediators", ""))},
        "seed": getattr(data, "seed", 0),
    }
