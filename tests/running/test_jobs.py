from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import fedbd
from fedbd.cli import doctor
from fedbd.cli import main as cli
from fedbd.config.scenario import Scenario, from_dict, load_scenario, to_dict
from fedbd.errors import Interrupted, UserError
from fedbd.flower.supervisor import descendants
from fedbd.records.run_lock import LOCK, is_written, writing
from fedbd.running.jobs import Failure, _because, _sized, _sum_up, run_all
from fedbd.running.resuming import plan_resumption
from fedbd.running.runs import Job, plan

ROOT = Path(fedbd.__file__).resolve().parent.parent
BASE: dict[str, Any] = {
    "name": "t",
    "rounds": 3,
    "data": "digits",
    "partition": {"name": "iid", "clients": 2},
    "model": {"name": "mlp", "hidden": [4]},
    "training": {"epochs": 1, "batch_size": 512, "lr": 0.05},
}
ATTACK: dict[str, Any] = {"name": "badnets", "clients": {"count": 1}, "target": 0, "trigger": "grid"}
SOMEONES = """
from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from fedbd.training import train


@dataclass(frozen=True, kw_only=True)
class Slow:
    def fit(self, model, data, plan, memory, rng):
        import numpy as np

        if "rounds" in memory:
            time.sleep(100)
        return {"rounds": np.array([1])}, train(model, data, plan, rng)


@dataclass(frozen=True, kw_only=True)
class Long:
    def fit(self, model, data, plan, memory, rng):
        raise RuntimeError("it is a pity \\u00e9 " * 20_000)


@dataclass(frozen=True, kw_only=True)
class Dies:
    def fit(self, model, data, plan, memory, rng):
        os.kill(os.getpid(), signal.SIGSEGV)
"""


class Told:
    """A watcher that notes what it is told."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.rounds: list[int] = []

    def update(self, run_id: str, record: dict[str, Any]) -> None:
        self.rounds.append(record["round"])

    def finish(self, run_id: str, summary: dict[str, Any]) -> None:
        raise AssertionError("nothing here comes to its end")

    def fail(self, run_id: str, reason: str) -> None:
        self.failed[run_id] = reason


def make(**more: Any) -> Scenario:
    return from_dict({**BASE, **more})


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture
def someones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of methods that is on everybody's path."""
    (tmp_path / "someones.py").write_text(SOMEONES)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


# How a job is sized.


def test_one_worker_is_still_a_process_of_its_own() -> None:
    for workers in (1, 3):
        engine = _sized(make(), workers).engine
        assert (engine.workers, engine.executor) == (workers, "process")


def test_what_the_scenario_says_of_its_workers_stands() -> None:
    for engine in ({"workers": 2}, {"executor": "serial"}):
        scenario = make(engine=engine)
        assert _sized(scenario, 8) == scenario
        assert from_dict(to_dict(_sized(scenario, 8))) == scenario


def test_a_client_that_dies_alone_in_its_pool_costs_the_client_not_the_run(someones: Path) -> None:
    jobs = plan([make(local_defense={"name": "someones:Dies"})], someones / "runs")
    (failure,) = run_all(jobs, Told(), 1)
    assert failure.reason.startswith("round 1: client 0: ")
    assert "the worker process died (signal SIGSEGV)" in failure.reason
    summary = summary_of(jobs[0].folder)
    assert (summary["status"], summary["rounds"], summary["reason"]) == ("failed", 0, failure.reason)
    assert "planned_rounds" in summary
    assert not (jobs[0].folder / LOCK).exists()


# How a job fails.


def test_a_long_reason_arrives_and_the_arm_of_a_failed_twin_says_why(someones: Path) -> None:
    engine = {"executor": "serial"}
    scenario = make(attacks=[ATTACK], local_defense={"name": "someones:Long"}, engine=engine)
    twin, arm = plan([scenario], someones / "runs")
    told = Told()
    failures = run_all([twin, arm], told, 2)
    assert [failure.folder for failure in failures] == [twin.folder, arm.folder]
    assert failures[0].reason.startswith("round 1: client 0: RuntimeError: it is a pity")
    assert 1000 < len(failures[0].reason.encode()) <= 8000
    assert failures[1].reason == f"its attack-free twin failed: {failures[0].reason}"
    assert set(told.failed) == {str(twin.folder), str(arm.folder)}
    summary = summary_of(arm.folder)
    assert (summary["status"], summary["reason"], summary["rounds"]) == ("failed", failures[1].reason, 0)
    assert load_scenario(arm.folder / "scenario.yaml") == scenario
    assert len(plan([scenario], someones / "runs")) == 2  # neither is in the way of another try


def test_a_traceback_is_told_once_and_a_mistake_whole(tmp_path: Path) -> None:
    twin, reason = tmp_path / "twins/ab12", "round 1: client 0: ValueError: no\n  File 'x.py', line 3"
    assert _because(Failure(twin, reason, False)) == "its attack-free twin failed: round 1: client 0: ValueError: no"
    assert _because(Failure(twin, "it does not fit:\n  data: gone", True)).endswith("it does not fit:\n  data: gone")


def test_a_summary_is_left_once_and_in_nobody_elses_folder(tmp_path: Path) -> None:
    job = Job(make(), tmp_path / "t")
    with writing(job.folder):
        _sum_up(job, "failed", "why")
        assert not (job.folder / "summary.json").exists()
    (job.folder / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    _sum_up(job, "failed", "why", mistake=True)
    assert not (job.folder / "summary.json").exists()
    _sum_up(job, "failed", "killed")
    _sum_up(job, "interrupted", "later")
    summary = summary_of(job.folder)
    assert summary == {
        "name": "t",
        "seed": 0,
        "status": "failed",
        "reason": "killed",
        "rounds": 1,
        "planned_rounds": 3,
    }


# Signals.


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143), (Interrupted(signal.SIGHUP), 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_an_interrupt_in_a_command_is_said_and_is_the_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", interrupted)
    monkeypatch.setattr(sys, "argv", ["fedbd", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_any_run_ends_a_command_in_order(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["fedbd", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def live(folder: Path, scenario: Scenario) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """Run a scenario as a user does until its second round; yield the command, what it started and the run's folder."""
    (folder / "t.yaml").write_text(json.dumps(to_dict(scenario)))
    command = [sys.executable, "-m", "fedbd", "run", "t.yaml", "--workers", "2"]
    environment = {**os.environ, "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out = folder / "runs" / "t" / "seed-0"
    rounds = out / "rounds.jsonl"
    pids: list[int] = []
    try:
        there = lambda: process.poll() is not None or (rounds.exists() and rounds.read_text().count("\n") == 2)  # noqa: E731
        wait_for(there, "the first round took too long")
        assert process.poll() is None, process.communicate()
        pids = list(descendants(process.pid))
        yield process, pids, out
    finally:
        process.kill()
        process.communicate()
        end([pid for pid in pids if alive(pid)])


def recorded(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@on_linux
def test_sigterm_ends_a_run_with_all_its_processes(someones: Path) -> None:
    scenario = make(local_defense={"name": "someones:Slow"}, secure_sum="ckks", rounds=2)
    with live(someones, scenario) as (process, pids, out):
        assert len(pids) >= 5  # the job, the resource tracker, the key agent, the fork server, two workers
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is being written by another fedbd run"):
                plan([scenario], someones / "runs", overwrite=overwrite)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)  # of two that wait Python would see the lower number first
        process.send_signal(signal.SIGHUP)  # what ends a session sends both
        said, complaint = process.communicate(timeout=60)
        assert process.returncode == 143
        assert complaint == "interrupted; finished rounds are kept; go on with: fedbd resume runs/t/seed-0\n"
        assert "Traceback" not in said
        wait_for(lambda: not any(map(alive, pids)), "something stayed", 10)
        assert (summary_of(out)["status"], summary_of(out)["rounds"]) == ("interrupted", 1)
        assert recorded(out) == [0, 1]
        assert not (out / LOCK).exists()


@on_linux
def test_a_run_ends_when_its_command_is_killed(someones: Path) -> None:
    scenario = make(local_defense={"name": "someones:Slow"}, secure_sum="ckks", rounds=2)
    with live(someones, scenario) as (process, pids, out):
        process.kill()
        wait_for(lambda: not any(map(alive, pids)), "something stayed", 30)
        assert (summary_of(out)["status"], summary_of(out)["rounds"]) == ("interrupted", 1)
        assert not is_written(out)


@on_linux
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_other_signals_are_as_orderly(number: int, status: int, someones: Path) -> None:
    scenario = make(local_defense={"name": "someones:Slow"}, rounds=2, engine={"executor": "serial"})
    with live(someones, scenario) as (process, pids, out):
        process.send_signal(number)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == status
        assert complaint == "interrupted; finished rounds are kept; go on with: fedbd resume runs/t/seed-0\n"
        wait_for(lambda: not any(map(alive, pids)), "something stayed", 10)
        assert (summary_of(out)["status"], summary_of(out)["reason"]) == ("interrupted", None)


@on_linux
def test_what_an_interrupt_left_waiting_is_resumed_with_the_rest(someones: Path) -> None:
    scenario = make(attacks=[ATTACK], local_defense={"name": "someones:Slow"}, rounds=2, engine={"executor": "serial"})
    (someones / "t.yaml").write_text(json.dumps(to_dict(scenario)))
    command = [sys.executable, "-m", "fedbd", "run", "t.yaml"]
    with subprocess.Popen(command, cwd=someones, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: list(someones.glob("runs/twins/*/rounds.jsonl")) != [], "the twin took too long")
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert complaint == "interrupted; finished rounds are kept; go on with: fedbd resume runs/t/seed-0\n"
    folder = someones / "runs/t/seed-0"
    assert (summary_of(folder)["status"], summary_of(folder)["rounds"]) == ("interrupted", 0)
    assert [job.folder == folder for job in plan_resumption([folder]).jobs] == [False, True]  # its twin goes first
