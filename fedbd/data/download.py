"""Files of torchvision's data sets: found where torchvision leaves them, or fetched by it where a scenario says so.

Nothing is fetched unless ``data.download`` is true. What waits is bounded: the host has to answer within ``ANSWER``
seconds, and a transfer that stalls for ``STALL`` seconds ends.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedbd.data.files import VARIABLE
from fedbd.errors import DataError, Problem

ANSWER, STALL = 10.0, 60.0
LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A data set as torchvision knows it.

    Attributes:
        name: The data method's name.
        made_by: The torchvision class that leaves such files.
        needed: Files and folders that have to be there, relative to the data folder.
        address: A URL of the host that has them, asked first whether it answers.
        fetch: Downloads and unpacks them into a folder.
    """

    name: str
    made_by: str
    needed: Sequence[str]
    address: Callable[[], str]
    fetch: Callable[[Path], None]


def obtain(origin: Origin, root: Path | None, download: bool) -> Path:
    """Return the data folder once it holds all files of a set.

    Args:
        origin: The set.
        root: The data folder, or None for the one that FEDBD_DATA names.
        download: Fetch what is not there.

    Raises:
        DataError: If something is missing and may not, or cannot, be fetched.
    """
    folder = root if root is not None else os.environ.get(VARIABLE) or None
    where = f"data '{origin.name}'"
    if folder is None:
        remedy = f"name it in data.root or in the environment variable {VARIABLE}"
        raise DataError([Problem(path=where, expected="needs a folder of data files", remedy=remedy)])
    base = Path(folder).expanduser()
    if _missing(base, origin.needed) and download:
        _download(origin, base, where)
    missing = _missing(base, origin.needed)
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        got = f"no {', '.join(missing[:LISTED])}{more}" if os.path.isdir(base) else "no such folder"
        remedy = f"copy there what {origin.made_by} leaves"
        remedy += "" if download else ", or set data.download to true where there is a network"
        raise DataError([Problem(path=where, expected=f"must lie in {base}", got=got, remedy=remedy)])
    return base


def _missing(base: Path, needed: Sequence[str]) -> list[str]:
    return [name for name in needed if not os.path.exists(base / name)]


def _download(origin: Origin, base: Path, where: str) -> None:
    try:
        _answers(origin.address())
        with _bounded():
            origin.fetch(base)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # torchvision: RuntimeError for a wrong checksum
        reason = str(getattr(error, "reason", "") or error).strip().splitlines()
        expected = f"cannot be downloaded to {base} ({reason[0] if reason else type(error).__name__})"
        remedy = (
            f"copy there what {origin.made_by} leaves on a machine with a network: {', '.join(origin.needed[:LISTED])}"
        )
        remedy += ", ..." if len(origin.needed) > LISTED else ""
        raise DataError([Problem(path=where, expected=expected, remedy=remedy)]) from None


def _answers(address: str) -> None:
    """Ask whether a host answers, in a thread of its own: looking up a name knows no timeout.

    Raises:
        OSError: If it does not.
    """
    failures: list[OSError] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=ANSWER).close()
        except urllib.error.HTTPError:
            return  # an answer all the same
        except OSError as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * ANSWER)
    if asking.is_alive():
        raise TimeoutError(f"{address} does not answer")
    if failures:
        raise failures[0]


@contextmanager
def _bounded() -> Iterator[None]:
    """Give sockets that are opened meanwhile a timeout; torchvision opens them without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
