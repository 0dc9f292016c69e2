"""The texts in a PNG, read chunk by chunk: before the pixels or behind them, and without decoding any."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
MAX_TEXT_BYTES = 1 << 20  # of one text; longer ones are left out
MAX_CHUNKS = 100_000


def read_texts(path: str | Path) -> dict[str, str]:
    """Texts by keyword; of several with one keyword the first.

    Raises:
        ValueError: if the file is no PNG, or damaged.
        OSError: if it cannot be read.
    """
    texts: dict[str, str] = {}
    with open(path, "rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise ValueError("it is no PNG picture")
        for _ in range(MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                raise ValueError("it is a damaged PNG picture")
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND":
                return texts
            content = _content(file, length, kind)
            if content is not None and (found := _text(kind, content)) is not None:
                texts.setdefault(*found)
    raise ValueError("it is a damaged PNG picture")


def _content(file: BinaryIO, length: int, kind: bytes) -> bytes | None:
    """The content of a text chunk; None for another, which is skipped with its checksum."""
    if kind not in TEXT_CHUNKS or length > MAX_TEXT_BYTES:
        file.seek(length + 4, 1)
        return None
    content, check = file.read(length), file.read(4)
    if len(content) < length or zlib.crc32(kind + content).to_bytes(4, "big") != check:
        raise ValueError("it is a damaged PNG picture")
    return content


def _text(kind: bytes, content: bytes) -> tuple[str, str] | None:
    """(keyword, text) of a text chunk; None for one that is not as the standard has it."""
    keyword, _, rest = content.partition(b"\0")
    compressed, encoding = kind == b"zTXt", "latin-1"
    if kind == b"iTXt":
        flags, encoding = rest[:2], "utf-8"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        compressed = flags[:1] == b"\1"
    elif compressed:
        rest = rest[1:]
    try:
        if compressed:
            inflate = zlib.decompressobj()
            rest = inflate.decompress(rest, MAX_TEXT_BYTES)
            if inflate.unconsumed_tail:
                return None
        return keyword.decode("latin-1"), rest.decode(encoding)
    except (zlib.error, UnicodeDecodeError):
        return None
