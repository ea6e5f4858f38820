"""Run a Flower app under Flower's own runtimes: the simulation runtime (Ray) or a SuperLink with SuperNodes.

One mechanism serves both: a SuperLink of our own is started, for ``deployment`` also one SuperNode per client, and the
app is submitted with ``flwr run``. What makes a bare ``flwr run`` unsafe is taken care of:

- it attaches to whatever SuperLink listens on a fixed port: here each run has its own SuperLink, its own ``FLWR_HOME``
  and a port on which that very process is seen to listen;
- the SuperLink installs the app's dependencies into a new environment (and so, say, another torch): switched off;
- modules in the folder that it was started in shadow the app's: it starts in an empty folder;
- it exits 0 when the run failed: the verdict is the status that the SuperLink gives the run;
- its daemons and Ray's live on: all are ended before `run_app` returns or raises, see `processes` (so Linux only).

Nothing is imported from flwr or ray.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbd.flower.command_line import Scalar, base_environment, inline_config, toml_config
from fedbd.flower.processes import ProcessGroup
from fedbd.flower.superlink import Ended, FlowerRun, Folders, Status

_Environment = dict[str, str]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        status: ``completed``, ``failed``, or ``timeout`` where it was ended for taking too long.
        reason: Why it did not complete, from the server app's log and the SuperLink; empty where it did.
        logs: Folder with all that was written: ``run.log`` (the server app's; in ray mode the clients' too),
            ``superlink.log``, ``supernode-P.log`` (with the client app's) and ``ray/``.
        seconds: Wall clock of ``start`` (the SuperLink), ``run`` (from submission on) and ``end`` (of the processes).
    """

    status: Status
    reason: str
    logs: Path
    seconds: Mapping[str, float]


def run_app(
    app_dir: Path,
    *,
    mode: Literal["ray", "deployment"],
    clients: int,
    run_config: Mapping[str, Scalar],
    work_dir: Path,
    node_config: Callable[[int], Mapping[str, str | int]] | None = None,
    server_env: Mapping[str, str] | None = None,
    client_env: Mapping[str, str] | None = None,
    client_cpus: int = 1,
    client_gpus: float = 0.0,
    workers: int | None = None,
    ray_address: str | None = None,
    timeout: float = math.inf,
    poll: Callable[[], None] | None = None,
) -> RunOutcome:
    """Run a Flower app to its end and leave no process behind.

    Args:
        app_dir: The app: a folder whose ``pyproject.toml`` has ``[tool.flwr.app]``.
        mode: ``ray`` for Flower's simulation runtime, ``deployment`` for a SuperLink and SuperNodes on this machine.
        clients: Number of clients, at least 1. Client p's node config holds ``partition-id`` p and ``num-partitions``.
        run_config: Values for keys of the app's ``[tool.flwr.app.config]``; any string survives.
        work_dir: Folder for the logs and Flower's own files; made where absent.
        node_config: Gives more entries of client p's node config; ``deployment`` only.
        server_env: Environment variables for the SuperLink and the server app.
        client_env: Environment variables for the SuperNodes and the client app. In ``deployment`` neither side sees the
            other's, even where the caller's environment has them. In ``ray`` all is one process tree and sees both; but
            the clients on a cluster (``ray_address``) have the environment that the cluster was started with.
        client_cpus: CPUs that Ray reserves for a client, at least 1 (Flower takes whole numbers).
        client_gpus: GPUs, or the share of one, that Ray reserves for a client.
        workers: Clients that Ray runs at once, GPUs permitting; None for as many as there are CPUs, up to ``clients``.
            Without meaning under ``ray_address``, where the cluster's size decides.
        ray_address: ``HOST:PORT`` of a running Ray cluster to use; None starts a Ray of this run's own. RAY_ADDRESS in
            the caller's environment is not heeded.
        timeout: Seconds after which the run is ended.
        poll: Called about five times a second; what it raises ends the run and is passed on.

    Returns:
        The outcome; a run that fails is reported there, not raised.

    Raises:
        ValueError: An argument makes no sense; a key of ``run_config`` is not the app's.
        KeyError: ``app_dir`` is not a Flower app.
        OSError: Folders or processes could not be made (`processes.ProcessError`: not on Linux).
    """
    if clients < 1 or client_cpus < 1 or client_gpus < 0 or (workers is not None and workers < 1):
        raise ValueError("clients, client_cpus and workers are at least 1, client_gpus at least 0")
    if mode == "ray" and node_config is not None:
        raise ValueError("node_config: Flower's simulation runtime gives nodes partition-id and num-partitions only")
    if unknown := set(run_config) - set(_app_config(app_dir)):
        raise ValueError(f"run_config: the app has no {', '.join(sorted(unknown))} in [tool.flwr.app.config]")
    nodes: list[str] = []
    options: list[str] = []
    if mode == "ray":
        options = ["--federation-config", _federation(clients, client_cpus, client_gpus, workers, own=not ray_address)]
    else:
        extra = node_config or (lambda partition: {})
        nodes = [inline_config({**extra(p), "partition-id": p, "num-partitions": clients}) for p in range(clients)]
    config = toml_config(run_config)
    deadline = time.monotonic() + timeout
    with _folders(work_dir.resolve()) as folders:
        file = folders.home / "run.toml"
        file.write_text(config, encoding="utf-8")
        server, client = _environments(folders, server_env or {}, client_env or {}, apart=mode == "deployment")
        if ray_address:
            server["RAY_ADDRESS"] = ray_address
            del server["RAY_TMPDIR"]  # the cluster has its own
            if not _answers(ray_address):  # Ray itself would wait for many minutes and heed no signal
                return RunOutcome("failed", f"no Ray cluster answers at {ray_address}", folders.logs, {})
        with ProcessGroup() as group:
            run = FlowerRun(group, folders, deadline, poll or (lambda: None))
            return _outcome(run, app_dir.resolve(), ["--run-config", str(file), *options], (server, client), nodes)


def _outcome(
    run: FlowerRun, app: Path, options: Sequence[str], sides: tuple[_Environment, _Environment], nodes: Sequence[str]
) -> RunOutcome:
    """Start everything, wait for the run, end everything."""
    status: Status = "completed"
    reason = ""
    times = {"start": time.monotonic()}
    try:
        superlink = run.start_superlink(sides[0], simulation=not nodes)
        times["run"] = time.monotonic()
        run.start_supernodes(sides[1], nodes, superlink)
        run.submit(sides[0], app, options)
    except Ended as ended:
        status, reason = ended.status, ended.reason
    times["end"] = time.monotonic()
    if left := run.group.close():
        reason = f"{reason} (could not be ended: processes {', '.join(map(str, left))})".strip()
    ends = [*list(times.values())[1:], time.monotonic()]
    seconds = {name: end - times[name] for name, end in zip(times, ends, strict=True)}
    return RunOutcome(status, reason, run.folders.logs, seconds)


def _app_config(app_dir: Path) -> dict[str, Scalar]:
    """Return an app's run configuration as Flower reads it: the keys of nested tables are joined by dots."""

    def flat(table: Mapping[str, Any], prefix: str) -> dict[str, Scalar]:
        items: dict[str, Scalar] = {}
        for key, value in table.items():
            items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return items

    with (app_dir / "pyproject.toml").open("rb") as file:
        return flat(tomllib.load(file)["tool"]["flwr"]["app"].get("config", {}), "")


@contextlib.contextmanager
def _folders(work_dir: Path) -> Iterator[Folders]:
    """Make a run's folders; at the end keep Ray's logs and remove its other files."""
    logs, home = work_dir / "logs", work_dir / "flwr-home"
    shutil.rmtree(logs, ignore_errors=True)
    for folder in (logs, home):
        folder.mkdir(parents=True, exist_ok=True)
    start = Path(tempfile.mkdtemp(prefix="start-", dir=work_dir))
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 24 else "/tmp"
    ray = Path(tempfile.mkdtemp(prefix="fbd-", dir=short))
    try:
        yield Folders(logs=logs, home=home, start=start, ray=ray)
    finally:
        for session in ray.glob("ray/session_*/logs"):
            if not session.parent.is_symlink():
                shutil.move(session, logs / "ray")
        shutil.rmtree(ray, ignore_errors=True)
        with contextlib.suppress(OSError):  # the app left files there
            start.rmdir()


def _environments(
    folders: Folders, server: Mapping[str, str], client: Mapping[str, str], *, apart: bool
) -> tuple[_Environment, _Environment]:
    """Return the environments of the server's and of the clients' processes."""
    places = {"FLWR_HOME": str(folders.home), "RAY_TMPDIR": str(folders.ray)}
    if not apart:
        both = {**base_environment(), **places, **client, **server}
        return both, both
    # What is meant for one side must not reach the other through the caller's own environment either.
    return (
        {**base_environment(hidden=set(client) - set(server)), **places, **server},
        {**base_environment(hidden=set(server) - set(client)), **places, **client},
    )


def _federation(clients: int, cpus: int, gpus: float, workers: int | None, *, own: bool) -> str:
    """Return the value of ``--federation-config``; only a Ray of our own is given its number of CPUs."""
    words = [f"num-supernodes={clients}", f"client-resources-num-cpus={cpus}"]
    words.append(f"client-resources-num-gpus={float(gpus)!r}")
    if own:
        at_once = workers if workers is not None else min(clients, max(1, len(os.sched_getaffinity(0)) // cpus))
        words.append(f"init-args-num-cpus={at_once * cpus}")
    return " ".join(words)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
