"""``fedbd run``: scenarios side by side, and their comparison. ``main`` registers it.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbd import fork_server
from fedbd.cli.arguments import (
    MOST_SEEDS,
    AsJson,
    Files,
    Quiet,
    Settings,
    check_table,
    fits,
    in_json,
    load,
    print_json,
    raise_all,
    say,
    terminal,
)
from fedbd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.config.scenario import Scenario
    from fedbd.running.jobs import Failure
    from fedbd.running.runs import Job


LISTED = 10
"""More folders than these are named by a pattern."""

LogEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Without a terminal: a line every so many rounds; default: some 100 lines a run."),
]
Table = Annotated[Path | None, typer.Option(help="Also write the comparison to this .csv or .json file.")]


def run(
    scenarios: Files,
    settings: Settings = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=MOST_SEEDS, help="Run each scenario with so many seeds, from its own on.")
    ] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option(help="Replace earlier runs of these scenarios and seeds.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processor cores to use; default: all.")] = None,
    twin: Annotated[bool, typer.Option(help="Also run the attack-free twins (the floor of the ASR).")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps, print what each run will take, and start none.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_every: LogEvery = None,
    table: Table = None,
) -> None:
    """Run scenarios, several side by side, and compare them."""
    if not dry_run:
        load_ahead()
    from fedbd.running.runs import plan, with_seeds  # noqa: PLC0415

    with in_json(as_json):
        check_table(table)
        errors: list[UserError] = []
        found = load(scenarios, settings or [], errors)
        loaded = [scenario for path, scenario in found if fits(path, scenario, True, errors)]
        raise_all(errors)
        wanted = with_seeds(loaded if twin else [_without_twin(scenario) for scenario in loaded], seeds)
        if dry_run:
            _estimate(wanted, workers, as_json)
            return
        jobs = plan(wanted, out, overwrite=overwrite)
    asked = [out / scenario.name / f"seed-{scenario.seed}" for scenario in wanted]
    carry_out(jobs, asked, workers, Printed(quiet=quiet, as_json=as_json, log_every=log_every, table=table))


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a command that runs says.

    Attributes:
        quiet: Print failures only.
        as_json: Print one JSON object in place of tables.
        log_every: Without a terminal a line every so many rounds; None: some 100 lines a run.
        table: A file for the comparison.
    """

    quiet: bool
    as_json: bool
    log_every: int | None
    table: Path | None


def load_ahead() -> None:
    """Let the processes of runs load what they need while this one still reads what to run."""
    fork_server.begin(["fedbd.running.jobs", "fedbd.running.engines"])


def carry_out(jobs: list[Job], asked: list[Path], workers: int | None, printed: Printed) -> None:
    """Carry out jobs under a live table, then compare runs.

    Args:
        jobs: What to do, twins first.
        asked: The folders to compare, the first one with all others; those that failed are left out.
        workers: Processor cores; None: all.
        printed: What is said meanwhile and at the end.

    Raises:
        Exit: With the status, if a run failed.
    """
    from rich.console import Console  # noqa: PLC0415

    from fedbd.records.environment import cores  # noqa: PLC0415
    from fedbd.report.console import LiveRuns  # noqa: PLC0415
    from fedbd.running.jobs import run_all  # noqa: PLC0415

    console = progress = terminal()
    if printed.as_json:
        progress = Console(stderr=True, force_interactive=False)  # standard output is for the object
    silent = printed.as_json and printed.quiet
    try:
        with LiveRuns(progress, quiet=printed.quiet, every=printed.log_every, silent=silent) as live:
            for job in jobs:
                live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
            failures = run_all(jobs, live, workers or cores())
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(f"interrupted; finished rounds are kept{_way_on(jobs, asked)}")
        raise typer.Exit(128 + getattr(error, "signal", signal.SIGINT)) from None
    failed = {failure.folder for failure in failures}
    done = [folder for folder in asked if folder not in failed]
    if printed.as_json:
        _print_runs(done, failures, printed.table)
    else:
        _compare(console, done, printed.quiet, printed.table)
    if failures:
        for failure in failures:
            say(f"{failure.folder}: {failure.reason}", fg="red")
        raise typer.Exit(2 if all(failure.mistake for failure in failures) else 1)


def _way_on(jobs: list[Job], asked: list[Path]) -> str:
    """Return the command that goes on with what was asked for and is not done; empty where there is none."""
    from fedbd.records.record import FINISHED, read_summary  # noqa: PLC0415

    wanted = [job for job in jobs if job.folder in asked and job.scenario.checkpoint is not None]
    left = [job.folder for job in wanted if (read_summary(job.folder) or {}).get("status") != FINISHED]
    places = list(map(str, left))
    if len(left) > LISTED:
        places = list(dict.fromkeys(re.sub(r"/seed-\d+$", "/seed-*", place) for place in places))
    return f"; go on with: fedbd resume {' '.join(places)}" if left else ""


def _estimate(scenarios: list[Scenario], workers: int | None, as_json: bool) -> None:
    """Print what runs will take."""
    import dataclasses  # noqa: PLC0415

    from fedbd.estimate import estimate  # noqa: PLC0415
    from fedbd.prepared import prepare  # noqa: PLC0415
    from fedbd.report.console import duration  # noqa: PLC0415
    from fedbd.report.estimate_text import estimate_text  # noqa: PLC0415

    found = [estimate(prepare(scenario), workers) for scenario in scenarios]
    total = sum(each.run_seconds for each in found)
    if as_json:
        print_json({"estimates": [dataclasses.asdict(each) for each in found], "run_seconds": total})
        return
    for each in found:
        typer.echo(estimate_text(each))
    if len(found) > 1:
        typer.echo(f"all, one after the other and each with a twin of its own: about {duration(total)}")


def _print_runs(folders: list[Path], failures: list[Failure], table: Path | None) -> None:
    from fedbd.report.arms import compare  # noqa: PLC0415
    from fedbd.report.comparison import comparison_rows, write_comparison  # noqa: PLC0415
    from fedbd.report.run_view import load_run, run_values  # noqa: PLC0415

    views = [load_run(folder) for folder in folders]
    arms = compare(views) if views else []
    lost = [{"folder": str(f.folder), "reason": f.reason, "mistake": f.mistake} for f in failures]
    runs = [run_values(folder, view) for folder, view in zip(folders, views, strict=True)]
    print_json({"runs": runs, "failures": lost, "comparison": comparison_rows(arms)})
    if table is not None and arms:
        write_comparison(table, arms)


def _compare(console: Console, folders: list[Path], quiet: bool, table: Path | None) -> None:
    from fedbd.report.arms import compare  # noqa: PLC0415
    from fedbd.report.comparison import render_comparison, write_comparison  # noqa: PLC0415
    from fedbd.report.run_view import load_run  # noqa: PLC0415

    if not folders:
        return
    arms = compare([load_run(folder) for folder in folders])
    if not quiet:
        console.print()
        render_comparison(console, arms)
        where = "folder" if len(folders) == 1 else "folders"
        console.print(f"Records, models and trigger pictures: {where} {', '.join(map(str, folders))}")
    if table is not None:
        write_comparison(table, arms)


def _without_twin(scenario: Scenario) -> Scenario:
    import dataclasses  # noqa: PLC0415

    return dataclasses.replace(scenario, evaluation=dataclasses.replace(scenario.evaluation, twin=False))
