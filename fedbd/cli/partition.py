"""What ``fedbd show --partition`` does: who holds what, as a table and a picture."""

from __future__ import annotations

from pathlib import Path

import typer

from fedbd.cli.arguments import print_json, terminal, unwritable
from fedbd.errors import Problem, UserError

SUFFIXES = (".png", ".svg", ".pdf")


def show_partition(path: Path, out: Path | None, settings: list[str], quiet: bool, as_json: bool) -> None:
    """Print and draw who holds what.

    Args:
        path: A scenario file or a run's folder.
        out: The picture; None: beside the scenario.
        settings: Overrides of the scenario.
        quiet: Only draw.
        as_json: Print the counts for a script.

    Raises:
        UserError: If there is no such scenario, its data cannot be split so, or the picture cannot be written.
    """
    from fedbd.config.scenario import load_scenario  # noqa: PLC0415
    from fedbd.prepared import federate  # noqa: PLC0415
    from fedbd.records.record import SCENARIO  # noqa: PLC0415
    from fedbd.report.partition_picture import draw_partition  # noqa: PLC0415
    from fedbd.report.partition_view import partition_view, plain_view, render_partition  # noqa: PLC0415
    from fedbd.report.run_view import refuse_no_run  # noqa: PLC0415

    if path.is_dir():
        refuse_no_run(path)
    file = path / SCENARIO if path.is_dir() else path
    picture = file.with_suffix(".partition.png") if out is None else out
    _check(file, picture, str(path))
    scenario = load_scenario(file, settings)
    view = partition_view(scenario, federate(scenario))
    if not quiet and not as_json:
        render_partition(terminal(), view)
    try:
        draw_partition(picture, view)
    except OSError as error:
        expected, remedy = f"cannot be written: {error.strerror or error}", "name another file with --out"
        raise UserError([Problem(path=str(picture), expected=expected, remedy=remedy)]) from None
    if as_json:
        print_json({**plain_view(view), "picture": str(picture)})
    elif not quiet:
        typer.echo(f"Picture: {picture}")


def _check(file: Path, picture: Path, what: str) -> None:
    """Refuse what is no scenario, and a picture that could not be written."""
    problems = []
    if file.suffix not in (".yaml", ".yml"):
        expected = "is for a scenario file or a run's folder"
        problems.append(Problem(path="--partition", expected=expected, got=repr(what)))
    else:
        problems = unwritable("--out", picture, SUFFIXES)
    if problems:
        raise UserError(problems)


def refuse_idle(path: Path, out: Path | None, settings: list[str]) -> None:
    """Refuse options of ``fedbd show`` that would do nothing without ``--partition``."""
    problems = []
    if out is not None:
        problems.append(Problem(path="--out", expected="is for the picture of --partition", got=repr(str(out))))
    if settings and path.suffix not in (".yaml", ".yml"):
        problems.append(Problem(path="--set", expected="is for a scenario file", got=repr(str(path))))
    if problems:
        raise UserError(problems)
