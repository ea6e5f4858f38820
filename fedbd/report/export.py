"""The records of runs as one flat table, for pandas, spreadsheets and TensorBoard; only the last needs torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbd.errors import Problem, UserError
from fedbd.records.record import ROUNDS, SCENARIO
from fedbd.report.rows import write_rows
from fedbd.report.run_view import RunView, load_run

Row = dict[str, Any]

FIRST = ("run", "name", "seed", "finished", "round")
"""The columns that every table begins with; ``run`` is the run's folder."""

SHARED = ("twins", "warm-ups")
"""Folders of what runs share."""


def run_folders(places: Sequence[Path]) -> list[Path]:
    """Return the run folders that places name: a run's own, or all runs below a folder but for what they share.

    Raises:
        UserError: With every place that holds no run.
    """
    found: list[Path] = []
    problems = []
    for place in places:
        below = [path.parent for path in sorted(place.rglob(ROUNDS)) if path.parent.parent.name not in SHARED]
        runs = [place] if (place / ROUNDS).is_file() else [path for path in below if (path / SCENARIO).is_file()]
        if not runs:
            problems.append(Problem(path=str(place), expected="must be a run's folder, or hold such folders"))
        found += runs
    if problems:
        raise UserError(problems, "nothing was exported:")
    return list(dict.fromkeys(found))


def export_rows(folders: Sequence[Path], *, scenario: bool = False) -> list[Row]:
    """Return one row per round and run, all with the same columns in the same order.

    Args:
        folders: Run folders.
        scenario: Add the resolved scenario's fields, as ``scenario.training.lr``.

    Returns:
        Rows of numbers, texts, booleans and None. Nested names are joined by dots, as in
        ``cleanup.rnp.after.attack_success``; lists, and a round's own notes, are compact JSON texts.
    """
    rows = [row for folder in folders for row in _rows(folder, load_run(folder), scenario)]
    names = list(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
    groups = {name[:dot] for name in names for dot, letter in enumerate(name) if letter == "."}
    filled = {name for row in rows for name, value in row.items() if value is not None}
    # A group that one round lacks is null there: no column of its own.
    names = [name for name in names if name in filled or name not in groups]
    return [{name: row.get(name) for name in names} for row in rows]


def _rows(folder: Path, view: RunView, scenario: bool) -> Iterator[Row]:
    of_run = {"run": str(folder), "name": view.arm, "seed": view.seed, "finished": view.finished}
    more = dict(_flat(view.scenario, "scenario.")) if scenario else {}
    for line in view.rounds:
        yield {**of_run, **dict(_flat(line, "")), **more}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        place = f"{prefix}{name}"
        if isinstance(value, Mapping) and place != "notes":
            yield from _flat(value, f"{place}.")
        elif isinstance(value, Mapping | list):
            yield place, json.dumps(value, separators=(",", ":"))
        else:
            yield place, value


def write_export(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a ``.csv``, ``.json`` or ``.parquet`` file.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        if path.suffix == ".parquet":
            _write_parquet(path, rows)
        else:
            write_rows(path, rows, empty=FIRST)
    except OSError as error:
        problem = Problem(path=str(path), expected="must be a file that can be written", got=str(error))
        raise UserError([problem]) from None


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    names = list(rows[0]) if rows else list(FIRST)
    pq.write_table(pa.table({name: _column([row[name] for row in rows]) for name in names}), path)


def _column(values: list[Any]) -> list[Any]:
    """Return a column of one type: where a name holds numbers in one run and texts in another, texts."""
    kinds = {_kind(value) for value in values if value is not None}
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def _kind(value: Any) -> str:
    return "flag" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"


def write_tensorboard(folder: Path, folders: Sequence[Path]) -> list[Path]:
    """Write the numbers of each round as TensorBoard scalars, one event folder per run.

    Args:
        folder: TensorBoard's ``--logdir``; each run goes to ``folder/NAME/seed-SEED``.
        folders: Run folders.

    Returns:
        The event folders.

    Raises:
        UserError: If TensorBoard is not installed, or two runs would go to one folder.
    """
    writer = _summary_writer()
    places: dict[Path, Path] = {}
    for run in folders:
        view = load_run(run)
        place = folder / view.arm / f"seed-{view.seed}"
        if place in places:
            problem = Problem(
                path=str(run), expected="must differ from the others in name or seed", got=str(places[place])
            )
            raise UserError([problem])
        places[place] = run
        with writer(str(place)) as events:
            for row in _rows(run, view, False):
                for name, value in row.items():
                    if name not in FIRST and isinstance(value, int | float):
                        events.add_scalar(name.replace(".", "/"), float(value), row["round"])
    return list(places)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - it needs the extra, and takes seconds
    except ImportError as error:
        remedy = "pip install 'fedbd[tensorboard]', or export to a .csv, .json or .parquet file"
        expected = f"needs TensorBoard, which is not here ({error})"
        raise UserError([Problem(path="--tensorboard", expected=expected, remedy=remedy)]) from None
    return SummaryWriter
