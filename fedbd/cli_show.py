"""The commands that start nothing: ``fedbd validate``, ``list``, ``show``, ``doctor``. ``fedbd.cli`` registers them.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbd.cli_arguments import Files, Settings, check_table, fits, load, raise_all, terminal
from fedbd.errors import Problem, UserError


def validate(
    scenarios: Files,
    settings: Settings = None,
    data: Annotated[bool, typer.Option(help="Also load the data and build the model.")] = True,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the resolved scenario.")] = False,
) -> None:
    """Check scenarios without running them; every problem at once."""
    from fedbd.run_text import scenario_text  # noqa: PLC0415

    errors: list[UserError] = []
    for path, scenario in load(scenarios, settings or [], errors):
        if fits(path, scenario, data, errors):
            typer.echo(scenario_text(scenario) if resolved else f"{path}: good")
    raise_all(errors)


def list_(
    kind: Annotated[str | None, typer.Argument(help="One kind only, e.g. cleanup.", show_default=False)] = None,
) -> None:
    """List the methods that a scenario can name."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from fedbd.catalog import entries  # noqa: PLC0415

    table = Table("kind", "name", "what it is", box=None, pad_edge=False, header_style="bold")
    for entry in entries(kind):
        table.add_row(entry.kind, entry.name, Text(entry.summary))  # Text: brackets in it are no markup
    terminal().print(table)


def show(
    what: Annotated[str, typer.Argument(help="A method's name, a scenario file, or a run's folder.")],
    table: Annotated[
        Path | None, typer.Option(help="Of a run: also write its cleanups by round to this .csv or .json file.")
    ] = None,
) -> None:
    """Show a method with its fields, a scenario resolved, or a finished run."""
    from fedbd.catalog import describe  # noqa: PLC0415
    from fedbd.run_text import scenario_text  # noqa: PLC0415
    from fedbd.scenario import load_scenario  # noqa: PLC0415

    check_table(table)
    path = Path(what)
    if table is not None and not path.is_dir():
        raise UserError([Problem(path="--table", expected="is for a run's folder", got=repr(what))])
    if path.is_dir():
        _show_run(path, table)
    elif path.suffix in (".yaml", ".yml"):
        typer.echo(scenario_text(load_scenario(path)))
    else:
        typer.echo(describe(what))


def _show_run(folder: Path, table: Path | None) -> None:
    from fedbd.report.arms import compare  # noqa: PLC0415
    from fedbd.report.cleanups import cleanup_rows, render_cleanups  # noqa: PLC0415
    from fedbd.report.comparison import render_comparison  # noqa: PLC0415
    from fedbd.report.curves import draw_curves  # noqa: PLC0415
    from fedbd.report.rows import write_rows  # noqa: PLC0415
    from fedbd.report.run_view import load_run  # noqa: PLC0415

    view = load_run(folder)
    render_comparison(terminal(), compare([view]))
    render_cleanups(terminal(), view)
    if table is not None:
        write_rows(table, cleanup_rows(view), empty=["round", "method"])
    draw_curves(folder / "curves.png", [view])
    typer.echo(f"Curves: {folder / 'curves.png'}")


def schema(
    central: Annotated[bool, typer.Option("--central", help="Of central trainings (fedbd train) instead.")] = False,
) -> None:
    """Print the JSON Schema of scenario files, with which editors complete and check them.

    A file whose first line is `# yaml-language-server: $schema=PATH` is checked against the schema at that path.
    """
    from fedbd.json_schema import schema_text  # noqa: PLC0415

    typer.echo(schema_text(central=central), nl=False)


def doctor() -> None:
    """Check this installation: versions, devices, the encrypted sum, the worker processes."""
    from fedbd.doctor import examine  # noqa: PLC0415

    checks = examine()
    for check in checks:
        mark = typer.style("ok  ", fg="green") if check.good else typer.style("BAD ", fg="red", bold=True)
        typer.echo(f"{mark} {check.name:<18} {check.found}")
        if not check.good:
            typer.echo(f"     {check.remedy}")
    if not all(check.good for check in checks):
        raise typer.Exit(1)
