"""One writer for each run's folder: a lock that lives as long as the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedbd.errors import Problem, UserError

LOCK = ".lock"
"""Locked by the process that writes a run's folder, for as long as it lives; the file itself means nothing."""

_LOCK_TRIES, _TICK = 5, 0.05  # whoever only looks whether a folder is locked is in the way for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def written(folder: Path) -> Problem:
    """Return what to say of a folder that another process writes."""
    remedy = "wait until that has ended, or pass --out with another folder"
    return Problem(path=str(folder), expected="is being written by another fedbd run", remedy=remedy)


def is_written(folder: Path) -> bool:
    """Return whether a living process writes a run's folder (``writing``)."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _locked(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a run's folder and lock it; the lock ends with the block, or with the process, however that ends.

    Raises:
        UserError: If another process writes the folder, or it cannot be written.
    """
    try:
        file = _lock(folder)
    except OSError as error:
        problem = Problem(path=str(folder), expected="must be a folder that can be written", got=str(error))
        raise UserError([problem]) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited: a lock lives as long as its file
        for _ in range(_LOCK_TRIES):
            if _locked(file, fcntl.LOCK_EX):
                break
            time.sleep(_TICK)
        else:
            os.close(file)
            raise UserError([written(folder)])
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(folder / LOCK)):
                return file
        os.close(file)  # whoever held it has removed it in between


def _locked(file: int, kind: int) -> bool:
    """Lock an open file without waiting; False where another process has it. A file system may know no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
