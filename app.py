"""The page: python app.py, then open http://127.0.0.1:7860

Draw, compare attention methods, recall pictures, calibrate. The page holds no model code; `pipelines.engine` does.
"""

# ruff: noqa: TID251  (a program, like those in pipelines)
from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cli

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.engine.session import Engine

PROGRAM = "app"
PORT = 7860
FIRST = "emoji-128"  # the model to start with
MAX_QUEUE, AT_ONCE = 16, 8  # requests that wait in Gradio's queue, and in the engine's own line
# (pixels, steps, images, seconds of work) of one request: for whoever owns the machine, and for visitors.
OWN_LIMITS, VISITOR_LIMITS = (4096 * 4096, 1000, 16, None), (1024 * 1024, 100, 4, 300)
MAX_UPLOAD = "20mb"
PASSWORD = "ATTNGEN_PASSWORD"
MIN_PASSWORD = 8
SPACE_SECONDS = 120  # of GPU that a Space is asked for
EXAMPLES = """
examples:
  python app.py
  python app.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --open
  ATTNGEN_PASSWORD=… python app.py --host 0.0.0.0 --user me
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(PROGRAM, "Serve the page that draws and compares.", EXAMPLES)
    parser.prog = "python app.py"
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to serve on; other than this machine's own needs a password")
    add("--port", type=cli.whole_number(0), default=PORT, help=f"(default {PORT}; 0 for any free one)")
    add("--user", help=f"name to log in with; the password is read from {PASSWORD} in the environment")
    add("--name", action="append", default=[], metavar="HOST", help="extra host name to accept; repeatable")
    add("--model", action="append", default=[], help="hub id, folder or file to start with; repeatable")
    add("--any-model", action="store_true", help="let those who log in load any model (always so on this machine)")
    add("--out", type=Path, default=Path("outputs/page"), help="folder for images (default outputs/page)")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: a GPU where there is one)")
    add("--dtype", choices=cli.DTYPES, default="auto", help="number format of the models (default: auto)")
    add("--threads", type=cli.whole_number(1), help="CPU threads (default: all cores; one for a small network)")
    add("--offload", choices=cli.OFFLOADS, default="none", help="keep idle parts in main memory")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    own, visitor = OWN_LIMITS, VISITOR_LIMITS
    add("--max-pixels", type=cli.whole_number(64), help=f"of one image (default {own[0]}; for visitors {visitor[0]})")
    add("--max-steps", type=cli.whole_number(1), help=f"of sampling (default {own[1]}; for visitors {visitor[1]})")
    add("--max-images", type=cli.whole_number(1), help=f"of one request (default {own[2]}; for visitors {visitor[2]})")
    add("--max-seconds", type=cli.whole_number(1), help=f"of work on one request (default for visitors {visitor[3]})")
    add("--mcp", action="store_true", help="also serve the two endpoints as tools for language models (MCP)")
    add("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(argv)
    options.password = os.environ.get(PASSWORD, "")
    _check_access(parser, options)
    usual = OWN_LIMITS if options.private else VISITOR_LIMITS
    for name, value in zip(("max_pixels", "max_steps", "max_images", "max_seconds"), usual, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _check_access(parser: cli.Parser, options: argparse.Namespace) -> None:
    from pipelines.guard import is_loopback

    if options.port > 65535:
        parser.error(f"there is no port {options.port}")
    if options.mcp and importlib.util.find_spec("mcp") is None:
        parser.error("--mcp needs the package mcp: install it with pip install 'gradio[mcp]'")
    if is_space():
        options.host = "0.0.0.0"  # where a Space's own proxy expects it; the proxy decides who comes in
    elif not is_loopback(options.host) and not (options.user and options.password):
        parser.error(f"serving on {options.host} needs --user and a password in {PASSWORD}")
    if options.user and len(options.password) < MIN_PASSWORD:
        parser.error(f"the password in {PASSWORD} needs at least {MIN_PASSWORD} characters")
    # Whether everyone who reaches the page is the owner of the machine.
    options.private = is_loopback(options.host) and not is_space()


def is_space() -> bool:
    """Whether this runs as a Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return cli.run(PROGRAM, lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    """Load the first model, serve the page, and wait until it is interrupted."""
    # Before the libraries that read them once.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    if importlib.util.find_spec("gradio") is None:
        raise cli.UserError("the page needs gradio: install it with pip install 'attngen[app]'")
    wrap = _gpu_of_space()
    prepare_folder(options.out)
    engine = make_engine(options)
    print("loading …", end="\r", flush=True)
    engine.warm_up()
    page = build_ui(engine, options.out, wrap, options.private)
    launch(page, options)
    page.block_thread()


def _gpu_of_space() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a Space wants around functions that use its GPU; elsewhere nothing."""
    try:
        import spaces  # pyright: ignore[reportMissingImports]
    except ImportError:
        return lambda function: function
    return spaces.GPU(duration=SPACE_SECONDS)


def prepare_folder(folder: Path) -> None:
    """Make the folder of the pictures; it may hold nothing else, for the page can serve what is in it.

    Raises:
        UserError: if it holds something that the page did not write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [path.name for path in folder.iterdir() if path.suffix not in (".png", ".json", ".tmp")]
    if foreign:
        raise cli.UserError(f"{folder} holds {sorted(foreign)[0]!r}; give the page a folder of its own with --out")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to the folder {folder}")


def make_engine(options: argparse.Namespace) -> Engine:
    """The engine that the command line asks for."""
    from pipelines.engine.models import ModelStore
    from pipelines.engine.session import Engine
    from pipelines.engine.settings import Limits
    from pipelines.engine.shipped import shipped_models

    shipped = shipped_models()
    first = [*options.model, *([FIRST] if FIRST in shipped else [])]
    named = list(dict.fromkeys([*first, *shipped]))
    trusted = options.any_model or options.private
    models = ModelStore(
        options.device,
        options.dtype,
        options.threads,
        allowed=None if trusted else named,
        first=first,
        offload=options.offload,
        allow_pickle=options.allow_pickle,
    )
    limits = Limits(options.max_pixels, options.max_steps, options.max_images, seconds=options.max_seconds or math.inf)
    return Engine(models, limits)


def build_ui(
    engine: Engine,
    folder: str | Path = "outputs/page",
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    private: bool = True,
) -> gr.Blocks:
    """The page over an engine; nothing is served or drawn yet.

    Args:
        engine: that draws; its first model is loaded if it is not.
        folder: where pictures are written.
        wrap: put around each function that draws, as Spaces want it.
        private: whether all visitors are one person, who may see all pictures of the folder.
    """
    import gradio as gr

    from pipelines.ui_api import add_endpoints
    from pipelines.ui_calibrate import CalibrateTab
    from pipelines.ui_compare import CompareTab
    from pipelines.ui_generate import GenerateTab
    from pipelines.ui_hero import make_hero
    from pipelines.ui_remember import Memory

    folder = Path(folder).resolve()
    with gr.Blocks(title="attngen", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# attngen: attention at linear cost", elem_id="title")
        hero = make_hero()
        with gr.Tab("Generate", id="generate"):
            generate = GenerateTab(engine, folder, wrap, private)
        with gr.Tab("Compare", id="compare"):
            compare = CompareTab(engine, folder, generate.form, wrap)
        with gr.Tab("Calibrate", id="calibrate"):
            calibrate = CalibrateTab(engine, folder, generate.form, wrap)
        generate.wire(page, hero)
        compare.wire()
        calibrate.wire(generate)
        Memory(page, generate.form, {**compare.kept, **calibrate.kept}, generate.status)
        add_endpoints(engine, folder, wrap)
    # The engine's own line shows how many come first; on a Space each request has a process of its own.
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1 if is_space() else AT_ONCE, api_open=False)
    return page


def launch(page: gr.Blocks, options: argparse.Namespace, quiet: bool = False) -> str:
    """Serve the page in the background; returns its address.

    Raises:
        OSError: if the port is taken.
    """
    from starlette.middleware import Middleware

    from pipelines.guard import LOOPBACK_NAMES, Guard, LogIn, is_loopback
    from pipelines.hero import CARD, HERE, ICON
    from pipelines.ui_card import Card
    from pipelines.ui_style import CSS, HEAD, theme

    space = is_space()
    own = [options.host] if not is_loopback(options.host) else []
    hosts = ["*"] if space else [*LOOPBACK_NAMES, *own, *options.name]
    log_in = LogIn(options.user, options.password) if options.user else None
    _, local, _ = page.launch(
        server_name=options.host,
        server_port=options.port or None,
        auth=log_in,
        inbrowser=options.open,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        strict_cors=True,
        ssr_mode=False,
        share=False,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[str(options.out.resolve())],
        run_history=False,
        enable_monitoring=False,
        mcp_server=options.mcp,
        pwa=False,
        footer_links=["api"],
        favicon_path=HERE / ICON if (HERE / ICON).is_file() else None,
        theme=theme(),
        css=CSS,
        head=HEAD,
        app_kwargs={
            "middleware": [
                Middleware(Guard, hosts=hosts, framed=space),  # pyright: ignore[reportArgumentType]
                Middleware(Card, picture=HERE / CARD),  # pyright: ignore[reportArgumentType]
            ]
        },
    )
    if not quiet:
        print(f"{local}  (Ctrl+C ends it; images go to {options.out})", flush=True)
    return local


if __name__ == "__main__":
    sys.exit(main())
