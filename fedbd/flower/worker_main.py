"""Where a worker process begins: what must hold before torch, NumPy and the app are loaded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait

from fedbd.fork_server import let_in, take


def serve(pipe: Connection, factory: bytes, environment: Mapping[str, str]) -> None:
    """Run as a worker process until the driver closes the pipe or is gone.

    Args:
        pipe: The worker's end of the pipe to the driver.
        factory: Pickle of a callable without arguments that returns the app.
        environment: All environment variables.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the driver decides
    let_in()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    take(environment)
    from fedbd.flower.worker_loop import answer_all  # noqa: PLC0415 - it loads torch, which reads the environment

    answer_all(pipe, factory)


def _leave_with_parent() -> None:
    """End the process when the driver is gone, even amid a message: nobody waits for the reply."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
