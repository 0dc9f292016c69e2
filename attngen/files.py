"""Files that are whole: a reader, a crash or a full disk finds the old one or the new one, never half of either."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, mode 0644; its folder must be there.

    Raises:
        OSError: if it cannot be written, naming it; an older file of that name stays.
    """
    write_whole(path, lambda file: file.write(content))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that takes its name, `path`, when it is whole; for what is too large for memory.

    Raises:
        OSError: see `write_file`; and whatever `write` raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk, too, where the system can; a crash would forget a rename otherwise."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
