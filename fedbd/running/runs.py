"""The composition root: scenarios in, run folders out; one at a time in this process, or many side by side."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbd.config.scenario import Scenario, twin_of, warm_up_of
from fedbd.errors import Problem, UserError
from fedbd.flower.strategies import inner_strategy
from fedbd.flower.strategy import DefendedStrategy
from fedbd.prepared import prepare
from fedbd.records.checkpoint import can_resume, read_checkpoint, stamp_of
from fedbd.records.record import FINISHED, ROUNDS, SCENARIO, RunFolder, read_rounds, read_summary
from fedbd.records.run_lock import LOCK, is_written, writing, written
from fedbd.records.saved_state import Unsaveable
from fedbd.roles import attack_window
from fedbd.running.engines import execute, flower_app_dir
from fedbd.running.identity import DataDigests, identity

MODEL = "model.safetensors"
"""What a finished run leaves of its model, in its folder."""

LOG = "log.txt"
"""What a run prints, in its folder."""

MARKS = (SCENARIO, ROUNDS, LOG, "engine")
"""By one of these a folder is known for a run's, however early that ended."""


@dataclass(frozen=True)
class Job:
    """One run to be done.

    Attributes:
        scenario: What to run.
        folder: Where.
        needs: Folder of the job that must be done first: the attack-free twin, or the warm-up.
        twin: The twin's folder.
        start: The model that the warm-up leaves, where the scenario starts from one.
        resume: ``same-code`` or ``other-code``: go on with the unfinished run in the folder (see ``resuming``).
    """

    scenario: Scenario
    folder: Path
    needs: Path | None = None
    twin: Path | None = None
    start: Path | None = None
    resume: str = ""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        path: The run's folder.
        summary: ``summary.json``.
        rounds: The lines of ``rounds.jsonl``, round 0 first.
    """

    path: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]


def run(scenario: Scenario, out: str | Path = "runs", *, overwrite: bool = False) -> RunResult:
    """Run a scenario in this process (its clients in workers), its attack-free twin first where it is wanted.

    Args:
        scenario: What to run.
        out: Folder for all runs: this one goes to ``out/NAME/seed-SEED``.
        overwrite: Remove an earlier run in that place.

    Raises:
        UserError: If the place is taken or the scenario does not fit its data.
        RunFailed: If the run could not finish; finished rounds are on disk.
    """
    prepare(scenario)  # an earlier run goes only for one that can start
    jobs = plan([scenario], Path(out), overwrite=overwrite)
    for job in jobs:
        with writing(job.folder):
            execute(job.scenario, job.folder, job.twin, start=job.start, resume=job.resume)
    return result_of(jobs[-1].folder)


def result_of(folder: Path) -> RunResult:
    """Return the finished run in a folder."""
    return RunResult(folder, read_summary(folder) or {}, read_rounds(folder))


def plan(scenarios: Sequence[Scenario], out: Path, *, overwrite: bool = False) -> list[Job]:
    """Return the jobs for some scenarios, warm-ups and twins first; one that several share, or is done, is run once.

    A twin that was ended goes on where it stood.

    Args:
        scenarios: What to run.
        out: Folder for all runs.
        overwrite: Remove earlier runs in the places of these scenarios (finished twins and warm-ups are kept).

    Raises:
        UserError: If two scenarios want one place, a place is taken, another process writes a place or a twin, or a
            Flower strategy cannot be built.
    """
    folders = {}
    problems = []
    for scenario in scenarios:
        folder = out / scenario.name / f"seed-{scenario.seed}"
        if folder in folders:
            remedy = "give each scenario its own name, or another seed"
            problems.append(Problem(path=str(folder), expected="is wanted by two scenarios", remedy=remedy))
        else:
            problems += _taken(folder, overwrite)
        folders[folder] = scenario
        wrong = [dataclasses.replace(p, path=f"{scenario.name}: {p.path}") for p in strategy_problems(scenario)]
        problems += [problem for problem in wrong if problem not in problems]
    shared = Shared.of(folders)
    jobs = [job_for(scenario, folder, out, shared) for folder, scenario in folders.items()]
    twins = list(shared.jobs.values())
    problems += [written(twin.folder) for twin in twins if is_written(twin.folder)]
    if problems:
        raise UserError(list(dict.fromkeys(problems)), "nothing was started:")
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
    for twin in twins:
        make_way(twin)
    return [*twins, *sorted(jobs, key=lambda job: job.needs is not None)]


def strategy_problems(scenario: Scenario) -> list[Problem]:
    """Return what is wrong with the Flower strategy: only building it tells, and a scenario loads without Flower."""
    try:
        inner = inner_strategy(scenario.strategy.name, scenario.strategy.arguments)
        strategy = DefendedStrategy(inner, aggregation=scenario.aggregation.impl)
        if scenario.checkpoint is not None:
            strategy.state_dict()
    except UserError as error:
        return list(error.problems)
    except Unsaveable as error:
        remedy = "set checkpoint: null, or give the class state_dict and load_state_dict"
        return [Problem(path="checkpoint", expected=f"cannot hold what the strategy keeps: {error}", remedy=remedy)]
    return []


def _taken(folder: Path, overwrite: bool) -> list[Problem]:
    """Return why a run cannot have a folder."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    elsewhere = "pass --out with another folder"
    if there.exists() and not (there.is_dir() and os.access(there, os.W_OK)):
        return [Problem(path=str(there), expected="must be a folder that can be written", remedy=elsewhere)]
    if is_written(folder):
        return [written(folder)]
    if there != folder or all(entry.name == LOCK for entry in folder.iterdir()):
        return []
    if not any((folder / name).exists() for name in MARKS):
        return [Problem(path=str(folder), expected="must be new, empty or a run's folder", remedy=elsewhere)]
    if read_rounds(folder) and not overwrite:
        done = (read_summary(folder) or {}).get("status") == FINISHED
        on = "" if done else f"continue it with `fedbd resume {folder}`, "
        remedy = f"{on}pass --overwrite to replace it, or {elsewhere.removeprefix('pass ')}"
        expected = f"holds an earlier run{'' if done else ' that did not finish'}"
        return [Problem(path=str(folder), expected=expected, remedy=remedy)]
    return []


@dataclass(frozen=True)
class Shared:
    """What jobs that are planned together share.

    Attributes:
        own: Identity of a twin -> folder of a run that is the same, and is run, too.
        data: Hashes of the data sets.
        jobs: Identity -> job, of the twins and warm-ups that are still to be run.
    """

    own: dict[str, Path]
    data: DataDigests
    jobs: dict[str, Job] = field(default_factory=dict)

    @staticmethod
    def of(runs: Mapping[Path, Scenario]) -> Shared:
        """Return it for runs by folder, before any of them is planned."""
        data = DataDigests()
        quiet = {folder: twin_of(s) for folder, s in runs.items() if attack_window(s) is None}
        return Shared({identity(twin, data.of(twin)): folder for folder, twin in quiet.items()}, data)

    def identity(self, scenario: Scenario) -> str:
        """Return a scenario's identity."""
        return identity(scenario, self.data.of(scenario))


def job_for(scenario: Scenario, folder: Path, out: Path, shared: Shared) -> Job:
    """Return the job for a scenario; those for its warm-up and its twin, if still to be run, are added to ``shared``.

    Args:
        scenario: What to run.
        folder: Where.
        out: Folder for all runs.
        shared: What it shares with others.
    """
    start, warming = _warm_up(scenario, out, shared)
    if not scenario.evaluation.twin or attack_window(scenario) is None:
        return Job(scenario, folder, warming, None, start)
    twin = twin_of(scenario)
    key = shared.identity(twin)
    if key in shared.own:
        return Job(scenario, folder, shared.own[key], shared.own[key], start)
    place = out / "twins" / key[:16]
    if (read_summary(place) or {}).get("status") == FINISHED:
        return Job(scenario, folder, warming, place, start)
    if key not in shared.jobs:
        shared.jobs[key] = _shared(shared, twin, place, warming, start)
    return Job(scenario, folder, place, place, start)  # the twin waits for the warm-up


def _shared(
    shared: Shared, scenario: Scenario, place: Path, needs: Path | None = None, start: Path | None = None
) -> Job:
    """Return the job for a twin or a warm-up; one that was ended goes on where it stood."""
    stamp = stamp_of(scenario, shared.data.of(scenario), flower_app_dir())
    unfinished = not is_written(place) and can_resume(place, stamp)
    return Job(scenario, place, needs, None, start, "same-code" if unfinished else "")


def _warm_up(scenario: Scenario, out: Path, shared: Shared) -> tuple[Path | None, Path | None]:
    """Return the model that a scenario's warm-up leaves, and the warm-up's folder if it must be run first."""
    warm_up = warm_up_of(scenario)
    if warm_up is None:
        return None, None
    key = shared.identity(warm_up)
    place = out / "warm-ups" / key[:16]
    model = place / MODEL
    if (read_summary(place) or {}).get("status") == FINISHED and model.is_file():
        return model, None
    if key not in shared.jobs:
        shared.jobs[key] = _shared(shared, warm_up, place)
    return model, place


def make_way(job: Job) -> None:
    """Take what a job will do again out of its folder: all of it, or what comes after the checkpoint."""
    if not job.resume:
        if job.folder.exists():
            shutil.rmtree(job.folder)
    else:
        found = read_checkpoint(job.folder)
        RunFolder(job.folder, resume=True).cut_back(found.round if found is not None else -1)


def with_seeds(scenarios: Sequence[Scenario], seeds: int) -> list[Scenario]:
    """Return each scenario with its own seed and the ``seeds - 1`` following ones."""
    return [dataclasses.replace(scenario, seed=scenario.seed + step) for scenario in scenarios for step in range(seeds)]
