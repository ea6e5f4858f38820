"""The key agent: a process that owns the CKKS key, encrypts and decrypts for its clients and never hands the key out.

Flower keeps every client's state in the driver's process and in checkpoints, next to the server. So no key may stand
there: it lives here, and clients hold a handle (``fedbd.crypto.agent_client``). A Unix socket in an owner-only folder
takes length-prefixed frames, JSON plus raw bytes, from processes of the same user; each connection gets a forked
process, so that workers encrypt in parallel.

What this is against: keys in files, messages, checkpoints, core dumps and in the memory of other processes. It is not
against root or the same user with a debugger, and memory is not locked: on a machine with swap, encrypt the swap.

Run it by hand beside a SuperNode, which has no process that stays: ``python -m fedbd.crypto.agent --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedbd.crypto.agent_client import AgentProcess, KeyAgent, start_agent
from fedbd.crypto.agent_frames import PROTOCOL, receive, send
from fedbd.crypto.ckks import Ckks, decrypt, encrypt, new_secret_context, parameters_of
from fedbd.errors import SecureSumFailed

__all__ = ["AgentProcess", "KeyAgent", "main", "read_key_file", "start_agent", "write_key_file"]

_SILENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_SOCKET_PATH_BYTES = 104  # the least of the systems' limits, with the closing zero


def write_key_file(path: Path, ckks: Ckks) -> None:
    """Make a key and write it to a new file that only its owner can read.

    Every client of a deployment needs a copy of this file; the server must never get one.

    Raises:
        SecureSumFailed: If the file exists already or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as fault:
        raise SecureSumFailed(f"{path}: cannot make a new key file: {fault.strerror}; name one that is free") from fault
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(new_secret_context(ckks))


def read_key_file(path: Path) -> bytes:
    """Return the key in a file.

    Raises:
        SecureSumFailed: If the file is missing, no regular file, another user's, or open to group or others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as fault:
        remedy = "make it with fedbd.crypto.agent.write_key_file and copy it to every client"
        raise SecureSumFailed(f"{path}: cannot read the key file: {fault.strerror}; {remedy}") from fault
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise SecureSumFailed(f"{path}: expected a regular file of user {os.geteuid()}")
        if status.st_mode & 0o077:
            mode = stat.filemode(status.st_mode)
            raise SecureSumFailed(f"{path}: others can reach the key (expected -rw-------, got {mode}); chmod 600 it")
        return file.read()


def answer(header: dict[str, Any], body: memoryview, secret: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    """Return the reply to one frame, header and body; a refusal is a reply with ``error``.

    Args:
        header: ``operation``: ``hello``, ``encrypt`` (body: int64 grid steps) or ``decrypt`` (body: a ciphertext).
        body: The frame's raw bytes.
        secret: The key, which is in no reply.
    """
    operation = header.get("operation")
    try:
        if operation == "hello":
            return {"protocol": PROTOCOL, "parameters": asdict(parameters_of(secret))}, b""
        if operation == "encrypt":
            if len(body) % 8:
                raise SecureSumFailed(f"values: expected 8 bytes each, got {len(body)} bytes")
            return {}, encrypt(np.frombuffer(body, dtype="<i8").astype(np.int64, copy=False), secret)
        if operation == "decrypt":
            total, error = decrypt(body, secret)
            return {"max_error": error}, total.astype("<i8", copy=False).view(np.uint8).data
        raise SecureSumFailed(f"operation: expected hello, encrypt or decrypt, got {str(operation)[:40]!r}")
    except SecureSumFailed as fault:
        return {"error": str(fault)}, b""
    except Exception as fault:  # its text might quote what it choked on, and that might be the key
        return {"error": f"key agent: unexpected {type(fault).__name__} during {operation}"}, b""


def peer_uid(connection: socket.socket) -> int | None:
    """Return the user id of the process at the other end; None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def converse(connection: socket.socket, secret: bytes, alive: Callable[[], bool]) -> None:
    """Answer one connection's frames until it closes, breaks or ``alive`` says no."""
    connection.settimeout(_SILENCE_SECONDS)
    uid = peer_uid(connection)
    # Without credentials the owner-only folder of the socket is what keeps other users out.
    if uid not in (None, os.geteuid()):
        send(connection, {"error": f"key agent: serves user {os.geteuid()} only, got {uid}"})
        return
    while _wait(connection, alive):
        try:
            frame = receive(connection)
        except SecureSumFailed as fault:
            send(connection, {"error": str(fault)})
            return
        if frame is None:
            return
        send(connection, *answer(*frame, secret))


def _wait(connection: socket.socket, alive: Callable[[], bool]) -> bool:
    """Wait for a frame as long as the agent lives."""
    while alive():
        if select.select([connection], [], [], _POLL_SECONDS)[0]:
            return True
    return False


def serve(listener: socket.socket, secret: bytes, *, watch_parent: bool) -> None:
    """Fork a process for every connection, until the parent is gone (or until a signal, if it is not watched)."""
    parent, agent = os.getppid(), os.getpid()
    children: set[int] = set()
    watched = [listener.fileno(), *([sys.stdin.fileno()] if watch_parent else [])]
    try:
        while not (watch_parent and os.getppid() != parent):
            ready = select.select(watched, [], [], _POLL_SECONDS)[0]
            if watched[1:] and watched[1] in ready:
                return
            if listener.fileno() in ready:
                connection, _ = listener.accept()
                child = os.fork()
                if child == 0:
                    listener.close()
                    _run_child(connection, secret, agent)
                connection.close()
                children.add(child)
            children = {child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0}
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def _run_child(connection: socket.socket, secret: bytes, agent: int) -> NoReturn:
    """Serve one connection in the forked process and end it, whatever happens."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # elsewhere than on Linux, ``alive`` notices within a moment
    try:
        converse(connection, secret, lambda: os.getppid() == agent)
    except OSError:
        pass  # the client went away or fell silent inside a frame
    finally:
        os._exit(0)


def harden() -> None:
    """Switch core dumps off and, on Linux, hide this process's memory from the same user's other processes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process where the system is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def listen(path: Path) -> socket.socket:
    """Return a listening socket that only its owner can reach.

    Raises:
        SecureSumFailed: If the folder is open to others or the path is too long for a socket.
    """
    if len(os.fsencode(path)) >= _SOCKET_PATH_BYTES:
        raise SecureSumFailed(f"{path}: too long for a socket; choose a folder with a path below 80 characters")
    status = path.parent.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise SecureSumFailed(f"{path.parent}: others can reach the socket's folder; chmod 700 it")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; says ``{"ready": true}`` or ``{"error": ...}`` on standard output and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedbd.crypto.agent", description="Owns a CKKS key.")
    parser.add_argument("--socket", type=Path, required=True, help="socket to make, in a folder of mode 0700")
    parser.add_argument("--parameters", default="n4096", choices=["n4096", "n8192"])
    parser.add_argument("--grid-bits", type=int, default=24, choices=range(8, 33), metavar="8..32")
    parser.add_argument("--key-file", type=Path, help="owner-only file with the key; without it, a new key in memory")
    parser.add_argument(
        "--watch-parent", action="store_true", help="end when standard input or the parent process does"
    )
    options = parser.parse_args(arguments)
    harden()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ckks = Ckks(parameters=options.parameters, grid_bits=options.grid_bits)
    try:
        secret = new_secret_context(ckks) if options.key_file is None else read_key_file(options.key_file)
        if parameters_of(secret) != ckks:
            raise SecureSumFailed(f"{options.key_file}: expected a key for {ckks}, got {parameters_of(secret)}")
        listener = listen(options.socket)
    except (SecureSumFailed, OSError) as fault:
        print(json.dumps({"error": str(fault)}), flush=True)
        return 1
    print(json.dumps({"ready": True}), flush=True)
    try:
        serve(listener, secret, watch_parent=options.watch_parent)
    finally:
        with contextlib.suppress(OSError):
            options.socket.unlink()
        if options.watch_parent:
            with contextlib.suppress(OSError):
                options.socket.parent.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
