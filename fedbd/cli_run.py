"""``fedbd run``: scenarios side by side, and their comparison. ``fedbd.cli`` registers it.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbd.cli_arguments import Files, Settings, check_table, fits, load, raise_all, terminal
from fedbd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.runs import Job
    from fedbd.scenario import Scenario


def run(
    scenarios: Files,
    settings: Settings = None,
    seeds: Annotated[int, typer.Option(min=1, help="Run each scenario with so many seeds, from its own on.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option(help="Replace earlier runs of these scenarios and seeds.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processor cores to use; default: all.")] = None,
    twin: Annotated[bool, typer.Option(help="Also run the attack-free twins (the floor of the ASR).")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")] = False,
    table: Annotated[Path | None, typer.Option(help="Also write the comparison to this .csv or .json file.")] = None,
) -> None:
    """Run scenarios, several side by side, and compare them."""
    from fedbd.environment import cores  # noqa: PLC0415
    from fedbd.jobs import run_all  # noqa: PLC0415
    from fedbd.report.console import LiveRuns  # noqa: PLC0415
    from fedbd.runs import plan, with_seeds  # noqa: PLC0415

    console = terminal()
    check_table(table)
    errors: list[UserError] = []
    found = load(scenarios, settings or [], errors)
    loaded = [scenario for path, scenario in found if fits(path, scenario, True, errors)]
    raise_all(errors)
    if not twin:
        loaded = [_without_twin(scenario) for scenario in loaded]
    wanted = with_seeds(loaded, seeds)
    jobs = plan(wanted, out, overwrite=overwrite)
    with LiveRuns(console, quiet=quiet) as live:
        for job in jobs:
            live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
        failures = run_all(jobs, live, workers or cores())
    order = [(scenario.name, scenario.seed) for scenario in wanted]  # the first arm is what others are compared with
    asked = sorted(
        (job for job in jobs if job.folder.parent.name != "twins"),
        key=lambda job: order.index((job.scenario.name, job.scenario.seed)),
    )
    failed = {failure.folder for failure in failures}
    _compare(console, [job for job in asked if job.folder not in failed], quiet, table)
    if failures:
        for failure in failures:
            typer.secho(f"{failure.folder}: {failure.reason}", fg="red", err=True)
        raise typer.Exit(2 if all(failure.mistake for failure in failures) else 1)


def _compare(console: Console, jobs: list[Job], quiet: bool, table: Path | None) -> None:
    from fedbd.report.arms import compare  # noqa: PLC0415
    from fedbd.report.comparison import render_comparison, write_comparison  # noqa: PLC0415
    from fedbd.report.run_view import load_run  # noqa: PLC0415

    if not jobs:
        return
    arms = compare([load_run(job.folder) for job in jobs])
    if not quiet:
        console.print()
        render_comparison(console, arms)
        where = "folder" if len(jobs) == 1 else "folders"
        console.print(f"Records, models and trigger pictures: {where} {', '.join(str(job.folder) for job in jobs)}")
    if table is not None:
        write_comparison(table, arms)


def _without_twin(scenario: Scenario) -> Scenario:
    import dataclasses  # noqa: PLC0415

    return dataclasses.replace(scenario, evaluation=dataclasses.replace(scenario.evaluation, twin=False))
