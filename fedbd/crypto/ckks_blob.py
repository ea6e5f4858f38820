"""Ciphertexts and keys of the CKKS sum as flat bytes: header, checksum, length-prefixed slices. No cryptography."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedbd.errors import SecureSumFailed

Blob = bytes | bytearray | memoryview
"""Bytes as they come from a file, a socket or a message."""

FORMAT_VERSION = 1
CIPHERTEXT, KEY = b"FBCT", b"FBSK"
_STAMP = struct.Struct("<4sHHBBBx")  # magic, version, then the figures
_EXTENT = struct.Struct("<QI")  # number of values, CRC-32 of what follows
_LENGTH = struct.Struct("<I")
_STEP = 1024
STAMP_BYTES = _STAMP.size


class Figures(NamedTuple):
    """What two parties must agree on: ring degree, bits of the data prime, log2 of the scale, grid bits."""

    degree: int
    data_bits: int
    scale_bits: int
    grid_bits: int


def stamp(magic: bytes, figures: Figures) -> bytes:
    """Return format and parameters as ``STAMP_BYTES`` bytes."""
    return _STAMP.pack(magic, FORMAT_VERSION, *figures)


def read_stamp(magic: bytes, blob: Blob, what: str) -> Figures:
    """Return the parameters at the head of ``blob``.

    Args:
        magic: ``CIPHERTEXT`` or ``KEY``.
        blob: At least the head of what ``stamp`` began.
        what: How the error names it.

    Raises:
        SecureSumFailed: If the blob is something else or of another format version.
    """
    view = memoryview(blob).cast("B")
    if len(view) < STAMP_BYTES or view[:4] != magic:
        raise SecureSumFailed(f"{what}: expected one made by fedbd, got {len(view)} bytes of something else")
    _, version, *figures = _STAMP.unpack_from(view)
    if version != FORMAT_VERSION:
        raise SecureSumFailed(f"{what}: expected format {FORMAT_VERSION}, got {version}; use one release everywhere")
    return Figures(*figures)


def pack(figures: Figures, size: int, parts: Sequence[bytes]) -> bytes:
    """Return a ciphertext of ``size`` values, cut into ``parts``, as one blob.

    Slices are padded with zeros to full kibibytes: SEAL compresses them, to a length that varies by some bytes with the
    randomness in them, and neither the traffic nor a run's record should depend on that.
    """
    body = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part, bytes(_padding(len(part)))))
    return b"".join((stamp(CIPHERTEXT, figures), _EXTENT.pack(size, zlib.crc32(body)), body))


def unpack(blob: Blob, expected: Figures) -> tuple[int, list[memoryview]]:
    """Return the number of values and the slices of a ciphertext, which are still to be parsed.

    Args:
        blob: What ``pack`` returned.
        expected: The parameters of whoever reads it.

    Raises:
        SecureSumFailed: If a header field, the checksum, a slice's length or the number of slices is wrong.
    """
    view = memoryview(blob).cast("B")
    found = read_stamp(CIPHERTEXT, view, "ciphertext")
    if found != expected:
        raise SecureSumFailed(f"ciphertext: expected {expected}, got {found}; every party needs the same scenario")
    head = STAMP_BYTES + _EXTENT.size
    if len(view) < head:
        raise SecureSumFailed(f"ciphertext: cut off inside its header, at {len(view)} bytes")
    size, checksum = _EXTENT.unpack_from(view, STAMP_BYTES)
    if zlib.crc32(view[head:]) != checksum:
        raise SecureSumFailed(f"ciphertext: damaged or cut off: the checksum of its {len(view)} bytes is wrong")
    parts = list(_split(view[head:]))
    wanted = -(-size // (expected.degree // 2))
    if size == 0 or len(parts) != wanted:
        raise SecureSumFailed(f"ciphertext: expected {wanted} slices for {size} values, got {len(parts)}")
    return size, parts


def _split(body: memoryview) -> Iterator[memoryview]:
    """Yield the length-prefixed slices of a body."""
    at = 0
    while at < len(body):
        start = at + _LENGTH.size
        length = _LENGTH.unpack_from(body, at)[0] if start <= len(body) else 0
        at = start + length + _padding(length)
        if at > len(body):
            raise SecureSumFailed(f"ciphertext: a slice ends {at - len(body)} bytes beyond the end")
        yield body[start : start + length]


def _padding(length: int) -> int:
    """Return the zeros after a slice of so many bytes."""
    return -(_LENGTH.size + length) % _STEP
