from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from fedbd.central.repair import Repaired, Row
from fedbd.report.repair_table import render_repairs, repair_notes, write_repairs
from fedbd.types import Clues, Notes


def measures(clean: float, success: float | None, collapsed: bool = False, target: float = 0.75) -> Notes:
    return {
        "clean_accuracy": clean,
        "clean_accuracy_without_target": None if success is None else clean - 0.01,
        "target_class_accuracy": None if success is None else target,
        "attack_success": success,
        "robust_accuracy": None if success is None else 1 - success,
        "collapsed": collapsed,
    }


def row(method: str = "rnp", *, acted: bool = True, refused: bool = False, success: float | None = 0.021) -> Row:
    notes: Notes = {"acted": acted} if acted else {"acted": False, "reason": "no [mask] is low"}
    repaired = Repaired(model=nn.Identity(), clues=Clues(), notes=notes, seconds=12.34, acted=acted, refused=refused)
    start = None if success is None else 0.999
    return Row(
        method=method,
        oracle=False,
        repairs=True,
        repaired=repaired,
        before=measures(0.851, start),
        after=measures(0.842, success),
    )


def printed(rows: list[Row], width: int = 120, chain: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_repairs(console, rows, chain=chain)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers_are_percent_before_and_after() -> None:
    text = printed([row()])
    for part in ("rnp", "yes", "85.1 → 84.2", "83.2", "99.9 →   2.1", "97.9", "12.3"):
        assert part in text
    assert "floor" not in text
    assert "†" not in text


def test_what_a_method_found_is_said_below_the_table() -> None:
    label = row("rnp_label")
    label.repaired.notes.update({"target": 7, "target_share": 0.99, "declared": True})
    notes = repair_notes([row(), replace(label, repairs=False)])
    assert notes[0] == "rnp_label: target label 7, 99.0 % of the unlearned model's answers, a backdoor declared."


def test_without_a_trigger_there_is_accuracy_alone() -> None:
    text = printed([row(success=None)])
    assert "85.1 → 84.2" in text
    assert "ASR" not in text
    assert "RA %" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    twin = {"twin_before": measures(0.9, 0.01), "twin_after": measures(0.88, 0.034)}
    text = printed([replace(row("linf_pruning knowledge=real oracle=true"), **twin), replace(row(), **twin)], width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for part in ("85.1 → 84.2", "99.9 →   2.1", "3.4", "90.0 → 88.0", "97.9", "12.3", "knowledge=real"):
        assert part in text
    assert "…" not in text


def test_marks_have_notes() -> None:
    marked = [
        replace(row("known"), oracle=True),
        row("idle", acted=False),
        row("never", acted=False, refused=True),
        replace(row("label"), repairs=False),
        replace(row("gone"), after=measures(0.1, 0.0, collapsed=True)),
    ]
    text = printed(marked)
    for part in ("known †", "found", "refused", "10.0!"):
        assert part in text
    notes = repair_notes(marked)
    assert "idle did not act: no [mask] is low." in notes
    assert "never refused: no [mask] is low." in notes
    for start in ("found:", "! collapsed", "† uses knowledge"):
        assert [note for note in notes if note.startswith(start)]
    assert repair_notes([row()]) == []
    assert "+ idle" in printed(marked, chain=True)


def test_a_repair_that_gives_the_target_class_up_is_marked_and_its_success_is_not_praised() -> None:
    lost, kept = (replace(row(), after=measures(0.78, 0.0, target=left)) for left in (0.37, 0.38))
    assert (lost.gave_up_target, kept.gave_up_target, row(success=None).gave_up_target) == (True, False, False)
    text = printed([lost, kept])
    assert "75.0 → 37.0‡" in text
    assert "75.0 → 38.0 " in text
    assert [note for note in repair_notes([lost]) if note.startswith("‡ gave the target class up")]
    assert repair_notes([kept]) == []
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    render_repairs(console, [lost])
    assert "\x1b[32m  0.0" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_colors_are_those_of_a_run() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    render_repairs(console, [row(success=0.8), row("b", success=0.02)])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;31m 80.0" in text
    assert "\x1b[32m  2.0" in text


def test_files(tmp_path: Path) -> None:
    rows = [row(), row("idle", acted=False)]
    foreign = {"acted": np.bool_(True), "loss": np.float32("nan")}  # as a method of somebody else may note them
    rows[0].repaired.notes.update(foreign)
    write_repairs(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["method"] for line in found] == ["rnp", "idle"]
    assert float(found[0]["attack_success_after"]) == 0.021
    assert found[0]["attack_success_floor"] == ""
    write_repairs(tmp_path / "t.json", rows)
    entries = json.loads((tmp_path / "t.json").read_text())
    assert entries[0]["notes"] == {"acted": True, "loss": None}
    assert entries[1]["notes"] == {"acted": False, "reason": "no [mask] is low"}
    assert entries[0]["clean_accuracy_before"] == 0.851
