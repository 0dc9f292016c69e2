"""List the attention methods with their options: python -m pipelines.methods; with --readme rewrite README's table."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import cli

if TYPE_CHECKING:
    from pipelines.methods.catalogue import Offer
    from pipelines.methods.options import Option

PROGRAM = "pipelines.methods"
BEGIN, END = "<!-- presets: python -m pipelines.methods --readme README.md -->", "<!-- end of presets -->"
EXAMPLES = """
examples:
  python -m pipelines.methods
  python -m pipelines.methods agent tome
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(PROGRAM, "List the attention methods with their options, ranges and defaults.", EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="only these (default: all)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the table of presets of this file")
    options = parser.parse_args(argv)
    return cli.run(PROGRAM, lambda: rewrite(options.readme) if options.readme else show(options.names))


def show(names: Sequence[str]) -> None:
    """Print methods."""
    from pipelines.methods.catalogue import METHODS
    from pipelines.methods.uses import find_method

    for info in [find_method(name) for name in names] or METHODS.values():
        source = f" ({info.source})" if info.source else ""
        print(f"{info.name}: {info.title}. {info.about}{source}")
        for option in info.options:
            print(f"  {_default(option)}  {option.limits}: {option.about}")


def _default(option: Option) -> str:
    from pipelines.methods.options import plain

    return option.name if option.kind == "plan" else f"{option.name}={plain(option.default)}"


def rewrite(path: Path) -> None:
    """Put the present table between the marks of a file.

    Raises:
        UserError: if it has no such marks.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise cli.UserError(f"{path} does not have the lines {BEGIN} and {END} once each")
    path.write_text(with_table(text), encoding="utf-8")


def with_table(text: str) -> str:
    """A text with the present table between its marks."""
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", presets_table(), text, flags=re.DOTALL)


def presets_table() -> str:
    """The table of `attngen.PRESETS`, in Markdown."""
    import attngen
    from pipelines.methods.catalogue import Offer

    rows = [_row(Offer(name)) for name in attngen.PRESETS]
    return "\n".join(["| preset | what it does | options | source |", "|---|---|---|---|", *rows]) + "\n"


def _row(offer: Offer) -> str:
    info, plan = offer.info(), offer.base
    about = info.about
    if plan.min_tokens:
        about += f" In layers of {plan.min_tokens:,} tokens or more."
    if plan.max_levels is not None:
        about += f" In the {f'{plan.max_levels} finest resolutions' if plan.max_levels > 1 else 'finest resolution'}."
    # As Python has them, for `attngen.apply`.
    fields = [(o.name, f'"{value}"' if isinstance(value, str) else repr(value)) for o, value in offer.fields()]
    options = ", ".join(f"`{name}={value}`" for name, value in fields)
    source = re.sub(r"arXiv (\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", info.source)
    return f"| `{info.name}` | {about} | {options} | {source} |"


if __name__ == "__main__":
    sys.exit(main())
