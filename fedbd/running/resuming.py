"""Going on with runs that were ended: which folders can, from which round, and with which twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbd.central.training import PLAN
from fedbd.config.scenario import Scenario, load_scenario
from fedbd.data.digest import digest
from fedbd.errors import Problem, UserError
from fedbd.prepared import prepare
from fedbd.records.checkpoint import Checkpoint, differences, missing_lines, read_checkpoint, stamp_of
from fedbd.records.record import FINISHED, SCENARIO, read_rounds, read_summary
from fedbd.records.run_lock import is_written, writing, written
from fedbd.running.engines import execute, flower_app_dir
from fedbd.running.runs import Job, RunResult, Shared, job_for, make_way, result_of


@dataclass(frozen=True)
class Resumption:
    """What there is to do to finish some runs.

    Attributes:
        asked: The folders, each once.
        jobs: Twins first.
        finished: Folders of runs that came to their end already.
        notes: Folder -> where its run goes on, in words.
    """

    asked: list[Path]
    jobs: list[Job]
    finished: list[Path]
    notes: dict[Path, str]


def resume(folder: str | Path, *, other_code: bool = False) -> RunResult:
    """Finish a run in this process (its clients in workers), its attack-free twin first where that is missing.

    Args:
        folder: The run's folder; one that has finished is only read.
        other_code: Also go on from what other code or releases wrote.

    Raises:
        UserError: If the folder holds no run that can go on.
        RunFailed: If the run could not finish.
    """
    for job in plan_resumption([Path(folder)], other_code=other_code).jobs:
        with writing(job.folder):
            execute(job.scenario, job.folder, job.twin, start=job.start, resume=job.resume)
    return result_of(Path(folder))


def plan_resumption(folders: Sequence[Path], *, workers: int | None = None, other_code: bool = False) -> Resumption:
    """Return the jobs that finish some runs; later rounds than those of their checkpoints are dropped.

    Args:
        folders: Folders of runs.
        workers: The command's own choice of cores, which counts more than what a run started with.
        other_code: Also go on from what other code or releases wrote.

    Raises:
        UserError: With everything that is wrong with any of them; nothing is touched then.
    """
    asked = list({folder.resolve(): folder for folder in folders}.values())
    problems: list[Problem] = []
    found: dict[Path, tuple[Scenario, Checkpoint | None]] = {}
    finished = []
    for folder in asked:
        try:
            _refuse(_folder_problems(folder))
            if (read_summary(folder) or {}).get("status") == FINISHED:
                finished.append(folder)
            else:
                found[folder] = _unfinished(folder, other_code)
        except UserError as error:
            problems += error.problems
    _refuse(problems, "nothing was started:")
    jobs = _jobs(found, workers, "other-code" if other_code else "same-code")
    _refuse([written(job.folder) for job in jobs if is_written(job.folder)], "nothing was started:")
    for job in jobs:
        make_way(job)
    return Resumption(asked, jobs, finished, {folder: _where(each) for folder, (_, each) in found.items()})


def _refuse(problems: Sequence[Problem], heading: str = "") -> None:
    if problems:
        raise UserError(problems, heading)


def _folder_problems(folder: Path) -> list[Problem]:
    """Return why a folder is not that of a run that nobody writes."""
    expected = "must be the folder of a run"
    if (folder / PLAN).exists():
        remedy = "repeat the `fedbd train` that began it: it goes on by itself"
        return [Problem(path=str(folder), expected=expected, got="that of a training", remedy=remedy)]
    if not (folder / SCENARIO).exists():
        got = "a folder without scenario.yaml" if folder.is_dir() else "no folder"
        return [Problem(path=str(folder), expected=expected, got=got, remedy="start it with `fedbd run`")]
    return [written(folder)] if is_written(folder) else []


def _unfinished(folder: Path, other_code: bool) -> tuple[Scenario, Checkpoint | None]:
    """Return a run's scenario and its checkpoint, None for one that was ended before its first."""
    scenario = load_scenario(folder / SCENARIO)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None and scenario.checkpoint is None and len(read_rounds(folder)) > 1:
        expected = "keeps no checkpoints (checkpoint: null), so nothing can go on"
        remedy = f"run it anew: fedbd run {folder / SCENARIO} --overwrite, or with another --out"
        raise UserError([Problem(path=str(folder), expected=expected, remedy=remedy)])
    dataset = prepare(scenario).dataset
    if checkpoint is not None:
        now = stamp_of(scenario, digest(dataset), flower_app_dir())
        problems = differences(checkpoint.stamp, now, str(folder), other_code=other_code)
        _refuse([*problems, *missing_lines(folder, checkpoint.round)])
    return scenario, checkpoint


def _jobs(found: dict[Path, tuple[Scenario, Checkpoint | None]], workers: int | None, code: str) -> list[Job]:
    scenarios = {folder: _with_workers(scenario, workers) for folder, (scenario, _) in found.items()}
    shared = Shared.of(scenarios)
    jobs = [job_for(s, folder, _out(folder, s), shared) for folder, s in scenarios.items()]
    jobs = [dataclasses.replace(job, resume=code) for job in jobs]
    listed = {job.folder.resolve() for job in jobs}
    alone = [twin for twin in shared.jobs.values() if twin.folder.resolve() not in listed]
    return [*alone, *sorted(jobs, key=lambda job: job.needs is not None)]


def _out(folder: Path, scenario: Scenario) -> Path:
    """Return the folder of all runs, where twins lie; of a run that was moved, the folder that it lies in."""
    where = folder.resolve()
    usual = where.name == f"seed-{scenario.seed}" and where.parent.name == scenario.name
    return where.parents[1] if usual else where.parent


def _with_workers(scenario: Scenario, workers: int | None) -> Scenario:
    if workers is None or scenario.engine.executor == "serial":
        return scenario
    return dataclasses.replace(scenario, engine=dataclasses.replace(scenario.engine, workers=None))


def _where(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "from its first round: it was ended before its first checkpoint"
    damaged = f" (later ones are damaged: {'; '.join(checkpoint.damaged)})" if checkpoint.damaged else ""
    return f"after round {checkpoint.round}{damaged}"
