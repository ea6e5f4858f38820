"""Repairs of one model as a table on the terminal and as a file: what each method did to accuracy and backdoor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.report.console import percent, success_style
from fedbd.report.found_text import found_text
from fedbd.report.rows import write_rows

if TYPE_CHECKING:
    from fedbd.central.repair import Row

Cell = Callable[["Row"], Text]
Notes = Mapping[str, Any]
WITHOUT = "clean_accuracy_without_target"
TARGET = "target_class_accuracy"
GAVE_UP = "‡ gave the target class up (less than half of its accuracy is left): a low ASR follows from that alone."


def render_repairs(console: Console, rows: Sequence[Row], *, chain: bool = False) -> None:
    """Print a table of repairs, in as many parts as the console's width asks for, and the notes that it needs.

    Args:
        console: Where to print.
        rows: At least one.
        chain: Whether each method started from what the one before it left.
    """
    columns: list[tuple[str, Cell]] = [("acted", _acted), ("CA %", _clean)]
    attacked = rows[0].before["attack_success"] is not None
    if attacked:
        columns.append(("CA % without\ntarget class", lambda row: Text(percent(row.after[WITHOUT]))))
        columns.append(("target\nclass %", _target_class))
        columns.append(("ASR %", _success))
    if rows[0].twin_after is not None:
        if attacked:
            columns.append(("floor %", lambda row: Text(percent(row.floor))))
        columns.append(("CA % of\nthe twin", _twin))
    if attacked:
        columns.append(("RA %", lambda row: Text(percent(row.after["robust_accuracy"]))))
    columns.append(("s", lambda row: Text(f"{row.repaired.seconds:.1f}")))
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and _fits(console, _table(rows, columns[start : end + 1], chain)):
            end += 1
        console.print(_table(rows, columns[start:end], chain))
        start = end
    for note in repair_notes(rows, chain=chain):
        console.print(note, style="dim", markup=False, highlight=False)


def _fits(console: Console, table: Table) -> bool:
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, Cell]], chain: bool) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", max_width=24)  # long names give way, numbers never do
    for title, _ in columns:
        table.add_column(title, no_wrap=True, vertical="top")
    for number, row in enumerate(rows):
        name = Text(("+ " if chain and number else "") + row.method).append(" †" if row.oracle else "", "bold yellow")
        table.add_row(name, *(cell(row) for _, cell in columns))
    return table


def _acted(row: Row) -> Text:
    if row.repaired.acted:
        return Text("yes") if row.repairs else Text("found", "cyan")
    return Text("refused" if row.repaired.refused else "no", "yellow")


def _clean(row: Row) -> Text:
    text = _pair(row.before["clean_accuracy"], row.after["clean_accuracy"])
    return text.append("!", "bold magenta") if row.after["collapsed"] else text


def _target_class(row: Row) -> Text:
    text = _pair(row.before[TARGET], row.after[TARGET])
    return text.append("‡", "bold magenta") if row.gave_up_target else text


def _pair(before: float | None, after: float | None) -> Text:
    return Text(f"{percent(before)} → {percent(after)}")


def _success(row: Row) -> Text:
    before, after = row.before, row.after
    text = Text().append(f"{percent(before['attack_success']):>5}", success_style(before["attack_success"]))
    style = success_style(after["attack_success"], row.floor, after["collapsed"] or row.gave_up_target)
    return text.append(" → ").append(f"{percent(after['attack_success']):>5}", style)


def _twin(row: Row) -> Text:
    if row.twin_before is None or row.twin_after is None:
        return Text("-")
    text = _pair(row.twin_before["clean_accuracy"], row.twin_after["clean_accuracy"])
    return text.append("!", "bold magenta") if row.twin_after["collapsed"] else text


def repair_notes(rows: Sequence[Row], *, chain: bool = False) -> list[str]:
    """Return what each method found, and the notes that the marks in a table need, one sentence each."""
    notes = []
    for row in rows:
        found = found_text(row.repaired.notes)
        notes += [f"{row.method}: {found}."] if found else []
        if not row.repaired.acted:
            reason = row.repaired.notes.get("reason") or "it gave no reason"
            notes.append(f"{row.method} {'refused' if row.repaired.refused else 'did not act'}: {reason}.")
    if chain and len(rows) > 1:
        notes.append("Each method starts from the model and the clues that the one above it left.")
    if any(not row.repairs for row in rows):
        notes.append("found: the method repairs nothing, it finds clues for the next one (--chain).")
    if any(_collapsed(row) for row in rows):
        notes.append("! collapsed: its ASR says nothing.")
    if any(row.gave_up_target for row in rows):
        notes.append(GAVE_UP)
    if any(row.oracle for row in rows):
        notes.append("† uses knowledge that no defender has (oracle).")
    if rows[0].twin_after is not None:
        notes.append("floor: what the trigger gets from the attack-free twin after the same method; - if it collapsed.")
    return notes


def _collapsed(row: Row) -> bool:
    return any(measures is not None and bool(measures["collapsed"]) for measures in (row.after, row.twin_after))


def write_repairs(path: str | Path, rows: Sequence[Row]) -> None:
    """Write ``Row.flat`` of each row to a ``.csv`` (an absent value is empty) or, for any other name, as JSON.

    JSON has the methods' notes, too.
    """
    notes = Path(path).suffix != ".csv"
    flat = [{**row.flat(), **({"notes": row.repaired.notes} if notes else {})} for row in rows]
    write_rows(path, flat, empty=["method"])
