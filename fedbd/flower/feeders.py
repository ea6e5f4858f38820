"""Keeps worker processes busy: one thread for each hands it message after message and replaces it when it fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from flwr.app import Context, Message

from fedbd.flower.client_call import Outcome, failure, reason_of
from fedbd.flower.compat import ErrorCode
from fedbd.flower.shared_bytes import Outbox
from fedbd.flower.workers import WorkerFailed, WorkerProcess


@dataclass(frozen=True)
class Task:
    """A message for a worker, and where its outcome goes."""

    message: Message
    context: Context
    future: Future[Outcome]


@dataclass(frozen=True)
class Desk:
    """What the feeders of a pool share.

    Attributes:
        factory: Pickle of a callable without arguments that returns the app.
        timeout: Seconds that a client may take for a message, or None.
        start_timeout: Seconds that a worker may take to start and load the app.
        tasks: What is to be done; None tells a feeder to leave.
        outbox: Big byte strings on their way to workers.
        closed: Set once the pool closes: no worker is started any more.
    """

    factory: bytes
    timeout: float | None
    start_timeout: float
    tasks: queue.SimpleQueue[Task | None] = field(default_factory=queue.SimpleQueue)
    outbox: Outbox = field(default_factory=Outbox)
    closed: threading.Event = field(default_factory=threading.Event)


class Feeder:
    """A thread that gives task after task to its worker process, and replaces the worker when it fails."""

    def __init__(self, desk: Desk, environment: Mapping[str, str]) -> None:
        """Start the thread, which starts its worker at once; ``started`` tells when, or why not."""
        self._desk = desk
        self._environment = environment
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._current: Future[Outcome] | None = None
        self._given_up = False
        self.started: Future[None] = Future()
        # A daemon: the interpreter waits for other threads before it calls the hook that closes the pool.
        self.thread = threading.Thread(target=self._feed, daemon=True, name="fedbd-feeder")
        self.thread.start()

    def kill(self, future: Future[Outcome] | None = None) -> None:
        """Kill the worker if it is at that task; without one, if it does anything but wait for the next."""
        with self._lock:
            busy = self._current is not None or not self.started.done()
            if busy and future in (None, self._current):
                self._given_up = True  # seen by a worker's start, should there be none at this moment
                if self._worker is not None:
                    self._worker.kill()

    def peak_memory(self) -> int:
        """Return the most memory that the present worker held, in bytes; 0 where there is none."""
        with self._lock:
            return self._worker.peak_memory() if self._worker is not None else 0

    def _feed(self) -> None:
        try:
            self._ready_worker()
            self.started.set_result(None)
        except Exception as error:
            self._discard()
            self.started.set_exception(error)
        while (task := self._desk.tasks.get()) is not None:
            with self._lock:  # from here on the task cannot be cancelled, but ``kill`` finds it
                if not task.future.set_running_or_notify_cancel():
                    continue
                self._current, self._given_up = task.future, False
            outcome = self._run(task)
            with self._lock:
                self._current, killed = None, self._given_up
            if killed:  # perhaps only after it had answered: the next message must not meet it
                self._discard()
            task.future.set_result(outcome)
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _run(self, task: Task) -> Outcome:
        try:
            return self._ready_worker().call(task.message, task.context, self._desk.outbox, self._desk.timeout)
        except WorkerFailed as error:
            self._discard()
            return failure(task.message, error.code, str(error))
        except Exception as error:  # no memory for a shared file, say: where the worker stands is then unknown
            self._discard()
            return failure(task.message, ErrorCode.CLIENT_APP_CRASHED, reason_of(error))

    def _ready_worker(self) -> WorkerProcess:
        if self._worker is not None and not self._worker.is_alive():  # it died idle: no message has to suffer for it
            self._discard()
        with self._lock:
            if self._desk.closed.is_set() or self._given_up:
                raise WorkerFailed(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the message was given up")
            if self._worker is not None:
                return self._worker
            self._worker = worker = WorkerProcess(self._desk.factory, self._environment)
        worker.wait_ready(self._desk.start_timeout)
        return worker

    def _discard(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.discard()
