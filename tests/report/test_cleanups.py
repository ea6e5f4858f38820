"""The table of cleanups by round, and of re-learning."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from rich.console import Console

from fedbd.report.cleanups import cleanup_rows, render_cleanups
from fedbd.report.run_view import RunView


def measures(ca: float, asr: float, collapsed: bool = False) -> dict[str, Any]:
    return {"clean_accuracy": ca, "attack_success": asr, "robust_accuracy": 0.0, "collapsed": collapsed}


def entry(ca: float, asr: float, **fields: Any) -> dict[str, Any]:
    base = {"mode": "if_stopped_now", "acted": True, "before": measures(0.9, 0.8), "after": measures(ca, asr)}
    return {**base, "twin_after": measures(0.85, 0.01), "seconds": 2.0, "notes": {}, **fields}


def view(**summary: Any) -> RunView:
    finder = {"mode": "if_stopped_now", "acted": True, "before": None, "after": None, "notes": {"target": 3}}
    refused = {"acted": False, "after": measures(0.9, 0.8), "notes": {"reason": "no channel qualifies"}}
    rounds = [
        {"round": 0, "cleanup": {}},
        {"round": 1, "cleanup": {}},
        {
            "round": 2,
            "attack_success_floor": 0.02,
            "cleanup": {"label": finder, "rnp": entry(0.88, 0.1), "linf": entry(0.7, 0.05)},
        },
        {"round": 4, "attack_success_floor": 0.03, "cleanup": {"rnp": {**entry(0.9, 0.8), **refused}}},
    ]
    scenario = {
        "cleanup": [{"name": "rnp"}, {"name": "linf_pruning", "label": "linf", "oracle": True, "knowledge": "real"}]
    }
    return RunView(arm="x", seed=1, scenario=scenario, rounds=rounds, summary={"relearning": None, **summary})


def shown(run: RunView, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_cleanups(console, run)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_are_one_per_method_and_round_with_the_unrepaired_model_first() -> None:
    rows = cleanup_rows(view())
    assert [(row["round"], row["method"]) for row in rows] == [
        (2, "none"),
        (2, "rnp"),
        (2, "linf"),
        (4, "none"),
        (4, "rnp"),
    ]
    assert (rows[0]["clean_accuracy"], rows[0]["attack_success"]) == (0.9, 0.8)
    assert rows[1]["twin_clean_accuracy"] == 0.85
    assert [row["oracle"] for row in rows] == [False, False, True, False, False]
    assert rows[4]["reason"] == "no channel qualifies"
    assert all(row["attack_success_floor"] is not None for row in rows)


def test_a_cleanup_that_gave_the_target_class_up_is_marked() -> None:
    run = view()
    for name, left in (("rnp", 0.3), ("linf", 0.5)):
        found = run.rounds[2]["cleanup"][name]
        found["before"] |= {"target_class_accuracy": 0.8}
        found["after"] |= {"target_class_accuracy": left}
    text = shown(run)
    assert "88.0‡ / 10.0" in text
    assert "70.0 / 5.0" in text
    assert "‡ gave the target class up" in text
    assert [row["gave_up_target"] for row in cleanup_rows(run)] == [False, True, False, False, False]


def test_the_table_has_methods_down_and_rounds_across() -> None:
    text = shown(view())
    line = {name: next(row for row in text.splitlines() if row.startswith(name)) for name in ("not rep", "rnp", "linf")}
    assert line["not rep"].split()[-6:] == ["90.0", "/", "80.0", "90.0", "/", "80.0"]
    assert "88.0 / 10.0" in line["rnp"]
    assert line["rnp"].rstrip().endswith("did not act")
    assert "linf †" in line["linf"]
    assert "† uses knowledge that no defender has (oracle)." in text
    assert "rnp did not act: no channel qualifies" in text
    assert "label" not in text


def test_many_rounds_go_into_tables_below_each_other() -> None:
    run = view()
    line = run.rounds[2]
    many = RunView(
        arm="x", seed=1, scenario={}, rounds=[{**line, "round": r} for r in range(1, 13)], summary={}, finished=True
    )
    text = shown(many)
    assert text.count("CA / ASR % after round") > 1
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("88.0 / 10.0") == 12


def test_relearning_is_shown_with_its_controls() -> None:
    after = {"1": measures(0.9, 0.4), "10": measures(0.9, 0.95)}
    found = {name: {"from_round": 4, "after": after} for name in ("rnp", "none", "twin")}
    text = shown(view(relearning=found))
    assert "attack-free twin (from round 4)" in text
    assert text.count("90.0 / 40.0") == 3
    assert text.index("1  ") < text.index("90.0 / 95.0")


def test_a_run_without_cleanups_has_no_table() -> None:
    run = RunView(arm="x", seed=1, scenario={}, rounds=[{"round": 1, "cleanup": {}}], summary={})
    assert shown(run) == ""


def test_an_oracle_in_the_loop_marks_all_that_come_after_it() -> None:
    run = view()
    plans = [{"name": "rnp"}, {"name": "linf_pruning", "label": "linf", "oracle": True, "mode": "in_loop"}]
    rows = cleanup_rows(dataclasses.replace(run, scenario={"cleanup": plans}))
    assert [row["oracle"] for row in rows if row["method"] != "none"] == [True, True, True]


def test_brackets_in_a_label_and_in_a_reason_are_printed() -> None:
    run = view(relearning={"rnp [a]": {"from_round": 4, "after": {"1": measures(0.9, 0.5)}}})
    refused = {"acted": False, "after": measures(0.9, 0.8), "notes": {"reason": "layer [fc] has no channel"}}
    last = {**run.rounds[-1], "cleanup": {"rnp [a]": {**entry(0.9, 0.8), **refused}}}
    text = shown(dataclasses.replace(run, rounds=[last]))
    assert text.count("rnp [a]") == 3  # the table, re-learning, the note
    assert "layer [fc] has no channel" in text


def test_a_repair_that_was_rolled_back_is_told_from_one_that_did_not_act() -> None:
    undone = {"acted": False, "notes": {"acted": True, "rolled_back": True, "validation_loss": 0.146}}
    line = {**view().rounds[-1], "cleanup": {"rnp": {**entry(0.9, 0.8), **undone}}}
    run = dataclasses.replace(view(), rounds=[line])
    text = shown(run)
    assert next(row for row in text.splitlines() if row.startswith("rnp")).rstrip().endswith("rolled back")
    assert "rnp was rolled back (round 4: -14.6 points on validation)" in text
    assert "did not act" not in text
    assert cleanup_rows(run)[1]["reason"] == "-14.6 points on validation"
