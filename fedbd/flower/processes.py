"""Child processes that never outlive their use, however deep they fork and however they detach.

Flower and Ray start daemons that start daemons: a SuperLink starts a SuperExec in a session of its own, that starts a
simulation, that starts a raylet and its workers. Killing a process group misses them, and ``ray stop`` would kill every
Ray on the host. So a `ProcessGroup` runs all commands below one small supervisor process, which the Linux kernel lets
adopt every orphan among its descendants (``PR_SET_CHILD_SUBREAPER``): the tree below it is always complete, and ending
the group is ending that tree. The supervisor notices when its parent is gone, so the tree also ends where the parent is
killed outright.

The supervisor's program is ``supervisor.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbd.flower.supervisor import LIMIT

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL when a group ends."""


class ProcessError(OSError):
    """A command could not be started, or the supervisor is gone."""


class ProcessGroup:
    """Commands that run below one supervisor and end with it, together with all that they started.

    Use it as a context manager. Linux only: elsewhere the constructor refuses.

    Raises:
        ProcessError: The platform has no subreaper, or the supervisor did not start.
    """

    def __init__(self) -> None:
        """Start the supervisor."""
        if not sys.platform.startswith("linux"):
            raise ProcessError(f"processes can be held together on Linux only, not on {sys.platform}")
        command = [
            sys.executable,
            "-I",
            "-S",
            str(Path(__file__).resolve().with_name("supervisor.py")),
            str(os.getpid()),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", start_new_session=True
        )
        self._ended: dict[int, int] = {}
        self._replies: list[dict[str, Any]] = []
        self._rest = b""
        self._left: tuple[int, ...] | None = None
        if self._reply(10.0) is None:
            self._process.kill()
            raise ProcessError("the process supervisor did not start")

    def __enter__(self) -> ProcessGroup:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End every process, see `close`."""
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the supervisor, the root of the tree."""
        return self._process.pid

    def start(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> int:
        """Start one command in a session of its own, its input empty and its output appended to a file.

        Args:
            argv: Program (an absolute path, or a name looked up in ``env["PATH"]``) and arguments.
            env: The whole environment of the command.
            cwd: Its working directory.
            log: File for its standard output and standard error.

        Returns:
            Its process id.

        Raises:
            ProcessError: It could not be started.
        """
        program = shutil.which(argv[0], path=env.get("PATH"))
        if program is None:
            raise ProcessError(f"{argv[0]}: no such program in PATH={env.get('PATH', '')}")
        self._send({"argv": [program, *argv[1:]], "env": dict(env), "cwd": str(cwd), "log": str(log)})
        reply = self._reply(30.0)
        if reply is None:
            raise ProcessError("the process supervisor is gone")
        if "refused" in reply:
            raise ProcessError(f"{argv[0]}: {reply['refused']}")
        return int(reply["started"])

    def status(self, pid: int) -> int | None:
        """Return the exit status of a started command (minus the signal's number), or None while it runs."""
        self._read(0.0)
        return self._ended.get(pid)

    def close(self, grace: float = GRACE) -> tuple[int, ...]:
        """End every process of the tree: SIGTERM, and after ``grace`` seconds SIGKILL. May be called again.

        Returns:
            Process ids that even SIGKILL did not end within 20 s, normally none.
        """
        if self._left is None:
            with contextlib.suppress(ProcessError):
                self._send({"end": grace})
            last = self._reply(grace + LIMIT + 5.0)
            self._left = tuple(last["left"]) if last is not None else ()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process.wait()
        return self._left

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ProcessError("the process supervisor is gone") from error

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        """Wait for the next reply; None when there is none in time or ever."""
        deadline = time.monotonic() + seconds
        while not self._replies:
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                return None
        return self._replies.pop(0)

    def _read(self, seconds: float) -> bool:
        """Take in what the supervisor wrote, waiting at most so long; False when it is gone or silent."""
        assert self._process.stdout is not None
        if self._process.stdout.closed or not select.select([self._process.stdout], [], [], seconds)[0]:
            return False
        chunk = os.read(self._process.stdout.fileno(), 65536)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ended" in message:
                self._ended[message["ended"]] = message["status"]
            else:
                self._replies.append(message)
        return bool(chunk)
