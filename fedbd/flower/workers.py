"""A worker process as the driver sees it: started, asked, watched, ended."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from flwr.app import Context, Message

from fedbd import fork_server
from fedbd.flower.client_call import Outcome
from fedbd.flower.compat import ErrorCode
from fedbd.flower.shared_bytes import REPLY_FILE, Outbox, Place, load, read_at
from fedbd.flower.worker_main import serve
from fedbd.records.environment import peak_memory

_LEAVE_SECONDS = 5.0


class WorkerFailed(Exception):  # noqa: N818 - it never leaves the engine
    """A worker that gave no reply: it died, was too slow or could not start."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        """Keep Flower's number beside the reason."""
        super().__init__(reason)
        self.code = code


class WorkerProcess:
    """The driver's handle of one worker process; used by one thread, but ``kill`` is for any."""

    def __init__(self, factory: bytes, environment: Mapping[str, str]) -> None:
        """Start the process, without waiting until it is ready.

        Args:
            factory: Pickle of a callable without arguments that returns the app.
            environment: All environment variables of the worker.
        """
        context = fork_server.server_context()
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may have no children, and an app's DataLoader may want some.
        self._process = context.Process(target=serve, args=(theirs, factory, dict(environment)), name="fedbd-worker")
        # Only a factory that was defined in the driver's script needs that script to be run again in the worker.
        fork_server.start(self._process, hide_main=b"__main__" not in factory)
        theirs.close()
        self._seen: set[int] = set()
        self._reply_file: int | None = None

    def wait_ready(self, timeout: float) -> None:
        """Wait until the app is loaded.

        Raises:
            WorkerFailed: If it cannot be, with the reason, or is not within ``timeout`` seconds.
        """
        try:
            trouble = self._receive(timeout)
        except WorkerFailed as error:
            trouble = str(error)
        if trouble is not None:
            reason = f"a worker process could not load the ClientApp: {trouble}"
            raise WorkerFailed(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, reason)

    def call(self, message: Message, context: Context, outbox: Outbox, timeout: float | None) -> Outcome:
        """Let the worker answer a message.

        Raises:
            WorkerFailed: If the worker dies or ``timeout`` seconds pass; it is then of no more use.
        """
        parcel = outbox.pack((message, context), self._seen)
        try:
            with contextlib.suppress(OSError):  # it has died: found, with its exit code, when the reply is awaited
                self._pipe.send((parcel.data, list(parcel.files), parcel.keep))
                for file in parcel.files.values():
                    send_handle(self._pipe, file, 0)
        finally:
            for file in parcel.files.values():
                os.close(file)
        self._seen = (self._seen & parcel.keep) | set(parcel.files)
        data, has_file = self._receive(timeout)
        if has_file:
            self._reply_file = recv_handle(self._pipe)

        def fetch(place: Place) -> bytes:
            number, offset, size = place
            if number == REPLY_FILE and self._reply_file is not None:
                return read_at(self._reply_file, size, offset)
            return parcel.strings[place]

        reply, state = load(data, fetch)
        return Outcome(reply, state)

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.is_alive()

    def peak_memory(self) -> int:
        """Return the most memory that the process held, in bytes; 0 where the system does not tell."""
        return peak_memory(self._process.pid)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def discard(self) -> None:
        """Kill the process if it still runs, and free what belongs to it."""
        self._process.kill()
        self._process.join(_LEAVE_SECONDS)
        with contextlib.suppress(ValueError):  # it is stuck in the kernel: not even SIGKILL has ended it yet
            self._process.close()
        self._pipe.close()
        if self._reply_file is not None:
            os.close(self._reply_file)
            self._reply_file = None

    def stop(self) -> None:
        """Let an idle process leave by itself (it sees the end of its pipe), then free what belongs to it."""
        self._pipe.close()
        self._process.join(_LEAVE_SECONDS)
        self.discard()

    def _receive(self, timeout: float | None) -> Any:
        # The process is watched beside the pipe: a child of a killed worker can hold the pipe's other end open.
        ready = wait([self._pipe, self._process.sentinel], timeout)
        if not ready:
            raise WorkerFailed(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"timed out after {timeout:g} s")
        try:
            if self._pipe in ready or self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, OSError):
            pass
        self._process.join(_LEAVE_SECONDS)
        raise WorkerFailed(ErrorCode.CLIENT_APP_CRASHED, _how_it_died(self._process.exitcode))


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the worker process died (exit code {'unknown' if exit_code is None else exit_code})"
    hint = "; out of memory?" if exit_code == -signal.SIGKILL else ""
    return f"the worker process died (signal {signal.Signals(-exit_code).name}{hint})"
