"""What inspect says of the stages of a training."""

from __future__ import annotations

from typing import Any

from fedbd.report.training_stages import stage_lines


def epoch(number: int, **fields: Any) -> dict[str, Any]:
    return {"epoch": number, "clean_accuracy": number / 10, "attack_success": 0.5, "collapsed": False, **fields}


def test_each_stage_ends_with_its_measures_and_the_isolation_with_its_quality() -> None:
    found = {"isolated": 62, "isolation_share": 0.05, "isolation_precision": 0.387, "isolation_recall": 0.192}
    lines = [epoch(1, stage="tuning"), epoch(2, stage="tuning", **found), epoch(3, stage="finetune")]
    assert stage_lines(lines) == [
        "tuning: epochs 1..2, then CA 20.0  ASR 50.0",
        "isolated after epoch 2: 62 images (5.0 %); precision 38.7 %, recall 19.2 % of the poisoned",
        "finetune: epochs 3..3, then CA 30.0  ASR 50.0",
    ]


def test_a_twin_has_nothing_poisoned() -> None:
    found = {"isolated": 6, "isolation_share": 0.05, "isolation_precision": 0.0, "isolation_recall": None}
    assert stage_lines([epoch(1, stage="tuning", **found)])[1].endswith("precision 0.0 %, nothing is poisoned")


def test_plain_training_has_no_stages() -> None:
    assert stage_lines([epoch(1), epoch(2)]) == []
