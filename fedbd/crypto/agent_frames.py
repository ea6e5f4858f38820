"""The key agent's frames: length-prefixed JSON and raw bytes on a stream socket. Nothing is ever unpickled."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np

from fedbd.errors import SecureSumFailed

PROTOCOL = 1
MAX_HEADER = 2**16
MAX_BODY = 2**32
"""Bytes in a frame at most: a ciphertext of 140 million values."""
_FRAME = struct.Struct("<IQ")  # bytes of the JSON header, bytes of the body


def send(connection: socket.socket, header: dict[str, Any], body: bytes | memoryview = b"") -> None:
    """Send one frame: lengths, a JSON header, raw bytes."""
    text = json.dumps(header).encode()
    connection.sendall(_FRAME.pack(len(text), len(body)) + text)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], memoryview] | None:
    """Return the next frame's header and body, or None if the other side has closed between frames.

    Raises:
        SecureSumFailed: If what comes is no frame or one beyond the limits; the connection is then of no more use.
        OSError: If the connection breaks or times out.
    """
    first = connection.recv(1)
    if not first:
        return None
    sizes = _FRAME.unpack(first + _exactly(connection, _FRAME.size - 1))
    if sizes[0] > MAX_HEADER or sizes[1] > MAX_BODY:
        raise SecureSumFailed(f"frame: at most {MAX_HEADER} + {MAX_BODY} bytes are taken, got {sizes[0]} + {sizes[1]}")
    try:
        header = json.loads(bytes(_exactly(connection, sizes[0])))
    except ValueError as fault:
        raise SecureSumFailed("frame: the header is no JSON") from fault
    if not isinstance(header, dict):
        raise SecureSumFailed("frame: the header is no JSON object")
    return header, _exactly(connection, sizes[1])


def _exactly(connection: socket.socket, size: int) -> memoryview:
    """Return the next ``size`` bytes."""
    # Memory that is announced but never sent stays untouched, so a false length costs nothing.
    view = np.empty(size, dtype=np.uint8).data
    at = 0
    while at < size:
        got = connection.recv_into(view[at:])
        if got == 0:
            raise ConnectionResetError("the connection was closed inside a frame")
        at += got
    return view
