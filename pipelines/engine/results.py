"""What the engine yields: progress while it works, and at the end pictures with what they cost."""

from __future__ import annotations

import dataclasses
import io
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engine.settings import Settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from attngen import Report

PROGRAM = "attngen"


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        what: a few words: "loading emoji", "waiting", "drawing", "warming up agent".
        done: steps done so far in this part of the work.
        total: steps of this part; 0 where that is unknown.
        picture: number of the picture that is drawn, from 1; of the first where several are.
        pictures: pictures in all.
        seconds_left: of all pictures, estimated; None before there is anything to go by.
        preview: a small picture of what is drawn, or None where nothing new is to be seen.
        together: pictures that are drawn at once.
    """

    what: str
    done: int = 0
    total: int = 0
    picture: int = 1
    pictures: int = 1
    seconds_left: float | None = None
    preview: Image.Image | None = None
    together: int = 1

    @property
    def share(self) -> float:
        """Of the whole work, 0 to 1."""
        if not self.total:
            return 0.0
        return min(1.0, (self.picture - 1 + self.together * self.done / self.total) / self.pictures)

    def __str__(self) -> str:
        if not self.total:
            return self.what
        which = f"image {self.picture} of {self.pictures}, " if self.pictures > 1 else ""
        if self.together > 1:
            which = f"images {self.picture} to {self.picture + self.together - 1} of {self.pictures}, "
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return f"{self.what}: {which}step {self.done} of {self.total}{left}"


@dataclass(frozen=True)
class Result:
    """Pictures, and what they cost.

    Attributes:
        settings: with everything filled in: seed, steps, guidance, size; the first ones where several were given.
        pictures: of seed, seed + 1 …
        seconds: of drawing, without loading and saving; the first run of a model also pays for first calls.
        steps: of the sampler, in all.
        steps_per_second: of all pictures together.
        peak_bytes: most memory, see `pipelines.engine.memory`; None where nobody counts.
        memory_of: "device" or "process".
        flops: operations of the denoiser for one picture; None where they were not counted.
        report: what the patch did to each layer; None without one.
        file_settings: for each picture what `pipelines.images.save_png` is to write into it.
        files: written pictures; empty until `save` made them.
        latents: the last latents of each picture, float32 on the CPU; empty where the pipeline gives none.
    """

    settings: Settings
    pictures: list[Image.Image]
    seconds: float
    steps: int
    peak_bytes: int | None
    memory_of: str
    flops: int | None
    report: Report | None
    file_settings: list[dict[str, Any]]
    files: list[Path] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as JSON values."""
        return {
            "settings": self.settings.to_dict(),
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(self.steps_per_second, 3),
            "peak_bytes": self.peak_bytes,
            "memory_of": self.memory_of,
            "flops": self.flops,
            "layers": None if self.report is None else layer_counts(self.report),
            "notes": notes(self.report),
            "files": [str(file) for file in self.files],
        }

    def summary(self) -> str:
        """Time, speed, memory and what the method did, in one or two sentences."""
        count = len(self.pictures)
        told = [f"{count} image{'s' if count > 1 else ''} in {self.seconds:.1f} s"]
        told.append(f"{self.steps_per_second:.1f} steps/s")
        if self.peak_bytes is not None:
            told.append(f"peak memory {self.peak_bytes / 2**20:,.0f} MiB ({self.memory_of})")
        return ", ".join(told) + "." + "".join(f" {note}." for note in notes(self.report))


def layer_counts(report: Report) -> dict[str, int]:
    """How many layers a patch changes at these sizes, and how many it leaves exact."""
    active = sum(layer.is_active for layer in report.patched)
    return {"changed": active, "exact": len(report.layers) - active}


def notes(report: Report | None) -> list[str]:
    """What a user should know of a patch: how many layers it changes, and why none or slower ones."""
    if report is None:
        return []
    counts = layer_counts(report)
    if not report.patched:
        return ["The method changed no layer"]
    told = [f"The method changed {counts['changed']} of {counts['changed'] + counts['exact']} attention layers"]
    stages = [stage for layer in report.patched for stage in layer.stages]
    reasons = [stage.why_exact for stage in stages if stage.why_exact is not None]
    if not counts["changed"] and reasons and any(stage.method != "softmax" for stage in stages):
        told[0] += f": {reasons[0]}"
    if any(stage.is_slower for stage in stages):
        told.append("Some layers were measured to be slower than exact attention at this size")
    return told


def save(result: Result, folder: Path, with_settings: bool = True) -> Result:
    """Write the pictures as PNGs under names that no file has yet; none is left if one cannot be written.

    Args:
        result: what `Engine.generate` yielded last.
        folder: where to; it is made.
        with_settings: whether the files hold what made them.

    Raises:
        OSError: if they cannot be written.
    """
    from pipelines.images import save_png, write_file

    files: list[Path] = []
    try:
        for picture, settings in zip(result.pictures, result.file_settings, strict=True):
            path = folder / file_name(settings)
            if with_settings:
                save_png(picture, path, settings)
            else:
                content = io.BytesIO()
                picture.save(content, "PNG")
                write_file(path, content.getvalue())
            files.append(path)
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    return dataclasses.replace(result, files=files)


def file_name(settings: Mapping[str, Any]) -> str:
    """A name that says what is in it, with digits that nobody guesses."""
    stem = re.sub(r"[^\w]+", "-", str(settings.get("prompt", "")), flags=re.ASCII).strip("-").lower()[:40]
    return f"{stem or 'picture'}-{settings.get('seed')}-{secrets.token_hex(4)}.png"


def describe(settings: Settings, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is written into a file: the settings under the names that all programs use, and `extra`."""
    options = dict(settings.options)
    told = {
        "program": PROGRAM,
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt or None,
        "images": 1,
        "seed": settings.seed,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "guidance_scale": settings.guidance_scale,
        "method": settings.method,
        "mediators": options.get("mediators"),
        "options": options or None,
        "size": f"{settings.width}x{settings.height}" if settings.width else None,
        "model": settings.model,
        **extra,
    }
    return {name: value for name, value in told.items() if value is not None}
