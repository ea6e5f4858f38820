"""What leaves fedbd for other tools: ``fedbd schema``, ``export``, ``cite``. ``main`` registers them.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbd.cli.arguments import names_and_paths, unwritable
from fedbd.errors import Problem, UserError

if TYPE_CHECKING:
    from fedbd.central.plan import CentralPlan
    from fedbd.config.scenario import Scenario

TABLES = (".csv", ".json", ".parquet")


def schema(
    central: Annotated[bool, typer.Option("--central", help="Of central trainings (fedbd train) instead.")] = False,
) -> None:
    """Print the JSON Schema of scenario files, with which editors complete and check them.

    A file whose first line is `# yaml-language-server: $schema=PATH` is checked against the schema at that path.
    """
    from fedbd.config.json_schema import schema_text  # noqa: PLC0415

    typer.echo(schema_text(central=central), nl=False)


def export(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR... [FILE]",
            help="Runs' folders, or folders that hold some; last the file: .csv, .json or .parquet.",
            show_default=False,
        ),
    ],
    scenario: Annotated[bool, typer.Option("--scenario", help="Add the scenario's fields as columns.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also, or instead, write TensorBoard events below this folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it is there already.")] = False,
) -> None:
    """Write the records of runs to one table, a row per round and run; pandas reads it.

    Nested names become columns with dots, such as cleanup.rnp.after.attack_success.
    """
    from fedbd.report.export import export_rows, run_folders, write_export, write_tensorboard  # noqa: PLC0415

    file = places[-1] if places[-1].suffix in TABLES and not places[-1].is_dir() else None
    folders = places if file is None else places[:-1]
    problems = _export_problems(places, folders, file, tensorboard)
    if file is not None and file.exists() and not overwrite:
        remedy = "pass --overwrite to replace it, or name another file"
        problems.append(Problem(path=str(file), expected="is there already", remedy=remedy))
    if problems:
        raise UserError(problems, "nothing was exported:")
    runs = run_folders(folders)
    if tensorboard is not None:
        written = write_tensorboard(tensorboard, runs)
        typer.echo(f"{len(written)} run{'s' if len(written) != 1 else ''}: tensorboard --logdir {tensorboard}")
    if file is not None:
        rows = export_rows(runs, scenario=scenario)
        write_export(file, rows)
        typer.echo(f"{file}: {len(rows)} rounds of {len(runs)} run{'s' if len(runs) != 1 else ''}")


def _export_problems(
    places: list[Path], folders: list[Path], file: Path | None, tensorboard: Path | None
) -> list[Problem]:
    problems = []
    if file is None and tensorboard is None:
        expected = f"must end with a file to write, named {', '.join(TABLES[:-1])} or {TABLES[-1]}"
        problems.append(Problem(path="FILE", expected=expected, got=repr(str(places[-1]))))
    if not folders:
        problems.append(Problem(path="RUN_DIR", expected="is required before the file"))
    problems += unwritable("FILE", file, TABLES)
    if tensorboard is not None and tensorboard.exists() and not tensorboard.is_dir():
        problems.append(Problem(path="--tensorboard", expected="must be a folder", got=str(tensorboard)))
    return problems


def cite(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Methods' names; files or folders of scenarios, runs and trainings (all that they use); or fedbd.",
            show_default=False,
            autocompletion=names_and_paths,
        ),
    ],
) -> None:
    """Print BibTeX entries: the papers of methods, of all that a scenario, run or training uses, and of fedbd."""
    from fedbd.cli.citations import cite as entries  # noqa: PLC0415

    wanted: list[str] = []
    for name in names:
        wanted += _used(Path(name)) if name.endswith((".yaml", ".yml")) or Path(name).is_dir() else [name]
    typer.echo(entries(wanted))


def _used(path: Path) -> list[str]:
    """Return the registered methods that a scenario, a run or a training uses, fedbd first."""
    from fedbd.central.plan import load_central  # noqa: PLC0415
    from fedbd.central.training import PLAN  # noqa: PLC0415
    from fedbd.config.file_kinds import is_central  # noqa: PLC0415
    from fedbd.config.scenario import load_scenario  # noqa: PLC0415
    from fedbd.config.scenario_file import read_yaml  # noqa: PLC0415
    from fedbd.records.record import SCENARIO  # noqa: PLC0415

    places = [path / SCENARIO, path / PLAN] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file() or place == path), None)
    if file is None:
        expected, remedy = "must be a run's or a training's folder", f"it holds neither {SCENARIO} nor {PLAN}"
        raise UserError([Problem(path=str(path), expected=expected, remedy=remedy)])
    return ["fedbd", *_methods_of(load_central(file) if is_central(read_yaml(file)) else load_scenario(file))]


def _methods_of(value: Scenario | CentralPlan | Any) -> list[str]:
    import dataclasses  # noqa: PLC0415

    from fedbd.config.plans import StrategyPlan  # noqa: PLC0415
    from fedbd.config.schema import Method  # noqa: PLC0415

    if isinstance(value, Method | StrategyPlan):
        return [] if ":" in value.name else [value.name]
    if isinstance(value, tuple):
        return [name for entry in value for name in _methods_of(entry)]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return []
    return [name for field in dataclasses.fields(value) for name in _methods_of(getattr(value, field.name))]
