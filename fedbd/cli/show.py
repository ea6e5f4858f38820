"""The commands that start nothing: ``fedbd validate``, ``list``, ``show``, ``doctor``. ``main`` registers them.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbd.cli.arguments import (
    AsJson,
    Files,
    Settings,
    check_table,
    fits,
    in_json,
    kind_names,
    load,
    names_and_paths,
    print_json,
    problems_of,
    raise_all,
    terminal,
)
from fedbd.cli.partition import refuse_idle, show_partition
from fedbd.errors import Problem, UserError

if TYPE_CHECKING:
    from fedbd.config.scenario import Scenario
    from fedbd.report.run_view import RunView


def validate(
    scenarios: Files,
    settings: Settings = None,
    data: Annotated[bool, typer.Option(help="Also load the data and build the model.")] = True,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the resolved scenario.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print what is wrong only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check scenarios without running them; every problem at once."""
    from fedbd.config.run_text import scenario_text  # noqa: PLC0415

    errors: list[UserError] = []
    reports = []
    for file in scenarios:
        own: list[UserError] = []
        for path, scenario in load([file], settings or [], own):
            if fits(path, scenario, data, own) and not as_json and not quiet:
                typer.echo(scenario_text(scenario) if resolved else f"{path}: good")
            reports.append({"file": str(file), **_verdict(own), **_resolved(scenario)})
        if own and (not reports or reports[-1]["file"] != str(file)):
            reports.append({"file": str(file), **_verdict(own), "scenario": None, "fingerprint": None})
        errors += [error for error in own if str(error) not in map(str, errors)]  # a wrong --set is wrong once
    if as_json:
        print_json({"scenarios": reports})
    raise_all(errors)


def _verdict(errors: list[UserError]) -> dict[str, Any]:
    return {"good": not errors, "problems": [problem for error in errors for problem in problems_of(error)]}


def _resolved(scenario: Scenario) -> dict[str, Any]:
    from fedbd.config.scenario import fingerprint, to_dict  # noqa: PLC0415

    return {"scenario": to_dict(scenario), "fingerprint": fingerprint(scenario)}


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="One kind only, e.g. cleanup.", show_default=False, autocompletion=kind_names),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the names only, one a line.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods that a scenario can name."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from fedbd.cli.catalog import entries  # noqa: PLC0415

    with in_json(as_json):
        found = entries(kind)
    if as_json:
        print_json({"methods": [dataclasses.asdict(entry) for entry in found]})
    elif quiet:
        typer.echo("\n".join(entry.name for entry in found))
    else:
        table = Table("kind", "name", "what it is", box=None, pad_edge=False, header_style="bold")
        for entry in found:
            table.add_row(entry.kind, entry.name, Text(entry.summary))  # Text: brackets in it are no markup
        terminal().print(table)


def show(
    what: Annotated[
        str,
        typer.Argument(help="A method's name, a scenario file, or a run's folder.", autocompletion=names_and_paths),
    ],
    table: Annotated[
        Path | None, typer.Option(help="Of a run: also write its cleanups by round to this .csv or .json file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Of a run: only write its files.")] = False,
    as_json: AsJson = False,
    partition: Annotated[
        bool, typer.Option("--partition", help="Of a scenario (or a run): draw and print who holds what.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The picture of --partition; default: beside the scenario.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Show a method with its fields, a scenario resolved, who holds what in it, or a run."""
    with in_json(as_json):
        check_table(table)
        path = Path(what)
        if partition:
            show_partition(path, out, settings or [], quiet, as_json)
            return
        refuse_idle(path, out, settings or [])
        if table is not None and not path.is_dir():
            raise UserError([Problem(path="--table", expected="is for a run's folder", got=repr(what))])
        if path.is_dir():
            _show_run(path, table, quiet, as_json)
        elif path.suffix in (".yaml", ".yml"):
            _show_scenario(path, settings or [], as_json)
        else:
            _show_method(what, as_json)


def _show_scenario(path: Path, settings: list[str], as_json: bool) -> None:
    from fedbd.config.run_text import scenario_text  # noqa: PLC0415
    from fedbd.config.scenario import load_scenario  # noqa: PLC0415

    scenario = load_scenario(path, settings)
    if as_json:
        print_json(_resolved(scenario))
    else:
        typer.echo(scenario_text(scenario))


def _show_method(name: str, as_json: bool) -> None:
    from fedbd.cli.catalog import describe, details  # noqa: PLC0415

    if as_json:
        print_json({"methods": details(name)})
    else:
        typer.echo(describe(name))


def _show_run(folder: Path, table: Path | None, quiet: bool, as_json: bool) -> None:
    from fedbd.report.arms import compare  # noqa: PLC0415
    from fedbd.report.cleanups import cleanup_rows, render_cleanups  # noqa: PLC0415
    from fedbd.report.comparison import render_comparison  # noqa: PLC0415
    from fedbd.report.curves import draw_curves  # noqa: PLC0415
    from fedbd.report.detection_table import render_pairs  # noqa: PLC0415
    from fedbd.report.rows import write_rows  # noqa: PLC0415
    from fedbd.report.run_facts import render_facts  # noqa: PLC0415
    from fedbd.report.run_view import load_run, run_values  # noqa: PLC0415

    view = load_run(folder)
    if table is not None:
        write_rows(table, cleanup_rows(view), empty=["round", "method"])
    if as_json:
        print_json({"run": run_values(folder, view)})
        return
    if not quiet:
        if view.finished:
            render_comparison(terminal(), compare([view]))
        render_cleanups(terminal(), view)
        render_pairs(terminal(), view.summary["detection"])
        render_facts(terminal(), folder, view)
    draw_curves(folder / "curves.png", [view])
    if not quiet:
        typer.echo(f"Curves: {folder / 'curves.png'}")
        _show_end(folder, view)


def _show_end(folder: Path, view: RunView) -> None:
    """Print what became of a run that has not finished."""
    from fedbd.records.record import FINISHED  # noqa: PLC0415
    from fedbd.records.run_lock import is_written  # noqa: PLC0415
    from fedbd.report.run_view import unfinished_text  # noqa: PLC0415

    status = view.summary.get("status")
    running = status is None and is_written(folder)  # one that is taken up again has none, either
    if status != FINISHED:
        typer.echo(unfinished_text(folder, view, running=running))


def doctor(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print what is wrong only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check this installation: versions, devices, the encrypted sum, a worker process."""
    from fedbd.cli.doctor import examine  # noqa: PLC0415

    checks = examine()
    good = all(check.good for check in checks)
    if as_json:
        print_json({"good": good, "checks": [dataclasses.asdict(check) for check in checks]})
    for check in checks if not as_json else []:
        mark = typer.style("ok  ", fg="green") if check.good else typer.style("BAD ", fg="red", bold=True)
        if not quiet or not check.good:
            typer.echo(f"{mark} {check.name:<18} {check.found}")
        if not check.good:
            typer.echo(f"     {check.remedy}")
    if not good:
        raise typer.Exit(1)
