"""``fedbd resume``: going on with runs that were ended. ``main`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbd.cli.arguments import AsJson, Quiet, check_table, in_json
from fedbd.cli.run import LogEvery, Printed, Table, carry_out, load_ahead


def resume(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN_DIR...", show_default=False)],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processor cores to use; default: as each run began with.")
    ] = None,
    other_code: Annotated[
        bool, typer.Option("--other-code", help="Go on although fedbd, flwr, torch or NumPy have changed since.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_every: LogEvery = None,
    table: Table = None,
) -> None:
    """Finish runs that were killed, interrupted or failed, from their last checkpoints; records are the same.

    Missing attack-free twins are run, too. A run that has finished is only compared.
    """
    load_ahead()
    from fedbd.running.resuming import plan_resumption  # noqa: PLC0415

    with in_json(as_json):
        check_table(table)
        plan = plan_resumption(folders, workers=workers, other_code=other_code)
    if not quiet:
        for folder in plan.finished:
            typer.echo(f"{folder}: has finished already", err=as_json)
        for folder, where in plan.notes.items():
            typer.echo(f"{folder}: goes on {where}", err=as_json)
    printed = Printed(quiet=quiet, as_json=as_json, log_every=log_every, table=table)
    carry_out(plan.jobs, plan.asked, workers, printed)
