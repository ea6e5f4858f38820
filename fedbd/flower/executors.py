"""Where the clients of a ``LocalGrid`` run: one after the other in this process, or in a pool of worker processes.

Threads are no choice: torch's global random state is shared by them, and results then depend on who comes first.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from flwr.app import Context, Message

from fedbd.errors import Problem, RunFailed, UserError
from fedbd.flower.app_loader import AppFactory, as_callable, pickled_factory
from fedbd.flower.client_call import THREADS, App, GlobalState, Outcome, run_client
from fedbd.flower.feeders import Desk, Feeder, Task
from fedbd.flower.workers import WorkerFailed
from fedbd.fork_server import ONE_THREAD


class Executor(Protocol):
    """Runs clients. A message and a context given to it are its own; nothing of them is shared with the caller.

    One that has a ``width``, the number of clients that it runs at once, is given no more messages than keep it busy.
    One with other processes tells by ``peak_memory`` what the largest of them held.

    Attributes:
        keeps_time: Whether every message has an outcome without anybody watching a clock: the executor itself ends a
            client that takes too long, or works in the caller's thread.
    """

    keeps_time: bool

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        """Take a message to be answered by the client of a context."""
        ...

    def advance(self) -> bool:
        """Do the work of one message in the caller's thread, if that is how it works; return whether it did any."""
        ...

    def drop(self, future: Future[Outcome]) -> None:
        """Give a message up: its outcome is wanted by nobody any more."""
        ...

    def close(self) -> None:
        """End everything; what still runs is killed. May be called again."""
        ...


def _check(workers: int, timeout: float | None, cuda_devices: Sequence[int | str] | None) -> None:
    problems = []
    if workers < 1:
        problems.append(Problem(path="workers", expected="must be >= 1", got=str(workers)))
    if timeout is not None and timeout <= 0:
        problems.append(Problem(path="timeout", expected="must be seconds > 0, or None", got=str(timeout)))
    if cuda_devices is not None and not cuda_devices:
        problems.append(Problem(path="cuda_devices", expected="must name a GPU, or be None", got="[]"))
    if problems:
        raise UserError(problems)


class SerialExecutor:
    """Runs clients in this process, one after the other, when their replies are asked for.

    Clients have a global random state of their own (it starts as a copy of this process's) and one CPU thread, so what
    they draw or seed does not change what the server draws: that is the same as with workers.

    Args:
        app_factory: Gives the ClientApp, once.
    """

    keeps_time = True
    width = 1

    def __init__(self, app_factory: AppFactory) -> None:
        """Load the app."""
        self._app: App = as_callable(app_factory)()
        self._tasks: deque[tuple[Message, Context, Future[Outcome]]] = deque()
        self._clients = replace(GlobalState.now(), threads=THREADS)

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        """Queue a message; see ``advance``."""
        future: Future[Outcome] = Future()
        self._tasks.append((message, context, future))
        return future

    def advance(self) -> bool:
        """Run the client whose message has waited longest; return whether there was one."""
        while self._tasks:
            message, context, future = self._tasks.popleft()
            if future.set_running_or_notify_cancel():
                server = GlobalState.now()
                self._clients.set()
                try:
                    outcome = run_client(self._app, message, context)
                finally:
                    self._clients = replace(GlobalState.now(), threads=THREADS)
                    server.set()
                future.set_result(outcome)
                return True
        return False

    def drop(self, future: Future[Outcome]) -> None:
        """Give a message up; see ``Executor``."""
        future.cancel()

    def close(self) -> None:
        """Forget what is queued."""
        for _, _, future in self._tasks:
            future.cancel()
        self._tasks.clear()

    def __enter__(self) -> Self:
        """Return itself; ``close`` is called at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class ProcessPoolExecutor:
    """Runs clients in worker processes of this machine; big arrays reach them through shared memory.

    Workers load the app by themselves and run one client at a time, with one CPU thread. One that dies or takes too
    long is replaced and costs only the message it was at. Workers end with the driver, however that ends.

    Args:
        app_factory: Gives the ClientApp, once per worker.
        workers: How many processes.
        timeout: Seconds that a client may take for a message; None: as long as it likes.
        start_timeout: Seconds that a worker may take to start and load the app.
        worker_env: Environment variables for the workers, over this process's own.
        cuda_devices: GPUs as CUDA_VISIBLE_DEVICES names them; worker k sees only ``cuda_devices[k % len(...)]``. None:
            what this process sees.

    Raises:
        UserError: If an argument is out of range or the app factory cannot be sent to another process.
        RunFailed: If a worker cannot load the app.
    """

    def __init__(
        self,
        app_factory: AppFactory,
        workers: int,
        *,
        timeout: float | None = None,
        start_timeout: float = 300.0,
        worker_env: Mapping[str, str] | None = None,
        cuda_devices: Sequence[int | str] | None = None,
    ) -> None:
        """Start the workers and wait until all of them have loaded the app."""
        _check(workers, timeout, cuda_devices)
        self.keeps_time = timeout is not None
        self._desk = Desk(pickled_factory(app_factory), timeout, start_timeout)
        self.width = workers
        self._pending = 0
        self._pending_lock = threading.Lock()
        self._feeders: list[Feeder] = []
        environment = {**os.environ, **ONE_THREAD, **(worker_env or {})}
        gpus = [{"CUDA_VISIBLE_DEVICES": str(device)} for device in cuda_devices or ()] or [{}]
        # At its end the interpreter waits for processes that are no daemons; the hook ends them before.
        atexit.register(self.close)
        try:
            for k in range(workers):
                self._feeders.append(Feeder(self._desk, environment | gpus[k % len(gpus)]))
            for feeder in self._feeders:
                feeder.started.result()
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerFailed):
                raise RunFailed(str(error)) from None
            raise

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        """Queue a message for the next free worker."""
        if self._desk.closed.is_set():
            raise RuntimeError("the executor was closed")
        future: Future[Outcome] = Future()
        with self._pending_lock:
            self._pending += 1
        future.add_done_callback(self._count_down)
        self._desk.tasks.put(Task(message, context, future))
        return future

    def advance(self) -> bool:
        """Return False: the workers need no help."""
        return False

    def drop(self, future: Future[Outcome]) -> None:
        """Give a message up; a worker that is at it is killed, for it may never end."""
        if not future.cancel():
            for feeder in self._feeders:
                feeder.kill(future)

    def peak_memory(self) -> int:
        """Return the most memory that one of the present workers held, in bytes; 0 where the system does not tell."""
        return max(feeder.peak_memory() for feeder in self._feeders)

    def close(self) -> None:
        """End all workers; what still runs is killed."""
        if self._desk.closed.is_set():
            return
        self._desk.closed.set()
        while not self._desk.tasks.empty():
            task = self._desk.tasks.get()
            if task is not None:
                task.future.cancel()
        for feeder in self._feeders:
            self._desk.tasks.put(None)
            feeder.kill()
        for feeder in self._feeders:
            feeder.thread.join()
        self._desk.outbox.clear()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        """Return itself; ``close`` is called at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _count_down(self, _: Future[Outcome]) -> None:
        with self._pending_lock:
            self._pending -= 1
            if self._pending == 0:  # the batch is over: nothing refers to what it shared
                self._desk.outbox.clear()
