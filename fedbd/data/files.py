"""Where data files lie: under ``data.root``, else under the environment variable FEDBD_DATA."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

from fedbd.errors import Problem

VARIABLE = "FEDBD_DATA"
FORMS = "fedbd reads .npz (arrays in the Keras layout) and .parquet (Hugging Face image sets)"
LISTED = 5


def locate(pattern: str, root: Path | None) -> tuple[list[Path], list[Problem]]:
    """Find a data file, or the files that a glob names.

    Args:
        pattern: A file name or glob, relative to the data folder, or absolute.
        root: The data folder, or None for the one that FEDBD_DATA names.

    Returns:
        The files, sorted by name, and no problem; or no file and the problem, which names the folder tried.
    """
    folder = root if root is not None else os.environ.get(VARIABLE) or None
    if folder is None and not os.path.isabs(pattern):
        remedy = f"name it in data.root or in the environment variable {VARIABLE}"
        return [], [Problem(path=pattern, expected="needs a folder of data files", remedy=remedy)]
    base = Path(folder).expanduser() if folder is not None else Path("/")
    found = glob.glob(os.path.join(glob.escape(str(base)), pattern))
    files = sorted(path for path in map(Path, found) if path.is_file())
    return (files, []) if files else ([], [_missing(pattern, base)])


def content_of(file: str) -> str:
    """Return the SHA-256 of a file, or its path where there is none: what a run's identity names it by."""
    path = Path(file).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def _missing(pattern: str, base: Path) -> Problem:
    """Return the problem of a file that is not there."""
    if os.path.isabs(pattern):
        return Problem(path=pattern, expected="must be a file", got="nothing of that name", remedy=FORMS)
    if not base.is_dir():
        remedy = f"name the folder of data files in data.root or in the environment variable {VARIABLE}"
        return Problem(path=pattern, expected=f"must lie in {base}", got="no such folder", remedy=remedy)
    readable = sorted(path.name for path in base.iterdir() if path.suffix in {".npz", ".parquet"})
    more = f" and {len(readable) - LISTED} more" if len(readable) > LISTED else ""
    held = f"that folder holds {', '.join(readable[:LISTED])}{more}" if readable else "that folder holds no such file"
    return Problem(path=pattern, expected=f"must lie in {base}", got="nothing of that name", remedy=f"{held}; {FORMS}")
