"""Who failed in a run, and where its twin lies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fedbd.report.arms import compare
from fedbd.report.comparison import notes
from fedbd.report.run_facts import failures, render_facts, span_text
from fedbd.report.run_view import RunView
from fedbd.summary import summarize


def view(faults: list[dict[str, str]], **summary: Any) -> RunView:
    acted = {"4": {"train": "hang"}}
    lines = [
        {"round": n, "notes": {"faults": found, "simulated_faults": acted if "4" in found else {}} if found else {}}
        for n, found in enumerate(faults)
    ]
    return RunView(
        arm="x", seed=0, scenario={}, rounds=lines, summary={**summarize(lines, None, len(lines)), **summary}
    )


def shown(run: RunView, folder: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    render_facts(console, folder, run)
    return console.file.getvalue()  # type: ignore[attr-defined]


LATE, DIED = "no reply in time", "the client's process died"


def test_failures_are_named_by_client_kind_and_rounds(tmp_path: Path) -> None:
    run = view([{}, {"11": DIED, "4": LATE}, {"4": LATE}, {}, {"4": LATE}])
    assert failures(run) == {("4", "hang at train", LATE): [1, 2, 4], ("11", "", DIED): [1]}
    rows = [" ".join(row.split()) for row in shown(run, tmp_path).splitlines()]
    assert rows[1:] == [f"4 1..2, 4 hang at train {LATE}", f"11 1 no {DIED}"]
    assert "x: 4 failures of clients, see `fedbd show` on a run's folder." in notes(compare([run]))


def test_more_failures_than_a_screen_holds_are_counted(tmp_path: Path) -> None:
    text = shown(view([{}, {str(client): LATE for client in range(23)}]), tmp_path)
    assert "3 more: notes.faults in rounds.jsonl names them all." in text
    assert len(text.splitlines()) == 22


def test_the_twin_is_named_from_where_the_reader_is(tmp_path: Path) -> None:
    run, folder = view([{}, {}], twin="../../twins/ab12"), tmp_path / "runs/x/seed-0"
    assert shown(run, folder) == f"Attack-free twin: {tmp_path / 'runs/twins/ab12'} (not there any more)\n"
    (tmp_path / "runs/twins/ab12").mkdir(parents=True)
    assert shown(run, folder) == f"Attack-free twin: {tmp_path / 'runs/twins/ab12'}\n"
    assert shown(view([{}, {}]), folder) == ""
    assert not any("failures of clients" in note for note in notes(compare([run])))


def test_runs_of_numbers_are_drawn_together() -> None:
    assert [span_text(numbers) for numbers in ([3], [1, 2], [1, 3, 4, 5, 9])] == ["3", "1..2", "1, 3..5, 9"]
