"""Atomic writing: readers, a crash and a full disk leave the old file or the new one, never half of either."""

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
    """Let `write` fill a temporary file that becomes `path` when it is complete; for content too large for memory.

    Raises:
        OSError: see `write_file`; exceptions of `write` pass through.
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
    """Flush a folder's entries to disk, where the system can; otherwise a crash could undo a rename."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
