"""A client's end of the key agent: starting one, and asking it to encrypt and decrypt. Loads no cryptography.

The key lives in the agent's process (``fedbd.crypto.agent``). What stands in a client's state, in a message or in a
checkpoint is only the handle, a string such as ``unix:/tmp/fedbd-k3j9/agent.sock``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

import fedbd
from fedbd.crypto.agent_frames import PROTOCOL, receive, send
from fedbd.errors import SecureSumFailed

if TYPE_CHECKING:
    from fedbd.crypto.ckks import Ckks

SCHEME = "unix:"
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0
_REMEDY = "start the run again (resume continues with a fresh key)"


def _exchange(
    connection: socket.socket, operation: str, body: bytes | memoryview = b""
) -> tuple[dict[str, Any], memoryview]:
    """Send one question and return the answer."""
    with contextlib.suppress(BrokenPipeError):  # the agent may have said why before it closed
        send(connection, {"operation": operation}, body)
    answer = receive(connection)
    if answer is None:
        raise ConnectionResetError("the agent closed the connection")
    return answer


class KeyAgent:
    """Asks a key agent; connects on first use and again after a failure. One thread at a time.

    It holds the handle and no key, and travels (pickle, fork) without its connection.
    """

    def __init__(self, handle: str, expected: Ckks | None = None, timeout: float = 120.0) -> None:
        """Keep where the agent is; nothing is opened yet.

        Args:
            handle: ``AgentProcess.handle``.
            expected: The scenario's parameters, checked against the agent's; None takes the agent's word.
            timeout: Seconds without an answer after which the agent counts as dead.

        Raises:
            SecureSumFailed: If the handle is of another form.
        """
        if not handle.startswith(SCHEME):
            raise SecureSumFailed(f"key agent: expected a handle {SCHEME}PATH, got {handle!r}")
        self.handle = handle
        self.expected = expected
        self.timeout = timeout
        self._connection: socket.socket | None = None
        self._owner = 0

    def __reduce__(self) -> tuple[type[Self], tuple[str, Ckks | None, float]]:
        """Travel as the handle."""
        return type(self), (self.handle, self.expected, self.timeout)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def encrypt(self, values: NDArray[np.int64]) -> bytes:
        """Return the ciphertext of one client's values.

        Args:
            values: (D,) int64 in grid steps.

        Raises:
            SecureSumFailed: If the agent refuses or does not answer.
        """
        steps = np.asarray(values)
        if steps.ndim != 1 or steps.dtype != np.int64:
            raise SecureSumFailed(f"values: expected (D,) int64, got {steps.shape} {steps.dtype}")
        raw = np.ascontiguousarray(steps, dtype="<i8").view(np.uint8).data
        return bytes(self._ask("encrypt", raw)[1])

    def decrypt(self, blob: bytes | bytearray | memoryview) -> tuple[NDArray[np.int64], float]:
        """Return a sum, (D,) int64 in grid steps, and its largest distance from the grid (see ``ckks.decrypt``).

        Raises:
            SecureSumFailed: If the agent refuses or does not answer.
        """
        header, body = self._ask("decrypt", memoryview(blob).cast("B"))
        error = header.get("max_error")
        if not isinstance(error, float) or len(body) % 8:
            raise SecureSumFailed(f"key agent at {self.handle}: its reply is no decryption; use one release everywhere")
        return np.frombuffer(body, dtype="<i8").astype(np.int64, copy=False), error

    def hello(self) -> dict[str, Any]:
        """Return the agent's protocol version and parameters.

        Raises:
            SecureSumFailed: If the agent does not answer.
        """
        return self._ask("hello")[0]

    def close(self) -> None:
        """Close the connection; the next question opens a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _ask(self, operation: str, body: bytes | memoryview = b"") -> tuple[dict[str, Any], memoryview]:
        """Send one question and return the answer; its refusals are raised."""
        try:
            answer = _exchange(self._connect(), operation, body)
        except SecureSumFailed:
            self.close()
            raise
        except OSError as fault:
            self.close()
            raise SecureSumFailed(f"key agent at {self.handle}: {fault}; {_REMEDY}") from fault
        if "error" in answer[0]:
            raise SecureSumFailed(str(answer[0]["error"]))
        return answer

    def _connect(self) -> socket.socket:
        """Return the open connection, after a hello on a fresh one."""
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        # A connection inherited by fork is the parent's: two processes would mix their frames on it.
        self.close()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        self._connection, self._owner = connection, os.getpid()
        connection.connect(self.handle.removeprefix(SCHEME))
        self._check(_exchange(connection, "hello")[0])
        return connection

    def _check(self, hello: dict[str, Any]) -> None:
        """Refuse an agent of another protocol or of other parameters."""
        if "error" in hello:
            raise SecureSumFailed(str(hello["error"]))
        if hello.get("protocol") != PROTOCOL:
            got = hello.get("protocol")
            raise SecureSumFailed(f"key agent: expected protocol {PROTOCOL}, got {got}; use one release everywhere")
        if self.expected is not None and hello.get("parameters") != asdict(self.expected):
            wanted, got = asdict(self.expected), hello.get("parameters")
            raise SecureSumFailed(f"key agent: expected parameters {wanted}, got {got}; start one with the scenario's")


class AgentProcess:
    """A running key agent; it ends with ``stop``, with the ``with`` block or when this process dies."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        """Keep the process and the folder of its socket."""
        self._process = process
        self._folder = folder

    @property
    def handle(self) -> str:
        """What ``KeyAgent`` takes."""
        return f"{SCHEME}{self._folder / 'agent.sock'}"

    @property
    def pid(self) -> int:
        """The agent's process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the agent."""
        self.stop()

    def stop(self) -> None:
        """End the agent and with it its key; safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()  # the agent ends when its standard input does
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def start_agent(ckks: Ckks, *, key_file: Path | None = None, directory: Path | None = None) -> AgentProcess:
    """Start a key agent in a process of its own.

    Args:
        ckks: The parameters.
        key_file: The key to use (``agent.write_key_file``); None makes one that exists in the agent's memory only.
        directory: Where the owner-only folder of the socket is made; None is the system's folder for temporary files.

    Raises:
        SecureSumFailed: If the agent does not come up, with its reason.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="fedbd-", dir=directory)).absolute()
    except OSError as fault:
        raise SecureSumFailed(f"{fault.filename}: cannot make the key agent's folder: {fault.strerror}") from fault
    # -P and our own root: the agent must not import what happens to lie in the working directory.
    command = [sys.executable, "-P", "-m", "fedbd.crypto.agent", "--socket", str(folder / "agent.sock")]
    command += ["--parameters", ckks.parameters, "--grid-bits", str(ckks.grid_bits), "--watch-parent"]
    command += [] if key_file is None else ["--key-file", str(Path(key_file).absolute())]
    root = str(Path(fedbd.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Threads of a BLAS would not survive the fork that each connection gets.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    agent = AgentProcess(process, folder)
    problem = _await_ready(process)
    if problem is not None:
        agent.stop()
        raise SecureSumFailed(f"key agent: {problem}")
    return agent


def _await_ready(process: subprocess.Popen[bytes]) -> str | None:
    """Return None once the agent says that it listens, else what went wrong."""
    if process.stdout is None or not select.select([process.stdout], [], [], _START_SECONDS)[0]:
        return f"did not start within {_START_SECONDS:.0f} s; see whether `{sys.executable} -c 'import tenseal'` hangs"
    line = process.stdout.readline()
    if not line:
        return f"ended at its start with status {process.wait()}; its standard error says why"
    try:
        word: dict[str, Any] = json.loads(line)
    except ValueError:
        return f"said {line[:80]!r} instead of being ready; see what prints when Python starts"
    return None if word.get("ready") else str(word.get("error"))
