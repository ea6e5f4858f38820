"""Decoded data sets on disk: written once, then memory-mapped by every process.

An entry is a folder of ``.npy`` files and ``entry.json`` (their SHA-256), named by a hash of the sources' contents, of
the reader and of its fields: whatever changes what would be read gives another entry. It appears by one rename, so a
reader sees all of it or nothing, and any number of processes may write at once. Every opening compares the hashes (1 s
per 1.4 GB); an entry that fails is built again. Without a folder that can be written, each process decodes for itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedbd.data.checks import Arrays
from fedbd.errors import DataError, Problem

FORMAT = 1
"""Raise it when the layout of an entry, or what a reader makes of the same file, changes."""

log = logging.getLogger(__name__)


def folder() -> Path:
    """Return the cache folder: $FEDBD_CACHE, else fedbd in $XDG_CACHE_HOME (if absolute), else ~/.cache/fedbd.

    Raises:
        DataError: If $FEDBD_CACHE names something that is no folder and can become none.
    """
    own = os.environ.get("FEDBD_CACHE")
    if own:
        wanted = Path(own).expanduser()
        there = next((place for place in (wanted, *wanted.parents) if place.exists()), wanted)
        if there.exists() and not there.is_dir():
            remedy = "name a folder for decoded data (it is made), or unset FEDBD_CACHE"
            raise DataError([Problem(path="FEDBD_CACHE", expected="must be a folder", got=own, remedy=remedy)])
        return wanted
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "fedbd"


def cached(reader: str, fields: Mapping[str, Any], sources: Sequence[Path], decode: Callable[[], Arrays]) -> Arrays:
    """Return a decoded data set from the cache, decoding it first where needed.

    Args:
        reader: Name of the reader.
        fields: What else decides what is read; JSON values.
        sources: The files that are read, in order.
        decode: Reads them; called at most once.

    Returns:
        Arrays mapped copy-on-write: processes share the pages, and a write stays in the process that wrote.

    Raises:
        DataError: If a source cannot be read, or $FEDBD_CACHE is no folder.
    """
    place = folder() / _key(reader, fields, sources)
    arrays = _open(place)
    if arrays is not None:
        return arrays
    fresh = decode()
    _store(place, fresh)
    arrays = _open(place)
    if arrays is None:
        log.warning("data cache %s cannot be used: every process decodes the data set for itself", place.parent)
        return fresh
    return arrays


def _key(reader: str, fields: Mapping[str, Any], sources: Sequence[Path]) -> str:
    """Return the name of an entry. Names and times of the files do not count, their contents do."""
    contents, problems = [], []
    for path in sources:
        try:
            contents.append(_sha256(path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            problems.append(Problem(path=path.name, expected=f"must be readable: {reason}"))
    if problems:
        raise DataError(problems)
    text = json.dumps([FORMAT, reader, dict(fields), contents], sort_keys=True)
    return f"{reader}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(place: Path) -> Arrays | None:
    """Return the arrays of an entry, or None if it is not there or not whole."""
    try:
        listed: dict[str, str] = json.loads((place / "entry.json").read_text())["sha256"]
        for name, digest in listed.items():
            if _sha256(place / f"{name}.npy") != digest:
                raise ValueError(f"{name}.npy differs from what was written")
        return {name: np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in listed}
    except FileNotFoundError:
        if place.exists():
            log.warning("data cache entry %s is not whole: it is built again", place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("data cache entry %s is damaged (%s): it is built again", place, error)
    return None


def _store(place: Path, arrays: Arrays) -> None:
    """Write an entry beside its place and rename it there; give way where that fails (the caller looks again)."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent, ignore_cleanup_errors=True) as scratch:
            fresh = Path(scratch, "new")
            fresh.mkdir()
            for name, array in arrays.items():
                np.save(fresh / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
            digests = {name: _sha256(fresh / f"{name}.npy") for name in arrays}
            (fresh / "entry.json").write_text(json.dumps({"sha256": digests}, indent=1))
            if place.exists() and _open(place) is None:
                place.rename(Path(scratch, "old"))  # whoever mapped it keeps the pages
            fresh.rename(place)  # fails where another process was first: its entry is as good
    except OSError as error:
        log.info("data cache entry %s was not written: %s", place, error)
