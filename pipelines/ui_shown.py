"""What the form shows of a model, a size and a method: names, numbers and pictures of them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from pipelines.engine.models import Model
from pipelines.methods.catalogue import METHODS
from pipelines.methods.counts import Part
from pipelines.methods.options import MEDIATORS, UNCHANGED
from pipelines.methods.uses import Use, find_method
from pipelines.samplers import sampler_names

ASPECTS = {"Square": 1.0, "Portrait 3:4": 3 / 4, "Landscape 4:3": 4 / 3, "Tall 9:16": 9 / 16, "Wide 16:9": 16 / 9}
SCALES = {"trained size": 1.0, "1.5 × larger": 1.5, "2 × larger": 2.0, "4 × larger": 4.0}
PRESETS = {"Quick": (0.4, None), "Standard": (1.0, None), "Fine": (2.0, None), "Strong guidance": (1.0, 1.75)}
OWN_SAMPLER = "the model's own"


def preset_values(model: Model, preset: str, most: int) -> tuple[int, float]:
    """(steps, guidance scale) of a preset, with at most so many steps."""
    steps, guidance = PRESETS[preset]
    return min(most, max(1, round(model.steps * steps))), round(model.guidance_scale * (guidance or 1), 1)


def fitting_size(trained: tuple[int, int], unit: int, aspect: float, scale: float) -> tuple[int, int]:
    """(width, height) of about the trained area times scale², in whole units.

    Args:
        trained: (height, width) in pixels.
        unit: what both are multiples of.
        aspect: width over height.
        scale: times a side.
    """
    side = (trained[0] * trained[1]) ** 0.5 * scale
    width, height = side * aspect**0.5, side / aspect**0.5
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)


def named_size(model: Model, width: Any, height: Any) -> tuple[str | None, str | None]:
    """Names of the aspect and the size that these are; None where they are none of those."""
    for scale, times in SCALES.items():
        for aspect, ratio in ASPECTS.items():
            if fitting_size(model.size or (512, 512), model.unit, ratio, times) == (width, height):
                return aspect, scale
    return None, None


def size_note(model: Model, width: Any, height: Any) -> str:
    """What a size costs beside the trained one; empty for a size that is none, or not larger."""
    trained = (model.size or (512, 512))[0] * (model.size or (512, 512))[1]
    if not all(isinstance(side, (int, float)) and 0 < side < 1e6 for side in (width, height)):
        return ""
    ratio = width * height / trained
    if ratio < 1.5:
        return ""
    return (
        f"{ratio:.3g} × the trained area: softmax attention costs {ratio**2:,.3g} × as much, a fixed number of"
        f" mediators or agents {ratio:.3g} ×; the whole image takes at least {ratio:.3g} × the time."
    )


def timeline_html(parts: Sequence[Part]) -> str:
    """What a method does when, as bars over time: noise on the left, image on the right; empty for no parts."""
    if not parts:
        return ""
    bars = []
    for part, end in zip(parts, [*(later.start for later in parts[1:]), 0.0], strict=True):
        kind = "exact" if part.exact else "cheap"
        style = f"flex:{max(part.start - end, 0.04):g};--level:{max(part.level, 0.2):g}"
        label = html.escape(part.label)
        bars.append(
            f'<div class="bar {kind}" style="{style}" title="{label}"><b>{label}</b><i>{part.start:g}</i></div>'
        )
    axis = "<span>noise</span><span>drag a bar up or down, or its left edge</span><span>image</span>"
    return f'<div class="bars">{"".join(bars)}</div><p class="axis">{axis}</p>'


def about(method: str) -> str:
    """A method in a sentence, for Markdown."""
    return html.escape(find_method(method).about, quote=False)


def label_names(model: Model) -> list[str]:
    """Names of a model's classes; empty for a model of texts."""
    return [model.label_text(number) for number in sorted(model.labels)]


def method_choices(model: Model) -> Sequence[tuple[str, str]]:
    """(title, name) of the methods that the model can be drawn with."""
    return [(method_title(model, name), name) for name in model.methods]


def method_title(model: Model, method: str) -> str:
    """The name of a method on the page; what a model with mediators is unchanged is not softmax attention."""
    config = getattr(getattr(model.pipe, "transformer", None), "config", {})
    if method == UNCHANGED and MEDIATORS not in model.refused:
        return f"The model's own: {config.get('num_mediators')} mediators"
    return METHODS[method].title


def title_of(model: Model, use: Use) -> str:
    """A use in the words of the page."""
    return method_title(model, UNCHANGED) if use.method == UNCHANGED else use.label


def sampler_choices(model: Model) -> list[str]:
    """Samplers as the form offers them, the model's own first."""
    return [OWN_SAMPLER, *sampler_names(model.pipe)]
