"""The processes of one run: a SuperLink, its SuperNodes and the commands that submit the app and ask how it went."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbd.flower.command_line import free_ports, last_error, last_words, listens
from fedbd.flower.processes import ProcessGroup

Status = Literal["completed", "failed", "timeout"]

_TICK = 0.2  # seconds between two looks at the processes
_NAME = "fedbd"  # our SuperLink's in Flower's config.toml


class Ended(Exception):  # noqa: N818 - how the wait for a run is left
    """The run cannot go on, or not any longer."""

    def __init__(self, status: Status, reason: str) -> None:
        """Keep how it ended and why."""
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a run's files lie.

    Attributes:
        logs: What the processes write, one file each.
        home: Flower's own files (``FLWR_HOME``).
        start: The working directory of all processes: empty, so that nothing in it can be imported.
        ray: Ray's temporary files; a short path, for it holds sockets.
    """

    logs: Path
    home: Path
    start: Path
    ray: Path


class FlowerRun:
    """One run's processes; every wait calls ``poll``, watches the services and keeps the deadline."""

    def __init__(self, group: ProcessGroup, folders: Folders, deadline: float, poll: Callable[[], None]) -> None:
        """Keep what the waits need; ``deadline`` is in ``time.monotonic`` seconds."""
        self.group = group
        self.folders = folders
        self.deadline = deadline
        self.poll = poll
        self.services: dict[str, int] = {}

    def start_superlink(self, env: Mapping[str, str], *, simulation: bool) -> str:
        """Start a SuperLink on a port of its own, on another one where somebody was faster; return its address."""
        options = ["--disable-runtime-dependency-installation", *(["--simulation"] if simulation else [])]
        for _ in range(3):
            [port] = free_ports(1)
            where = ["--host", "127.0.0.1", "--port", str(port)]
            pid = self._start("superlink", ["flower-superlink", "--insecure", *where, *options], env)
            while not listens(pid, port) and self.group.status(pid) is None:
                self._tick()
            if self.group.status(pid) is None:
                self.services["superlink"] = pid
                entry = f'[superlink.{_NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
                (self.folders.home / "config.toml").write_text(f'[superlink]\ndefault = "{_NAME}"\n{entry}')
                return f"127.0.0.1:{port}"
        raise Ended("failed", f"the SuperLink does not start: {self._tail('superlink')}")

    def start_supernodes(self, env: Mapping[str, str], configs: Sequence[str], superlink: str) -> None:
        """Start one SuperNode per node config; they connect by themselves."""
        for partition, (config, port) in enumerate(zip(configs, free_ports(len(configs)), strict=True)):
            name = f"supernode-{partition}"
            home = self.folders.home / name
            home.mkdir(exist_ok=True)
            where = ["--superlink", superlink, "--host", "127.0.0.1", "--port", str(port)]
            argv = ["flower-supernode", "--insecure", *where, "--node-config", config]
            self.services[name] = self._start(name, argv, {**env, "FLWR_HOME": str(home)})

    def submit(self, env: Mapping[str, str], app: Path, options: Sequence[str]) -> None:
        """Submit the app and wait until the SuperLink says that its run has finished.

        Raises:
            Ended: The run did not complete.
        """
        self._command("run", ["flwr", "run", str(app), _NAME, "--stream", *options], env)
        while True:
            run = self._ask(env)
            if not run:
                raise Ended("failed", f"flwr run refuses the app: {last_words(self._log('run'))}")
            status = str(run["status"])
            if status == "finished:completed":
                return
            if status.startswith("finished:"):
                said = " ".join(filter(None, [status, str(run.get("status-details", ""))]))
                if "heartbeat" in said:
                    said += " (its process died: out of memory?)"
                raise Ended("failed", last_error(self._log("run")) or f"{said}; last: {last_words(self._log('run'))}")
            resume = time.monotonic() + 2.0
            while time.monotonic() < resume:  # the log's stream broke off, the run goes on
                self._tick()

    def _ask(self, env: Mapping[str, str]) -> dict[str, Any]:
        """Return what the SuperLink says of its only run; empty where it has none."""
        log = self.folders.logs / "list.log"
        for _ in range(3):
            log.unlink(missing_ok=True)
            self._command("list", ["flwr", "list", _NAME, "--format", "json"], env)
            text = log.read_text(encoding="utf-8", errors="replace")
            with contextlib.suppress(ValueError):
                answer = json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
                if answer.get("success"):
                    return dict(answer["runs"][0]) if answer["runs"] else {}
        raise Ended("failed", f"the SuperLink does not answer: {text.strip()}")

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        return self.group.start(argv, env=env, cwd=self.folders.start, log=self.folders.logs / f"{name}.log")

    def _command(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        pid = self._start(name, argv, env)
        while self.group.status(pid) is None:
            self._tick()

    def _tick(self) -> None:
        self.poll()
        for name, pid in self.services.items():
            if (status := self.group.status(pid)) is not None:
                raise Ended("failed", f"{name} ended with status {status}: {self._tail(name)}")
        if time.monotonic() > self.deadline:
            raise Ended("timeout", f"not finished in time; last words: {last_words(self._log('run')) or 'none'}")
        time.sleep(_TICK)

    def _tail(self, name: str) -> str:
        log = self._log(name)
        return last_error(log) or last_words(log)

    def _log(self, name: str) -> str:
        path = self.folders.logs / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
