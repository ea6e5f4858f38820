"""What several commands take and how it is checked: scenario files, settings, tables, the console."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbd.errors import Problem, UserError
from fedbd.registry import either

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.config.scenario import Scenario

Files = Annotated[list[Path], typer.Argument(help="Scenario files (YAML).", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override a field, e.g. -s training.lr=0.05 (repeatable)."),
]

MOST_SEEDS = 1000
"""More runs of one scenario nobody waits for, and planning them would look like a hang."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; all else goes to standard error (docs/commands.md).")
]


def method_names(incomplete: str) -> list[str]:
    """Return the registered names that begin so, for shell completion."""
    from fedbd.registry import METHODS  # noqa: PLC0415

    return sorted({name for methods in METHODS.values() for name in methods if name.startswith(incomplete)})


def kind_names(incomplete: str) -> list[str]:
    """Return the kinds that begin so, for shell completion."""
    from fedbd.registry import METHODS  # noqa: PLC0415

    return [kind for kind in METHODS if kind.startswith(incomplete)]


def names_and_paths(incomplete: str) -> list[str]:
    """Return methods, scenario files and folders that begin so, for shell completion."""
    head = incomplete[: incomplete.rfind("/") + 1]
    try:
        entries = sorted(Path(head or ".").iterdir())
    except OSError:
        entries = []
    wanted = [entry for entry in entries if entry.is_dir() or entry.suffix in (".yaml", ".yml")]
    paths = [f"{head}{entry.name}{'/' if entry.is_dir() else ''}" for entry in wanted]
    return [*method_names(incomplete), *(path for path in paths if path.startswith(incomplete))]


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A safetensors file, a PyTorch state dict (alone or under 'state_dict'), or a run's or training's folder.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="YAML",
        help="Model family, e.g. wrn16-1 or '{name: cnn, width: 8}'; default: the data file's.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="YAML|FILE",
        help="Data: '{name: npz, file: a.npz}', or the scenario or central YAML file that the model was made with.",
    ),
]
TriggerWord = Annotated[
    str | None,
    typer.Option(
        "--trigger",
        metavar="YAML",
        help="Trigger to measure with, e.g. grid (with --target); default: the data file's.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="LABEL", help="Target label of the trigger, or all_to_all; default: the data file's."
    ),
]


PIPED = 160
"""Columns of what no terminal shows: at rich's 80 tables break names inside words."""


def terminal() -> Console:
    """Return the console of standard output; it redraws only where that is a terminal, whatever FORCE_COLOR says.

    Where it is none, lines have ``PIPED`` columns, or as many as COLUMNS says.
    """
    from rich.console import Console  # noqa: PLC0415

    able = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    wide = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return Console(force_interactive=able, width=PIPED if wide else None)


def say(text: str, **style: Any) -> None:
    """Print to standard error, in color only on a terminal and without NO_COLOR."""
    typer.echo(text if os.environ.get("NO_COLOR") else typer.style(text, **style), err=True)


def print_json(value: Any) -> None:
    """Print a value as strict JSON."""
    from fedbd.records.round_record import plain  # noqa: PLC0415

    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def problems_of(error: UserError) -> list[dict[str, Any]]:
    """Return a mistake's problems as JSON values."""
    return [{"of": error.heading, **dataclasses.asdict(problem)} for problem in error.problems]


@contextlib.contextmanager
def in_json(wanted: bool) -> Iterator[None]:
    """Print the problems of a mistake as JSON, where JSON is wanted; the mistake goes on to standard error."""
    try:
        yield
    except Mistakes as error:
        if wanted:
            print_json({"problems": [problem for each in error.errors for problem in problems_of(each)]})
        raise
    except UserError as error:
        if wanted:
            print_json({"problems": problems_of(error)})
        raise


class Mistakes(UserError):  # noqa: N818 - what several files got wrong
    """The mistakes of several files."""

    def __init__(self, errors: list[UserError]) -> None:
        """Keep them all; the message is one after the other."""
        super().__init__([problem for error in errors for problem in error.problems])
        self.errors = errors

    def __str__(self) -> str:
        """Return each error's message in its lines."""
        return "\n".join(map(str, self.errors))


TABLES = (".csv", ".json")
"""What a table can be written as."""


def unwritable(option: str, path: Path | None, endings: tuple[str, ...]) -> list[Problem]:
    """Return why a file that an option names could not be written: asked before minutes or hours are spent."""
    if path is None:
        return []
    if path.suffix not in endings:
        return [Problem(path=option, expected=f"must end in {either(endings)}", got=repr(str(path)))]
    if not path.resolve().parent.is_dir() or path.is_dir():
        remedy = "name a file in it" if path.is_dir() else f"make the folder first: mkdir -p {path.parent}"
        return [Problem(path=option, expected="must be a file in a folder that exists", got=str(path), remedy=remedy)]
    return []


def check_table(table: Path | None) -> None:
    """Refuse a table that could not be written."""
    problems = unwritable("--table", table, TABLES)
    if problems:
        raise UserError(problems)


def load(paths: list[Path], settings: list[str], errors: list[UserError]) -> list[tuple[Path, Scenario]]:
    """Return each file's scenario; what is wrong with the others is appended."""
    from fedbd.config.scenario import load_scenario  # noqa: PLC0415

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
    from fedbd.running.runs import strategy_problems  # noqa: PLC0415

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
    """Raise what was found wrong, if anything was."""
    if errors:
        raise Mistakes(errors)
