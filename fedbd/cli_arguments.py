"""What several commands take and how it is checked: scenario files, settings, tables, the console."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbd.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.scenario import Scenario

Files = Annotated[list[Path], typer.Argument(help="Scenario files (YAML).", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override a field, e.g. -s training.lr=0.05 (repeatable)."),
]


def terminal() -> Console:
    """Return the console of standard output."""
    from rich.console import Console  # noqa: PLC0415

    return Console()


def check_table(table: Path | None) -> None:
    """Refuse a table that could not be written, before hours are spent."""
    if table is None:
        return
    if table.suffix not in (".csv", ".json"):
        raise UserError([Problem(path="--table", expected="must end in .csv or .json", got=repr(str(table)))])
    if not table.resolve().parent.is_dir() or table.is_dir():
        raise UserError([Problem(path="--table", expected="must be a file in a folder that exists", got=str(table))])


def load(paths: list[Path], settings: list[str], errors: list[UserError]) -> list[tuple[Path, Scenario]]:
    """Return each file's scenario; what is wrong with the others is appended."""
    from fedbd.scenario import load_scenario  # noqa: PLC0415

    loaded: list[tuple[Path, Scenario]] = []
    for path in paths:
        try:
            loaded.append((path, load_scenario(path, settings)))
        except UserError as error:
            if str(error) not in map(str, errors):  # a --set that is no setting is wrong once, not once per file
                errors.append(error)
    return loaded


def fits(path: Path, scenario: Scenario, data: bool, errors: list[UserError]) -> bool:
    """Return whether what only Flower, the data and the model can tell of a scenario is well; append what is not."""
    from fedbd.prepared import prepare  # noqa: PLC0415
    from fedbd.runs import strategy_problems  # noqa: PLC0415

    try:
        wrong = strategy_problems(scenario)
        if wrong:
            raise UserError(wrong, f"{path} is not a scenario that can run:")
        if data:
            prepare(scenario)
    except UserError as error:
        errors.append(error)
        return False
    return True


def raise_all(errors: list[UserError]) -> None:
    """Raise the last error after printing those before it."""
    for error in errors[:-1]:
        typer.secho(str(error), fg="red", err=True)
    if errors:
        raise errors[-1]
