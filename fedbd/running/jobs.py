"""Many runs side by side: each in a process of its own, as many as cores, watched through the files they write."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fedbd import fork_server
from fedbd.config.run_text import scenario_text
from fedbd.config.scenario import Scenario
from fedbd.errors import FedBDError, Interrupted, UserError
from fedbd.fork_server import ENDING, let_in
from fedbd.records.record import SCENARIO, RunFolder, read_rounds, read_summary, rounds_from
from fedbd.records.run_lock import is_written, writing
from fedbd.running.runs import LOG, Job

_TICK = 0.2
_GRACE = 20.0  # seconds in which a job that was told to end may write its summary and end its own processes
_REASON_BYTES = 8000  # a pipe takes 64 KiB before somebody reads


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
    process: ForkServerProcess | SpawnProcess
    verdict: Connection
    shown: int = 0  # bytes of its rounds.jsonl: what was told to the watcher
    word: bytes = b""


@dataclass
class _State:
    waiting: list[Job]
    watcher: Watcher
    running: list[_Running] = field(default_factory=list)
    done: set[Path] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


def run_all(jobs: list[Job], watcher: Watcher, cores: int) -> list[Failure]:
    """Run jobs, each when the warm-up or twin that it needs is done, and return the failures.

    Args:
        jobs: From ``fedbd.running.runs.plan``.
        watcher: Told of each round; run ids are ``str(job.folder)``.
        cores: How many jobs at once; a job that runs alone gets all of them as workers.

    Raises:
        Interrupted: After SIGINT, SIGTERM or SIGHUP; the jobs have ended by then. A second Ctrl-C ends them by force.
    """
    state = _State(list(jobs), watcher)
    width = max(1, min(cores, _width(jobs)))
    with _signals() as got:
        try:
            while not got and (state.waiting or state.running):
                _launch(state, width, max(1, cores // width))
                for running in list(state.running):
                    _look(state, running)
                time.sleep(_TICK)
        finally:
            _end(state.running, got)
    if got:
        for job in state.waiting:  # so that `fedbd resume` takes them up with the others
            _sum_up(job, "interrupted", "")
        raise Interrupted(got[0])
    return state.failures


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask for an end: an exception amid the start of a job would lose sight of that job."""
    got: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup: whoever ignores one means it
                    before[number] = signal.signal(number, lambda received, _: got.append(received))
        yield got
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _width(jobs: list[Job]) -> int:
    """Return how many jobs can run at the same time at most: those that wait for nobody, or those that do."""
    first = sum(job.needs is None for job in jobs)
    return max(first, len(jobs) - first)


def _launch(state: _State, width: int, workers: int) -> None:
    for job in list(state.waiting):
        needs = job.needs.resolve() if job.needs is not None else None  # a user may have named it by another path
        failed = next((f for f in state.failures if f.folder.resolve() == needs), None)
        if failed is not None:
            state.waiting.remove(job)
            _fail(state, job, Failure(job.folder, _because(failed), failed.mistake))
        elif len(state.running) < width and (needs is None or needs in state.done):
            state.waiting.remove(job)
            state.running.append(_start(job, workers))


def _because(failed: Failure) -> str:
    """Return why a job that waited cannot run: where in whose code it went wrong is said once, by what failed."""
    reason = failed.reason if failed.mistake else failed.reason.partition("\n")[0]
    return f"its {_what(failed.folder)} failed: {reason}"


def _what(folder: Path) -> str:
    return "warm-up" if folder.parent.name == "warm-ups" else "attack-free twin"


def _start(job: Job, workers: int) -> _Running:
    job = dataclasses.replace(job, scenario=_sized(job.scenario, workers))
    context = fork_server.server_context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, there, dict(os.environ)), name=f"fedbd {job.scenario.name}")
    fork_server.start(process, hide_main=True)
    there.close()
    return _Running(job, process, here)


def _sized(scenario: Scenario, workers: int) -> Scenario:
    """Return a scenario with its number of workers; a single one is a process, too, which can hang or die alone."""
    if scenario.engine.workers is not None or scenario.engine.executor == "serial":
        return scenario
    return dataclasses.replace(scenario, engine=dataclasses.replace(scenario.engine, workers=workers))


def _child(job: Job, verdict: Connection, environment: Mapping[str, str]) -> None:
    """Run one job; everything it prints goes to a log in its folder, and one verdict goes back."""
    fork_server.take(environment)
    fork_server.join()
    from fedbd.running.engines import execute  # noqa: PLC0415 - only the child needs Flower

    threading.Thread(target=_leave_with_parent, daemon=True, name="fedbd-parent").start()
    try:
        _heed_signals()
        with writing(job.folder):
            log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, sys.stdout.fileno())
            os.dup2(log, sys.stderr.fileno())
            execute(job.scenario, job.folder, job.twin, start=job.start, resume=job.resume)
        _say(verdict, "done")
    except UserError as error:
        _say(verdict, "user", str(error))
        sys.exit(2)
    except FedBDError as error:
        _say(verdict, "fail", str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _sum_up(job, "interrupted", "")
        sys.exit(130)
    except BaseException as error:
        _say(verdict, "fail", f"{type(error).__name__}: {error} (see {job.folder / LOG})")
        raise


def _say(verdict: Connection, kind: str, text: str = "") -> None:
    with contextlib.suppress(OSError):  # nobody may listen any more
        verdict.send_bytes((f"{kind}:{text}" if text else kind).encode()[:_REASON_BYTES])


def _heed_signals() -> None:
    """Let the first signal that asks for an end raise KeyboardInterrupt here, and no later one disturb the end."""
    ending = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not ending.is_set():
            ending.set()
            raise KeyboardInterrupt

    for number in ENDING:  # the parent sends SIGTERM: the others may be ignored on purpose (nohup, a shell's ``&``)
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    let_in()


def _leave_with_parent() -> None:
    """End this process when ``fedbd run`` is gone, however that ended: in order, or after a while by force."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(1)


def _look(state: _State, running: _Running) -> None:
    ended = not running.process.is_alive()
    _listen(running)
    run_id = str(running.job.folder)
    lines, running.shown = rounds_from(running.job.folder, running.shown)
    for line in lines:
        state.watcher.update(run_id, line)
    if not ended:
        return
    state.running.remove(running)
    running.process.join()
    if running.word == b"done":
        state.done.add(running.job.folder.resolve())
        state.watcher.finish(run_id, read_summary(running.job.folder) or {})
        return
    kind, _, text = running.word.decode(errors="ignore").partition(":")  # a cut may fall inside a letter
    reason = text or f"the process ended with status {running.process.exitcode} (see {running.job.folder / LOG})"
    _fail(state, running.job, Failure(running.job.folder, reason, kind == "user"))


def _listen(running: _Running) -> None:
    """Take a job's verdict in while it still runs: it cannot end before that is read."""
    with contextlib.suppress(EOFError, OSError):
        if not running.word and running.verdict.poll():
            running.word = running.verdict.recv_bytes()


def _fail(state: _State, job: Job, failure: Failure) -> None:
    _sum_up(job, "failed", failure.reason, mistake=failure.mistake)
    state.failures.append(failure)
    state.watcher.fail(str(failure.folder), failure.reason.partition("\n")[0])


def _sum_up(job: Job, status: str, reason: str, *, mistake: bool = False) -> None:
    """Leave a summary for a run that could not write one itself: its twin failed, or it was killed.

    A run that was the user's mistake has no rounds: a folder that holds some is another run's.
    """
    with contextlib.suppress(UserError, OSError):
        if is_written(job.folder) or read_summary(job.folder) is not None:
            return
        folder = RunFolder(job.folder, resume=not mistake)
        if not (job.folder / SCENARIO).exists():
            folder.write_scenario(scenario_text(job.scenario))
        summary = {"name": job.scenario.name, "seed": job.scenario.seed, "status": status, "reason": reason or None}
        done = len(read_rounds(job.folder)[1:])
        folder.write_summary({**summary, "rounds": done, "planned_rounds": job.scenario.rounds})


def _end(running: list[_Running], got: list[int]) -> None:
    """End jobs: politely, so that they write their summaries and end their workers; then by force."""
    for each in running:
        each.process.terminate()  # at a terminal Ctrl-C has reached it, too; the second signal does nothing
    deadline = time.monotonic() + _GRACE
    while any(each.process.is_alive() for each in running):
        if time.monotonic() > deadline or got.count(signal.SIGINT) > 1:
            for each in running:
                each.process.kill()
            break
        for each in running:
            _listen(each)
        time.sleep(_TICK / 4)
    for each in running:
        each.process.join()
        _sum_up(each.job, "interrupted", "")
