"""Files that appear whole or not at all, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a draft beside a file, to write and to read again; at the end it takes the file's place, on the disk.

    Where the block raises, the file stays what it was, and no draft is left.

    Args:
        path: The file; its folder must exist, and only one thread of a process may write it.

    Raises:
        OSError: If it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step, on the disk; see ``whole_file``."""
    with whole_file(path) as file:
        file.write(text.encode())
