"""Pictures as files: labelled grids, and PNGs that carry the settings they were made with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pipelines.cli.provenance import versions
from pipelines.png_text import read_texts

SETTINGS_CHUNK = "attngen"
PARAMETERS_CHUNK = "parameters"
MAX_SETTINGS_CHARACTERS = 64 * 1024

PAPER, INK = "white", "black"
GAP, GROUP_GAP, PADDING = 2, 10, 6  # pixels

# Our names -> the names that programs which read `parameters` know, in their order.
_PARAMETER_NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
    "method": "Attention",
    "mediators": "Mediators",
    "version": "Version",
}


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """The picture `scale` times as large, with its pixels as squares."""
    size = image.width * scale, image.height * scale
    return image if scale == 1 else image.resize(size, Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str | Sequence[str]] = (),
    groups: Sequence[tuple[str, int]] = (),
    scale: int = 1,
) -> Image.Image:
    """One picture of many, in rows and columns, on white.

    Args:
        rows: pictures; rows may differ in length.
        row_labels: a text left of each row, or several lines; or none.
        groups: (text, number of columns) from left to right: the text stands above its columns, with a wider gap
            between groups. None for no texts.
        scale: how many times to enlarge each picture.

    Raises:
        ValueError: for no picture, or a number of labels or columns that does not fit.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a grid needs at least one image")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(rows)} rows need as many labels, got {len(row_labels)}")
    if groups and sum(count for _, count in groups) != columns:
        raise ValueError(f"groups of {[count for _, count in groups]} columns do not make {columns} columns")

    pictures = [[enlarge(image, scale) for image in row] for row in rows]
    width = max(image.width for row in pictures for image in row)
    height = max(image.height for row in pictures for image in row)
    font_size = max(10, min(24, height // 6))
    font = ImageFont.load_default(size=font_size)
    most = max(3 * width, 240)
    labels = [[_shorten(line, font, most) for line in ([x] if isinstance(x, str) else x)] for x in row_labels]
    left = max((_text_width(line, font) for lines in labels for line in lines), default=0)
    left += 2 * PADDING if labels else GAP
    top = font_size + 2 * PADDING if groups else GAP

    xs, x = [], left
    starts = _group_starts(groups)
    for column in range(columns):
        x += GROUP_GAP if column in starts and column else 0
        xs.append(x)
        x += width + GAP
    sheet = Image.new("RGB", (x, top + len(pictures) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for text, (first, count) in zip((text for text, _ in groups), starts.items(), strict=True):
        span = xs[first + count - 1] + width - xs[first]
        draw.text((xs[first] + span / 2, top / 2), _shorten(text, font, span), INK, font, anchor="mm")
    for i, row in enumerate(pictures):
        y = top + i * (height + GAP)
        if labels:
            spot = left - PADDING, y + height / 2
            draw.multiline_text(spot, "\n".join(labels[i]), INK, font, anchor="rm", align="right")
        for x, image in zip(xs, row, strict=False):
            sheet.paste(image.convert("RGB"), (x, y))
    return sheet


def _group_starts(groups: Iterable[tuple[str, int]]) -> dict[int, int]:
    """First column -> number of columns."""
    starts, column = {}, 0
    for _, count in groups:
        starts[column] = count
        column += count
    return starts


def _text_width(text: str, font: Any) -> int:
    return round(font.getlength(text))


def _shorten(text: str, font: Any, width: float) -> str:
    """The text on one line, cut to fit `width` pixels."""
    text = " ".join(text.split())
    if _text_width(text, font) <= width:
        return text
    text = text[: int(width)]  # no letter is narrower than a pixel
    while text and _text_width(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def write_file(path: Path, content: bytes) -> None:
    """Write `content` as `attngen.files.write_file` does, and make the folder for it."""
    from attngen.files import write_file as write

    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG that says how it was made; an existing file is replaced, at once and whole.

    Two text chunks: `parameters`, in the form that other programs read, and `attngen`, JSON of the settings and of the
    versions of attngen, PyTorch and diffusers.

    Args:
        image: the picture.
        path: file to write; its folder is made.
        settings: what made it, JSON values; `read_settings` gives them back. For `parameters`: prompt, negative_prompt,
            steps, sampler, guidance_scale, seed, size ("512x512"), model_hash, model, method, mediators.

    Raises:
        OSError: if it cannot be written; an existing file stays as it was.
    """
    settings = {**settings, "versions": versions()}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PARAMETERS_CHUNK, parameters_text(settings))
    chunks.add_text(SETTINGS_CHUNK, json.dumps(settings, ensure_ascii=False))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=chunks)
    write_file(Path(path), content.getvalue())


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG of ours. Treat them as input from a stranger: they are parsed, and nothing more.

    Raises:
        ValueError: if the file is no PNG, or holds no settings, or not as `save_png` writes them.
    """
    try:
        texts = read_texts(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a PNG: {error}") from error
    try:
        return settings_of(texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def settings_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """The settings in the texts of a PNG of ours; see `read_settings`.

    Raises:
        ValueError: if there are none, or not as `save_png` writes them.
    """
    text = texts.get(SETTINGS_CHUNK)
    if text is None:
        raise ValueError("it holds no settings of attngen")
    if len(text) > MAX_SETTINGS_CHARACTERS:
        raise ValueError(f"its settings are longer than {MAX_SETTINGS_CHARACTERS} characters")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its settings are damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError("its settings are not a JSON object")
    return settings


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Settings in the form of the `parameters` chunk: the prompt, the negative prompt, and "Name: value" pairs."""
    versions_used = settings.get("versions", {})
    named = {**settings, "version": f"attngen {versions_used.get('attngen', '')}".strip()}
    pairs = [
        f"{name}: {_parameter(named[key])}" for key, name in _PARAMETER_NAMES.items() if named.get(key) is not None
    ]
    lines = [str(settings.get("prompt", "")), ", ".join(pairs)]
    if settings.get("negative_prompt"):
        lines.insert(1, f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join(lines)


def _parameter(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
