"""Files that are whole or not there, in folders that one process at a time writes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``: readers see the old content or the new, also after a crash or on a full disk.

    Raises:
        OSError: naming ``path``; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON, atomically; ValueError for NaN and infinities, which JSON has not."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from writing into ``folder``; the lock of a killed process is gone with it.

    Args:
        folder: made where it is missing.
        what: it holds, for the error.

    Raises:
        RuntimeError: another process is writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{folder}: another process is writing this {what}; wait for it or end it") from error
        yield


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
