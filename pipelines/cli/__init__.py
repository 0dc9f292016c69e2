"""What the programs share: arguments, one-sentence errors, exit codes.

Nothing heavy is imported here or at the top of a program, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DTYPES = ("auto", "float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")


class UserError(Exception):
    """Something the user can put right; its text is the one sentence that is printed."""


class Parser(argparse.ArgumentParser):
    """An argument parser for `python -m program` whose errors are one sentence."""

    def __init__(self, program: str, description: str | None, examples: str = "") -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {program}", description=description, epilog=examples, formatter_class=formatter
        )
        self.program = program

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The options; an unknown one is an error that names the nearest."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]!r}{f'; near it: {near[0]}' if near else ''}")
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.program}: {message} (--help lists the options)\n")


def run(program: str, body: Callable[[], None]) -> int:
    """Run a program's body; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' to its programmers, not to ours
            warnings.showwarning = lambda message, *_, **__: print(f"{program}: warning: {message}", file=sys.stderr)
            body()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain(program, "interrupted", EXIT_INTERRUPTED)
    except UserError as error:
        return _complain(program, str(error), EXIT_USAGE)
    except BrokenPipeError:  # `| head` closed the pipe; Python would complain again while exiting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (FloatingPointError, OSError) as error:
        return _complain(program, str(error), EXIT_FAILURE)
    except (MemoryError, RuntimeError) as error:
        from pipelines.engine.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise  # a fault of ours, which a traceback helps to find
        return _complain(program, "out of memory; draw smaller or fewer images", EXIT_FAILURE)
    return 0


def _complain(program: str, message: str, code: int) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return code


# Types of arguments


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def scale_number(text: str) -> float:
    """An argument type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def png_path(text: str) -> Path:
    """An argument type: a file name that ends in .png."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def add_common_arguments(parser: argparse.ArgumentParser, images: int = 1) -> None:
    """The arguments that every picture-making program has; `images` is the default number of pictures."""
    about = f"images per prompt or class (default {images})"
    parser.add_argument("--images", type=whole_number(1), default=images, metavar="N", help=about)
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of the first image; image k has seed + k (default 0)"
    )
    parser.add_argument("--height", type=whole_number(1), help="in pixels (default: as the model was trained)")
    parser.add_argument("--width", type=whole_number(1), help="in pixels (default: as the model was trained)")
    parser.add_argument("--out", type=png_path, help="file to write (default: a new one in outputs/)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the model (default: auto)")
    parser.add_argument(
        "--threads", type=whole_number(1), help="CPU threads (default: all cores; one for a small network)"
    )
    parser.add_argument("--json", action="store_true", help="print settings, seconds and file as JSON")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a text-to-image model, and how it is loaded."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, or .safetensors file")
    add("--config", help="for a single file: folder or hub id of a pipeline of its kind (default: from the hub)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="weights' variant, such as fp16")
    add("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    add("--offload", choices=OFFLOADS, default="none", help="keep idle parts in main memory")


# Devices, files, output


def prepare_device(options: argparse.Namespace) -> torch.device:
    """The device asked for, with the number of threads set.

    Raises:
        UserError: if there is no such device.
    """
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"there is no device {options.device!r} here: {reason}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of that name; for "auto" bfloat16 on a GPU that has it, float16 on another, float32 on a CPU."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32 if device.type == "cpu" else torch.float16


def output_path(options: argparse.Namespace, stem: str) -> Path:
    """`--out`, or a name in outputs/ that no file has yet; its folder is made, before any work.

    Raises:
        OSError: if the folder cannot be made or written to.
    """
    path = options.out or _free_name(stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write to the folder {path.parent}")
    return path


def _free_name(stem: str) -> Path:
    stem = re.sub(r"[^\w]+", "-", stem, flags=re.ASCII).strip("-").lower()[:60] or "picture"
    path, number = Path("outputs") / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}-{number}.png")
    return path


def report_done(options: argparse.Namespace, path: Path, count: int, seconds: float, **details: Any) -> None:
    """Print where the picture is and how long it took; with --json all of `details` too."""
    if options.json:
        print(json.dumps({"file": str(path), "seconds": round(seconds, 3), **details}, ensure_ascii=False))
    else:
        print(f"{path}  ({count} image{'s' if count > 1 else ''}, {seconds:.1f} s)")


def public_name(model: str) -> str:
    """A model's name for the file's settings: as given, but no folder names of the user's machine."""
    path = Path(model)
    return path.name if path.is_absolute() else model


def first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
