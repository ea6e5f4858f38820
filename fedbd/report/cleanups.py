"""Every cleanup in every round, and how soon the backdoor came back: one table per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.report.console import percent, success_style
from fedbd.report.repair_table import GAVE_UP
from fedbd.report.run_view import RunView, is_oracle
from fedbd.summary import gave_up_target, was_rolled_back

Row = dict[str, Any]
CONTROLS = {"none": "not repaired", "twin": "attack-free twin"}


def cleanup_rows(run: RunView) -> list[Row]:
    """Return one flat row per cleanup and round in which it ran, and the same for the model that nothing repaired.

    Names: ``round``, ``method``, ``mode``, ``oracle``, ``acted``, ``clean_accuracy``, ``attack_success``,
    ``attack_success_floor``, ``twin_clean_accuracy`` and ``twin_attack_success`` (the same cleanup on the attack-free
    twin), ``clean_accuracy_without_target``, ``target_class_accuracy``, ``gave_up_target``, ``collapsed``, ``seconds``,
    ``reason`` (why it did not act, or was rolled back), ``rolled_back``. Shares are fractions of 1; what was not
    measured is None. Methods that only find clues are left out.
    """
    oracles = _oracles(run.scenario)
    rows = []
    for line in run.rounds:
        entries = {name: entry for name, entry in (line.get("cleanup") or {}).items() if entry.get("after")}
        if not entries:
            continue
        floor = line.get("attack_success_floor")
        unrepaired = next(iter(entries.values()))["before"]
        rows.append(_row(line["round"], "none", {"after": unrepaired}, floor, False))
        rows += [_row(line["round"], name, entry, floor, name in oracles) for name, entry in entries.items()]
    return rows


def _row(round_: int, method: str, entry: Mapping[str, Any], floor: float | None, oracle: bool) -> Row:
    after, twin = entry.get("after") or {}, entry.get("twin_after") or {}
    return {
        "round": round_,
        "method": method,
        "mode": entry.get("mode"),
        "oracle": oracle,
        "acted": entry.get("acted"),
        "clean_accuracy": after.get("clean_accuracy"),
        "attack_success": after.get("attack_success"),
        "attack_success_floor": floor,
        "twin_clean_accuracy": twin.get("clean_accuracy"),
        "twin_attack_success": twin.get("attack_success"),
        "clean_accuracy_without_target": after.get("clean_accuracy_without_target"),
        "target_class_accuracy": after.get("target_class_accuracy"),
        "gave_up_target": gave_up_target(entry.get("before"), after),
        "collapsed": after.get("collapsed"),
        "seconds": entry.get("seconds"),
        "reason": _reason(entry),
        "rolled_back": was_rolled_back(entry),
    }


def _reason(entry: Mapping[str, Any]) -> str | None:
    notes = entry.get("notes") or {}
    if not was_rolled_back(entry):
        return notes.get("reason")
    return f"{-100 * notes['validation_loss']:+.1f} points on validation"


def _oracles(scenario: Mapping[str, Any]) -> set[str]:
    """Return the cleanups with knowledge that no defender has; one in the loop passes it on with the model to all."""
    plans = scenario.get("cleanup") or ()
    every = any(is_oracle(plan) and plan.get("mode") == "in_loop" for plan in plans)
    return {str(plan.get("label") or plan.get("name")) for plan in plans if every or is_oracle(plan)}


def render_cleanups(console: Console, run: RunView) -> None:
    """Print a run's cleanups: methods down, rounds across, CA / ASR in the cells; below it the re-learning test."""
    rows = cleanup_rows(run)
    if not rows:
        return
    rounds = sorted({row["round"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["round"]): row for row in rows}
    width = max(1, (console.width - 24) // 15)
    for start in range(0, len(rounds), width):
        shown = rounds[start : start + width]
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column("CA / ASR % after round")
        for round_ in shown:
            table.add_column(str(round_), justify="right", no_wrap=True)
        for method in methods:
            table.add_row(Text(_title(method, rows)), *(_cell(cells.get((method, round_))) for round_ in shown))
        floors = [cells["none", round_]["attack_success_floor"] for round_ in shown]
        table.add_row(Text("floor of the ASR", "dim"), *(Text(percent(floor), "dim") for floor in floors))
        console.print(table)
    _render_relearning(console, run.summary.get("relearning"))
    for note in _notes(rows):
        console.print(note, style="dim", markup=False)


def _title(method: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["method"] == method]
    mark = " †" if own[0]["oracle"] else ""
    return CONTROLS.get(method, f"{method}{mark}{' (in the loop)' if own[0]['mode'] == 'in_loop' else ''}")


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text("-", "dim")
    if row["acted"] is False:
        return Text("rolled back" if row["rolled_back"] else "did not act", "yellow")
    text = Text(percent(row["clean_accuracy"]))
    marks = ("!" if row["collapsed"] else "") + ("‡" if row["gave_up_target"] else "")
    text.append(marks, "bold magenta").append(" / ")
    style = success_style(row["attack_success"], row["attack_success_floor"], bool(marks))
    return text.append(percent(row["attack_success"]), style)


def _render_relearning(console: Console, found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    steps = sorted({int(step) for entry in found.values() for step in entry["after"]})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("re-learning: CA / ASR % after further attacked rounds")
    for step in steps:
        table.add_column(str(step), justify="right", no_wrap=True)
    for name, entry in found.items():
        cells = [_relearned(entry["after"].get(str(step)) or {}) for step in steps]
        table.add_row(Text(f"{CONTROLS.get(name, name)} (from round {entry['from_round']})"), *cells)
    console.print()
    console.print(table)


def _relearned(entry: Mapping[str, Any]) -> Text:
    text = Text(percent(entry.get("clean_accuracy"))).append(" / ")
    success = entry.get("attack_success")
    return text.append(percent(success), success_style(success, None, entry.get("collapsed")))


def _notes(rows: Sequence[Row]) -> list[str]:
    found = []
    idle = [row for row in rows if row["acted"] is False and row["reason"]]
    reasons = {row["method"]: row["reason"] for row in idle if not row["rolled_back"]}
    found += [f"{method} did not act: {reason}" for method, reason in reasons.items()]
    undone = [row for row in idle if row["rolled_back"]]
    for method in dict.fromkeys(row["method"] for row in undone):
        rounds = [f"round {row['round']}: {row['reason']}" for row in undone if row["method"] == method]
        found.append(f"{method} was rolled back ({'; '.join(rounds)})")
    if any(row["oracle"] for row in rows):
        found.append("† uses knowledge that no defender has (oracle).")
    if any(row["gave_up_target"] for row in rows):
        found.append(GAVE_UP)
    if any(row["collapsed"] for row in rows):
        found.append("! collapsed: its ASR says nothing.")
    return found
