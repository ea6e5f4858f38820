"""The process that other processes are forked from: it imports torch and Flower once for all of them.

``fedbd run`` starts it before anything else, so that it loads while the scenarios are read, and takes the processes of
its runs from it; their workers come from the same one (``join``). Elsewhere it begins with the first worker. It imports
nothing that is slow itself.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask for an end. The fork server and what it forks have them held back, see ``let_in``."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""One CPU thread: what torch's and NumPy's libraries read once, when they are loaded."""

# torch imports its compiler with the first optimizer that is made, compiled or not, which would cost each worker two
# seconds. A name that is not there is passed over.
PRELOAD = ["torch", "torch._dynamo", "flwr.app", "flwr.clientapp"]
# glibc gives big blocks back to the system at once, which then clears each page of the next one: with that, copying a
# model of 11 M weights in and out of a message took 50 ms of CPU in place of 20, and a training step a tenth more.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
_ROOT = Path(__file__).resolve().parent.parent
_starting = threading.Lock()


def begin(modules: Sequence[str]) -> None:
    """Start the fork server now, without waiting for it, if there is none.

    Args:
        modules: What it imports beyond torch and Flower, modules of fedbd among them.
    """
    context = server_context()
    if isinstance(context, SpawnContext):
        return
    if _finds_this_fedbd():
        context.set_forkserver_preload([*PRELOAD, *modules])
    with _starting, _conditions(hide_main=True):
        forkserver.ensure_running()
    atexit.register(_end)


def _end() -> None:
    """End the server at once, with the command that began it: one that still loads would keep its output open."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)


def server_context() -> ForkServerContext | SpawnContext:
    """Return what starts processes from the fork server, or, where a system has none, from nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Nothing of fedbd: the fork server does not have the driver's sys.path and might find another copy.
    context.set_forkserver_preload(PRELOAD)
    return context


def start(process: ForkServerProcess | SpawnProcess, *, hide_main: bool) -> None:
    """Start a process of ``server_context``; ``hide_main``: it must not run the driver's script again."""
    with _starting, _conditions(hide_main=hide_main):
        process.start()


def take(environment: Mapping[str, str]) -> None:
    """Give a process its driver's environment variables: the fork server's own are of the moment when it began."""
    os.environ.clear()
    os.environ.update(environment)


def join() -> None:
    """Let a process that was forked by the fork server take its own processes from it, too.

    multiprocessing hands the server's address down for that, but 3.11 then starts another one all the same: it takes
    a server that it did not start itself for none.
    """
    server: Any = forkserver._forkserver
    if server.get_inherited_fds() is None:
        return
    parent, ensure_running = os.getppid(), server.ensure_running

    def ensure() -> None:
        if os.getppid() != parent:  # it was killed: from now on one of our own
            server.ensure_running = ensure_running
            ensure_running()

    server.ensure_running = ensure


def let_in() -> None:
    """Let the signals through, in a process that was started with them held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _finds_this_fedbd() -> bool:
    """Tell whether an interpreter that does not look into the current folder finds the fedbd that runs here."""
    places = (Path(place).resolve() for place in sys.path[0 if sys.flags.safe_path else 1 :])
    return next((place for place in places if (place / "fedbd" / "__init__.py").is_file()), None) == _ROOT


@contextlib.contextmanager
def _conditions(*, hide_main: bool) -> Iterator[None]:
    """What must hold in a driver while it starts a process or, the first time, the fork server.

    The fork server imports torch, whose libraries read their number of threads once, then. It runs in the current
    folder, where a user's ``random.py`` would shadow the standard library's. ``__main__`` is hidden because
    multiprocessing would run the driver's script again in each process: slow, and a script without a guard would start
    processes in turn. Signals are held back until a process can heed them; the server never gets them, for it has to
    report how its processes ended.
    """
    # The third: should anything imported there ask torch for GPUs, its forks can still use them.
    conditions = {**ONE_THREAD, "PYTHONSAFEPATH": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    conditions |= {name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()}
    before = {name: os.environ.get(name) for name in conditions}
    main = sys.modules["__main__"]
    resource_tracker.ensure_running()  # started beside the first process, it would let the signals through again
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
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
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
