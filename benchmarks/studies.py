"""Runs of a study: many variants of a scenario, of which some are done and one may have been killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedbd.config.scenario import Scenario, fingerprint, load_scenario
from fedbd.errors import Interrupted, UserError
from fedbd.records.environment import cores
from fedbd.records.record import FINISHED, read_summary
from fedbd.report.console import LiveRuns
from fedbd.running.jobs import run_all
from fedbd.running.resuming import plan_resumption
from fedbd.running.runs import plan


def carry_on(scenarios: Sequence[Scenario], out: Path) -> int:
    """Run what is not done: what was begun goes on, the rest starts anew, side by side on all cores.

    Returns:
        The exit status: 1 if a run failed. A study shows the others all the same.
    """
    todo = [scenario for scenario in scenarios if not is_done(out, scenario)]
    begun = [scenario for scenario in todo if _begun(out, scenario)]
    fresh = [scenario for scenario in todo if scenario not in begun]
    try:
        jobs = plan_resumption([folder_of(out, scenario) for scenario in begun]).jobs if begun else []
        jobs = [*jobs, *(plan(fresh, out, overwrite=True) if fresh else [])]
    except UserError as mistake:  # another study writes there, or the code has changed since
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None
    with LiveRuns() as live:
        jobs = list({job.folder: job for job in jobs}.values())  # both may need one twin
        for job in jobs:
            live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
        try:
            failures = run_all(jobs, live, cores())
        except Interrupted:
            raise SystemExit("interrupted; the same command goes on") from None
    for failure in failures:
        print(f"{failure.folder} failed: {failure.reason}", file=sys.stderr)
    return 1 if failures else 0


def folder_of(out: Path, scenario: Scenario) -> Path:
    """Return where a run's records lie."""
    return out / scenario.name / f"seed-{scenario.seed}"


def is_done(out: Path, scenario: Scenario) -> bool:
    """Say whether a run has finished with as many rounds as are asked for."""
    summary = read_summary(folder_of(out, scenario)) or {}
    return summary.get("status") == FINISHED and summary["planned_rounds"] == scenario.rounds


def _begun(out: Path, scenario: Scenario) -> bool:
    folder = folder_of(out, scenario)
    if not (folder / "checkpoint").exists():
        return False
    return fingerprint(load_scenario(folder / "scenario.yaml")) == fingerprint(scenario)


def percent(value: float | None) -> str:
    """Return a share in percent, as tables here have it."""
    return "-" if value is None else f"{100 * value:.1f}"
