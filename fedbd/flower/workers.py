"""A worker process as the driver sees it: started, asked, watched, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.reduction import recv_handle, send_handle
from types import ModuleType
from typing import Any

from flwr.app import Context, Message

from fedbd.flower.client_call import THREADS, Outcome
from fedbd.flower.compat import ErrorCode
from fedbd.flower.shared_bytes import REPLY_FILE, Outbox, Place, load, read_at
from fedbd.flower.worker_main import serve

ONE_THREAD = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
"""The same as environment variables, which torch's and NumPy's libraries read once, when they are loaded."""

# The fork server imports these once for all workers. torch imports its compiler with the first optimizer that is made,
# compiled or not, which would cost each worker two seconds. A name that is not there is passed over. Nothing of fedbd:
# the fork server does not have the driver's sys.path and might find another copy.
_PRELOAD = ["torch", "torch._dynamo", "flwr.app", "flwr.clientapp"]
# glibc gives big blocks back to the system at once, which then clears each page of the next one: with that, copying a
# model of 11 M weights in and out of a message took 50 ms of CPU in place of 20, and a training step a tenth more.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}

_LEAVE_SECONDS = 5.0
_starting = threading.Lock()


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
        context = _process_context()
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may have no children, and an app's DataLoader may want some.
        self._process = context.Process(target=serve, args=(theirs, factory, dict(environment)), name="fedbd-worker")
        # Only a factory that was defined in the driver's script needs that script to be run again in the worker.
        with _starting, _start_conditions(hide_main=b"__main__" not in factory):
            self._process.start()
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


def _process_context() -> ForkServerContext | SpawnContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the worker process died (exit code {'unknown' if exit_code is None else exit_code})"
    hint = "; out of memory?" if exit_code == -signal.SIGKILL else ""
    return f"the worker process died (signal {signal.Signals(-exit_code).name}{hint})"


@contextlib.contextmanager
def _start_conditions(*, hide_main: bool) -> Iterator[None]:
    """What must hold in the driver while it starts a worker or, the first time, the fork server.

    The fork server imports torch, whose libraries read their number of threads once, then. It runs in the current
    folder, where a user's ``random.py`` would shadow the standard library's. ``__main__`` is hidden because
    multiprocessing would run the driver's script again in each worker: slow, and a script without a guard would start
    workers in turn.
    """
    # The third: should anything imported there ask torch for GPUs, its forks can still use them.
    conditions = {**ONE_THREAD, "PYTHONSAFEPATH": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    conditions |= {name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()}
    before = {name: os.environ.get(name) for name in conditions}
    main = sys.modules["__main__"]
    os.environ.update(conditions)
    if hide_main:
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
