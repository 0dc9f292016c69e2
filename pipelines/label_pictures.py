"""Small pictures of what the classes of the models that ship look like: python -m pipelines.label_pictures

The program draws them with the shipped model into one strip, which the page cuts up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "pipelines.label_pictures"
STRIP = Path(__file__).parent / "label_pictures.png"
EXAMPLES = """
examples:
  python -m pipelines.label_pictures --out pipelines/label_pictures.png
"""


def label_pictures(labels: Mapping[int, str]) -> list[tuple[Image.Image, str]]:
    """(picture, name) of the classes that the strip knows, in the order of their numbers."""
    known = _strip()
    return [(known[name], name) for _, name in sorted(labels.items()) if name in known]


@lru_cache(maxsize=1)
def _strip() -> dict[str, Image.Image]:
    from PIL import Image

    from pipelines.images import read_settings

    if not STRIP.is_file():
        return {}
    names = read_settings(STRIP)["names"]
    with Image.open(STRIP, formats=["PNG"]) as strip:
        side = strip.height
        return {name: strip.crop((i * side, 0, (i + 1) * side, side)) for i, name in enumerate(names)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(PROGRAM, "Draw the pictures of the classes that the page shows.", EXAMPLES)
    parser.add_argument("--out", type=cli.png_path, default=STRIP, help=f"file to write (default {STRIP.name} here)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0)
    options = parser.parse_args(argv)
    return cli.run(PROGRAM, lambda: make_strip(options))


def make_strip(options: argparse.Namespace) -> None:
    """Draw a picture of each class and write the strip."""
    from PIL import Image

    from pipelines.engine.results import Result
    from pipelines.engine.session import Engine
    from pipelines.engine.settings import Settings
    from pipelines.images import save_png

    engine = Engine()
    labels = engine.models.get(engine.default_model).labels
    pictures: list[Any] = []
    for name in labels.values():
        for event in engine.generate(Settings(prompt=name, seed=options.seed), previews=False):
            if isinstance(event, Result):
                pictures += event.pictures
    side = pictures[0].height
    strip = Image.new("RGB", (side * len(pictures), side))
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * side, 0))
    save_png(strip, options.out, {"program": PROGRAM, "names": list(labels.values()), "seed": options.seed})
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
