"""The program of the supervisor that `processes.ProcessGroup` starts: run by its path, never imported by fedbd's code.

It runs in isolated mode and without site-packages, so it imports the standard library only and starts in tens of
milliseconds. It reads requests from standard input and writes replies to standard output, one JSON object per line:

- ``{"argv", "env", "cwd", "log"}`` starts a command; the reply is ``{"started": pid}`` or ``{"refused": reason}``;
- ``{"ended": pid, "status": status}`` is written whenever such a command has ended;
- ``{"end": grace}``, or the end of its parent, ends all descendants and then itself; its last words are
  ``{"left": [pid, ...]}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = 3.0  # seconds between SIGTERM and SIGKILL where the parent is gone and cannot say
LIMIT = 20.0  # seconds after SIGKILL: what is still there is stuck in the kernel
PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> Iterator[int]:
    """Yield the process ids below ``root`` (Linux; zombies count), nearest first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The second field, the name in brackets, may itself hold spaces and brackets.
                fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    queue = children.get(root, [])
    while queue:
        pid = queue.pop(0)
        yield pid
        queue += children.get(pid, [])


def _supervise(parent: int) -> None:
    """Serve requests from standard input until told to end or alone, then end all descendants and say what is left."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SystemExit(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.append(received))
    _tell({"ready": True})
    grace = _serve(parent, signals)
    left = _end_descendants(grace)
    _tell({"left": left})


def _serve(parent: int, signals: Sequence[int]) -> float:
    """Start what is asked for and report what ended, until told to end; return the grace to end with."""
    started: dict[int, subprocess.Popen[bytes]] = {}
    rest = b""
    # Asking for the parent is surer than waiting for the pipe to close: a fork of the parent keeps it open.
    while not signals and os.getppid() == parent:
        if select.select([0], [], [], 0.05)[0]:
            chunk = os.read(0, 65536)
            if not chunk:
                return GRACE
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "end" in request:
                    return float(request["end"])
                _tell(_start(request, started))
        for pid, status in _reap():
            # An adopted orphan is nobody's business; a command that was asked for is.
            if (process := started.pop(pid, None)) is not None:
                process.returncode = status  # or Popen would wait for the id again, which may be another's by then
                _tell({"ended": pid, "status": status})
    return GRACE


def _start(request: Mapping[str, Any], started: dict[int, subprocess.Popen[bytes]]) -> dict[str, Any]:
    try:
        with open(request["log"], "ab") as log:
            process = subprocess.Popen(
                request["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=request["env"],
                cwd=request["cwd"],
                start_new_session=True,
            )
    except OSError as error:
        return {"refused": str(error)}
    started[process.pid] = process
    return {"started": process.pid}


def _reap() -> list[tuple[int, int]]:
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (pair := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append((pair[0], os.waitstatus_to_exitcode(pair[1])))
    return ended


def _end_descendants(grace: float) -> list[int]:
    asked: set[int] = set()
    start = time.monotonic()
    while True:
        _reap()
        alive = list(descendants(os.getpid()))
        waited = time.monotonic() - start
        if not alive or waited > grace + LIMIT:
            return alive
        for pid in alive:
            with contextlib.suppress(OSError):
                if waited >= grace:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
                    asked.add(pid)
        time.sleep(0.02)


def _tell(message: Mapping[str, Any]) -> None:
    # Nobody may listen any more; the supervisor still has processes to end.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    _supervise(int(sys.argv[1]))
