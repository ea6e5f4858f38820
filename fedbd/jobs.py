"""Many runs side by side: each in a process of its own, as many as cores, watched through the files they write."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from fedbd.errors import FedBDError, UserError
from fedbd.record import read_rounds, read_summary
from fedbd.runs import LOG, Job
from fedbd.scenario import Scenario

_TICK = 0.2


class Watcher(Protocol):
    """What is told how runs go (``fedbd.report.console.LiveRuns``)."""

    def update(self, run_id: str, record: dict[str, Any]) -> None:
        """A round is done."""
        ...

    def finish(self, run_id: str, summary: dict[str, Any]) -> None:
        """A run is done."""
        ...

    def fail(self, run_id: str, reason: str) -> None:
        """A run failed."""
        ...


@dataclass(frozen=True)
class Failure:
    """A run that did not finish: its folder, why, and whether it was the user's mistake."""

    folder: Path
    reason: str
    mistake: bool


@dataclass
class _Running:
    job: Job
    process: SpawnProcess
    verdict: Connection
    shown: int = 0


@dataclass
class _State:
    waiting: list[Job]
    watcher: Watcher
    running: list[_Running] = field(default_factory=list)
    done: set[Path] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


def run_all(jobs: list[Job], watcher: Watcher, cores: int) -> list[Failure]:
    """Run jobs, each when the twin that it needs is done, and return the failures.

    Args:
        jobs: From ``fedbd.runs.plan``.
        watcher: Told of each round; run ids are ``str(job.folder)``.
        cores: How many jobs at once; a job that runs alone gets all of them as workers.
    """
    state = _State(list(jobs), watcher)
    width = max(1, min(cores, _width(jobs)))
    try:
        while state.waiting or state.running:
            _launch(state, width, max(1, cores // width))
            for running in list(state.running):
                _look(state, running)
            time.sleep(_TICK)
    finally:
        for running in state.running:
            _end(running.process)
    return state.failures


def _width(jobs: list[Job]) -> int:
    """Return how many jobs can run at the same time at most: those that wait for nobody, or those that do."""
    first = sum(job.needs is None for job in jobs)
    return max(first, len(jobs) - first)


def _launch(state: _State, width: int, workers: int) -> None:
    for job in list(state.waiting):
        failed = next((f for f in state.failures if f.folder == job.needs), None)
        if failed is not None:
            state.waiting.remove(job)
            _fail(state, Failure(job.folder, f"its attack-free twin failed: {failed.reason}", failed.mistake))
        elif len(state.running) < width and (job.needs is None or job.needs in state.done):
            state.waiting.remove(job)
            state.running.append(_start(job, workers))


def _start(job: Job, workers: int) -> _Running:
    job = dataclasses.replace(job, scenario=_sized(job.scenario, workers))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, there), name=f"fedbd {job.scenario.name}")
    process.start()
    there.close()
    return _Running(job, process, here)


def _sized(scenario: Scenario, workers: int) -> Scenario:
    if scenario.engine.workers is not None:
        return scenario
    serial = workers == 1 and scenario.engine.name == "local"
    engine = dataclasses.replace(
        scenario.engine, workers=workers, executor="serial" if serial else scenario.engine.executor
    )
    return dataclasses.replace(scenario, engine=engine)


def _child(job: Job, verdict: Connection) -> None:
    """Run one job; everything it prints goes to a log in its folder, and one verdict goes back."""
    from fedbd.engines import execute  # noqa: PLC0415 - only the child needs Flower

    job.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        execute(job.scenario, job.folder, job.twin)
        verdict.send_bytes(b"done")
    except UserError as error:
        verdict.send_bytes(b"user:" + str(error).encode())
        sys.exit(2)
    except FedBDError as error:
        verdict.send_bytes(b"fail:" + str(error).encode())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        verdict.send_bytes(b"fail:" + f"{type(error).__name__}: {error} (see {job.folder / LOG})".encode())
        raise


def _look(state: _State, running: _Running) -> None:
    ended = not running.process.is_alive()
    run_id = str(running.job.folder)
    for line in read_rounds(running.job.folder)[running.shown :]:
        state.watcher.update(run_id, line)
        running.shown += 1
    if not ended:
        return
    state.running.remove(running)
    running.process.join()
    try:
        word = running.verdict.recv_bytes() if running.verdict.poll() else b""
    except EOFError:
        word = b""
    if word == b"done":
        state.done.add(running.job.folder)
        state.watcher.finish(run_id, read_summary(running.job.folder) or {})
        return
    kind, _, text = word.decode().partition(":")
    reason = text or f"the process ended with status {running.process.exitcode} (see {running.job.folder / LOG})"
    _fail(state, Failure(running.job.folder, reason, kind == "user"))


def _fail(state: _State, failure: Failure) -> None:
    state.failures.append(failure)
    state.watcher.fail(str(failure.folder), failure.reason.partition("\n")[0])


def _end(process: SpawnProcess) -> None:
    """End a job's process: politely, so that it writes its summary and ends its workers; then by force."""
    process.join(timeout=3)  # at a terminal Ctrl-C has reached it, too
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=15)
    if process.is_alive():
        process.kill()
        process.join()
