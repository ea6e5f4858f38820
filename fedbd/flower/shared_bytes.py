"""Moves objects that hold big byte strings between processes of this machine without copying them through a pipe.

The strings are written once to an anonymous file, whose descriptor travels over the socket; the rest is pickled over
that private pipe with references in their place. An anonymous file has no name: nothing can be left in /dev/shm and no
resource tracker has to know of it, for the kernel frees it with the last process that holds it, even after SIGKILL. Nor
does the size of /dev/shm limit it (64 MB in many containers, beyond which a write to named shared memory kills the
writer).
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

BIG = 64 * 1024 if hasattr(os, "pread") else sys.maxsize
"""Byte strings of at least this many bytes travel by file; on systems without ``pread`` (Windows) none does."""

REPLY_FILE = 0
"""The file number that stands for a worker's own file of replies."""

Place = tuple[int, int, int]
"""Where a byte string lies: file number, offset, size in bytes."""

# One system call moves at most 2 GiB.
_STEP = 1 << 30


def anonymous_file() -> int:
    """Return the descriptor of an empty file in memory that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedbd")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` to a file at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view[:_STEP], offset)
        view, offset = view[written:], offset + written


def read_at(file: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes of a file from an offset.

    Raises:
        EOFError: If the file ends before.
    """
    parts = []
    while size:
        part = os.pread(file, min(size, _STEP), offset)
        if not part:
            raise EOFError(f"a shared file ends {size} bytes early")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Dumper(pickle.Pickler):
    def __init__(self, file: io.BytesIO, place: Callable[[bytes], Place]) -> None:
        super().__init__(file, protocol=5)
        self._place = place

    def persistent_id(self, obj: Any) -> Place | None:
        return self._place(obj) if type(obj) is bytes and len(obj) >= BIG else None


class _Loader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fetch: Callable[[Place], bytes]) -> None:
        super().__init__(file)
        self._fetch = fetch

    def persistent_load(self, pid: Place) -> bytes:
        return self._fetch(pid)


def dump(value: object, place: Callable[[bytes], Place]) -> bytes:
    """Pickle a value; ``place`` puts each big byte string somewhere and says where."""
    out = io.BytesIO()
    _Dumper(out, place).dump(value)
    return out.getvalue()


def load(data: bytes, fetch: Callable[[Place], bytes]) -> Any:
    """Unpickle what ``dump`` made in another process of ours; ``fetch`` gets each big byte string from its place."""
    return _Loader(io.BytesIO(data), fetch).load()


@dataclass
class _Sheet:
    """A file of big byte strings, with the objects written to it: while they live, their ``id`` stays theirs."""

    file: int
    size: int = 0
    strings: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Parcel:
    """A pickled request and what the worker needs to open it.

    Attributes:
        data: The pickle.
        strings: The big byte strings that it refers to, by place.
        files: Descriptors, by file number, that the worker has not had yet; to be closed after sending.
        keep: Numbers of all files that later requests may refer to; the worker forgets the others.
    """

    data: bytes
    strings: dict[Place, bytes]
    files: dict[int, int]
    keep: frozenset[int]


class Outbox:
    """The driver's big byte strings on their way to workers: the same object is written once, however often it is sent.

    The oldest files that a request does not need are closed when there is too much; that is safe at any time, for a
    worker that has received a file has it open itself.
    """

    def __init__(self, limit: int = 1 << 30, files: int = 64) -> None:
        """Hold at most ``limit`` bytes in ``files`` files, beyond what the last request needs."""
        self._limit, self._most = limit, files
        self._lock = threading.Lock()
        self._numbers = itertools.count(REPLY_FILE + 1)
        self._sheets: dict[int, _Sheet] = {}  # the oldest first
        self._places: dict[int, Place] = {}

    def pack(self, value: object, seen: Iterable[int]) -> Parcel:
        """Pickle a value for a worker that has received the files ``seen`` before."""
        with self._lock:
            strings: dict[Place, bytes] = {}
            number = next(self._numbers)

            def place(data: bytes) -> Place:
                where = self._places.get(id(data)) or self._write(number, data)
                strings[where] = data
                return where

            try:
                pickled = dump(value, place)
                used = {where[0] for where in strings}
                self._shrink(used)
                files = {each: os.dup(self._sheets[each].file) for each in sorted(used.difference(seen))}
            except BaseException:
                self._close(number)
                raise
            return Parcel(pickled, strings, files, frozenset(self._sheets))

    def clear(self) -> None:
        """Close all files."""
        with self._lock:
            for number in list(self._sheets):
                self._close(number)

    def _write(self, number: int, data: bytes) -> Place:
        if number not in self._sheets:
            self._sheets[number] = _Sheet(anonymous_file())
        sheet = self._sheets[number]
        where = (number, sheet.size, len(data))
        write_at(sheet.file, data, sheet.size)
        sheet.size += len(data)
        sheet.strings.append(data)
        self._places[id(data)] = where
        return where

    def _shrink(self, used: set[int]) -> None:
        total = sum(sheet.size for sheet in self._sheets.values())
        for number in [each for each in self._sheets if each not in used]:
            if total <= self._limit and len(self._sheets) <= self._most:
                return
            total -= self._sheets[number].size
            self._close(number)

    def _close(self, number: int) -> None:
        sheet = self._sheets.pop(number, None)
        if sheet is not None:
            os.close(sheet.file)
            for data in sheet.strings:
                del self._places[id(data)]


class Inbox:
    """A worker's side of an ``Outbox``: the files it has, and what it has read from them."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._files: dict[int, int] = {}
        self._read: dict[Place, bytes] = {}

    def receive(self, files: dict[int, int], keep: frozenset[int]) -> None:
        """Take over new descriptors and forget the files that no request will refer to again."""
        self._files.update(files)
        for number in self._files.keys() - keep:
            os.close(self._files.pop(number))
        self._read = {where: data for where, data in self._read.items() if where[0] in keep}

    def unpack(self, data: bytes) -> tuple[Any, dict[int, Place]]:
        """Unpickle a request; also return where its big byte strings came from, by their ``id``."""
        origin: dict[int, Place] = {}

        def fetch(where: Place) -> bytes:
            if where not in self._read:
                number, offset, size = where
                self._read[where] = read_at(self._files[number], size, offset)
            origin[id(self._read[where])] = where
            return self._read[where]

        return load(data, fetch), origin


class ReplyFile:
    """A worker's file of big byte strings for the driver, written anew for each reply."""

    def __init__(self) -> None:
        """Begin without a file: many apps never need one."""
        self.file: int | None = None

    def pack(self, value: object, origin: dict[int, Place]) -> bytes:
        """Pickle a reply; what came with the request (see ``Inbox.unpack``) is referred to, not sent back."""
        placed: dict[int, tuple[bytes, Place]] = {}
        end = 0

        def place(data: bytes) -> Place:
            nonlocal end
            if id(data) in origin:
                return origin[id(data)]
            if id(data) not in placed:
                if self.file is None:
                    self.file = anonymous_file()
                write_at(self.file, data, end)
                placed[id(data)] = (data, (REPLY_FILE, end, len(data)))
                end += len(data)
            return placed[id(data)][1]

        return dump(value, place)
