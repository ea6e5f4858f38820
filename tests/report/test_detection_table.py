from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fedbd.records.record import round_record
from fedbd.report.detection_table import render_detectors, render_pairs, write_detectors
from fedbd.summary import summarize

LINE: dict[str, Any] = {
    "auc": 0.9126,
    "auc_shuffled": 0.497,
    "tpr_at_fpr_1": None,
    "tpr_at_fpr_5": 0.61,
    "precision": 0.8,
    "positives": 500,
    "negatives": 500,
    "seconds": 1.25,
    "notes": {},
}
PAIRS = {"clean_adversarial": 0.25, "clean_backdoor": 0.875, "adversarial_backdoor": None}
FGSM = {**PAIRS, "examples": 7, "success": 0.5, "notes": {}}


def printed(render: Any, lines: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    render(console, lines)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_detectors_figures_and_its_pairs() -> None:
    text = printed(render_detectors, {"strip": {**LINE, "adversarial": {"fgsm": FGSM}}})
    rows = [line.split() for line in text.splitlines()]
    assert ["strip", "0.913", "0.497", "-", "61.0", "1.2"] in rows
    assert ["strip,", "0.250", "0.875", "-", "7", "50.0"] in rows


def test_what_could_not_act_says_why() -> None:
    idle = {**LINE, "auc": None, "notes": {"acted": False, "reason": "no [taps]"}}
    lost = {**LINE, "adversarial": {"cw": {**dict.fromkeys(PAIRS), "examples": 0, "success": None, "reason": "so"}}}
    text = printed(render_detectors, {"lid": idle, "strip": lost})
    assert "lid: no [taps]." in text
    assert "strip, cw: so." in text


def test_without_triggered_inputs_there_is_no_table() -> None:
    assert printed(render_detectors, {"strip": {**LINE, "positives": 0}}) == ""
    assert printed(render_pairs, {"strip": LINE}) == ""


def test_the_summary_of_a_run_has_the_pairs_means_and_show_prints_them() -> None:
    other = {**FGSM, "clean_adversarial": 0.75, "examples": 9}
    lines = [
        round_record(round=n, clean_accuracy=0.9, detection={"strip": {**LINE, "adversarial": {"fgsm": entry}}})
        for n, entry in ((1, FGSM), (2, other))
    ]
    lines.append(round_record(round=3, clean_accuracy=0.9, detection={"lid": LINE}))
    found = summarize(lines, (1, 3), 3)["detection"]
    assert found["strip"]["adversarial"]["fgsm"] == {**PAIRS, "clean_adversarial": 0.5, "examples": 8, "success": 0.5}
    assert found["strip"]["auc"] == 0.9126
    assert "adversarial" not in found["lid"]
    assert ["strip,", "0.500", "0.875", "-", "8", "50.0"] in [
        x.split() for x in printed(render_pairs, found).splitlines()
    ]


def test_rows_of_a_file_have_all_columns(tmp_path: Path) -> None:
    write_detectors(tmp_path / "t.csv", {"strip": {**LINE, "adversarial": {"fgsm": FGSM}}, "lid": LINE})
    first, second = csv.DictReader((tmp_path / "t.csv").open())
    assert (first["method"], first["auc"], first["fgsm.clean_backdoor"]) == ("strip", "0.9126", "0.875")
    assert (second["method"], second["fgsm.clean_backdoor"], second["tpr_at_fpr_1"]) == ("lid", "", "")
