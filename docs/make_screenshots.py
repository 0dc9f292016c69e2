"""Pictures of the page for its documentation: python docs/make_screenshots.py

It serves the page, drives it in Chromium as a person would, and writes docs/images/page.png and compare.png.
"""

# ruff: noqa: TID251, E402  (a program, like those in pipelines; it is run by its path)
from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipelines import cli

PROGRAM = "docs/make_screenshots.py"
WIDTH, HEIGHT = 1280, 1130
COLOURS = 256  # of the files, which keeps them small
WAIT = 600_000  # ms
EXAMPLES = """
examples:
  python docs/make_screenshots.py
  python docs/make_screenshots.py --browser /usr/bin/google-chrome --out /tmp/pictures
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(PROGRAM, "Draw the pictures of the page that the documentation shows.", EXAMPLES)
    parser.prog = f"python {PROGRAM}"
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (default docs/images)")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="Chromium's program (default: chromium)")
    options = parser.parse_args(argv)
    if not options.browser:
        parser.error("there is no chromium on this machine; install it or name one with --browser")
    return cli.run(PROGRAM, lambda: make(options))


def make(options: argparse.Namespace) -> None:
    """Serve the page, take the pictures, and end."""
    from playwright.sync_api import sync_playwright

    import app

    with tempfile.TemporaryDirectory() as folder:
        settings = app.parse_arguments(["--port", "0", "--out", folder])
        engine = app.make_engine(settings)
        engine.warm_up()
        served = app.build_ui(engine, folder)
        address = app.launch(served, settings, quiet=True)
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=options.browser, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(WAIT)
            page.goto(address)
            for name, walk in (("page", generate), ("compare", compare)):
                walk(page)
                write(page.screenshot(), options.out / f"{name}.png")
            browser.close()
        served.close()


def generate(page: Any) -> None:
    """The clock of the top of the page, drawn live."""
    page.wait_for_selector("#generate")
    page.wait_for_function("window.attngenRemembers")
    page.locator("#hero .classes button").get_by_text("clock").click()
    page.click("#hero .live")
    _done(page, "status")
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(800)


def compare(page: Any) -> None:
    """The same clock by four numbers of mediators."""
    page.check("#preset input[value=Quick]")
    page.wait_for_timeout(2000)
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    _done(page, "compare-status")
    page.evaluate("document.querySelector('#methods').scrollIntoView()")
    page.wait_for_timeout(800)


def _done(page: Any, name: str) -> None:
    page.wait_for_function(f"/^(Done|Not done)/.test(document.querySelector('#{name} textarea').value)")
    if not (told := page.input_value(f"#{name} textarea")).startswith("Done"):
        raise cli.UserError(told)
    page.wait_for_timeout(3000)  # pictures are loaded after the text


def write(screenshot: bytes, path: Path) -> None:
    """The screenshot with few colours, as a small file."""
    from PIL import Image

    from pipelines.images import write_file

    content = io.BytesIO()
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    write_file(path, content.getvalue())
    print(path)


if __name__ == "__main__":
    sys.exit(main())
