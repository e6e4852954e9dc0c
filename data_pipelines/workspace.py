"""The directory a preparation writes into: nothing that looks finished exists until everything is.

All files go to ``DIR.partial-<pid>``, which is renamed to ``DIR`` as the last step. Whatever a killed preparation left
is removed at the next start; it is recognised by a file lock, which the system frees with the process, so a preparation
that is still running is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recemb.data.manifest import FILE_NAME

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def workspace(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a fresh directory beside ``out``; rename it to ``out`` when the block ends well, else remove it.

    Args:
        out: directory to make.
        overwrite: replace a data set that is there already.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false, or it is not a data set (never deleted).
        OSError: no space left, with the directory and what is free.
    """
    out = Path(os.path.abspath(out))
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        with (partial / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            (partial / _LOCK).unlink()
            _publish(partial, out, overwrite=overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(out.parent).free
            raise OSError(
                error.errno,
                f"{out}: no space left on its disk ({free / 1e9:.2f} GB free beside what was written). Nothing was "
                "kept; free space for about the size of the uncompressed log, or choose --out on another disk",
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """A workspace for a preparation in two steps: yield a scratch folder and the directory to encode a data set into.

    When the block ends well the data set alone becomes ``out``; scratch is removed in any case.

    Raises:
        FileExistsError, OSError: as ``workspace``.
    """
    with workspace(out, overwrite=overwrite) as partial:
        scratch, encoded = partial / "scratch", partial / "encoded"
        scratch.mkdir()
        yield scratch, encoded
        shutil.rmtree(scratch)
        for path in encoded.iterdir():
            shutil.move(path, partial / path.name)
        encoded.rmdir()


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError when ``out`` must not be written."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(f"{out}: exists already; choose another --out, or --overwrite to replace it")
    if not (out / FILE_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out}: exists and is not an encoded data set (no {FILE_NAME}); --overwrite replaces only data sets"
        )


def _publish(partial: Path, out: Path, *, overwrite: bool) -> None:
    check_target(out, overwrite=overwrite)
    replaced = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    for path in [*out.parent.glob(f"{out.name}.partial-*"), *out.parent.glob(f"{out.name}.replaced-*")]:
        if not path.is_dir() or _is_locked(path / _LOCK):
            continue
        logger.warning("removing %s, left by a preparation that did not finish", path)
        shutil.rmtree(path, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
