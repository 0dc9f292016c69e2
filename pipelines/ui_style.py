"""How the page looks, and its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "ui_files"
CSS = (FILES / "page.css").read_text(encoding="utf-8")
# Gradio applies CSS inside its own columns only; the space around them is outside.
NARROW = "<style>@media (max-width: 768px) { .main.fillable { padding: 0.75rem !important; } }</style>"
HEAD = f"{NARROW}<script>{(FILES / 'page.js').read_text(encoding='utf-8')}</script>"


def theme() -> Any:
    """Gradio's own with fonts that it brings along whole; nothing is fetched from elsewhere."""
    import gradio as gr

    sans = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    mono = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="indigo",
        font=(sans, "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(mono, "ui-monospace", "monospace"),
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # as dark as reading needs
