"""The engine as the programs run it: made of their options, watched by a bar, and waited for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.background import Tell
from pipelines.engine import Engine
from pipelines.models import ModelStore
from pipelines.results import Progress
from pipelines.settings import UNLIMITED

STORE_OPTIONS = ("device", "dtype", "threads", "offload", "allow_pickle", "config", "revision", "variant")


def make_engine(options: argparse.Namespace) -> Engine:
    """An engine without limits for the options of a program, as far as it has them."""
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in STORE_OPTIONS}
    return Engine(ModelStore(**given), UNLIMITED)


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """What moves a bar, where someone is watching."""
    from tqdm import tqdm

    with tqdm(total=100, disable=not sys.stderr.isatty(), leave=False, bar_format="{l_bar}{bar}| {desc}") as bar:

        def tell(progress: Progress) -> None:
            bar.set_description_str(str(progress), refresh=False)
            bar.n = round(100 * progress.share)
            bar.refresh()

        yield tell
