from __future__ import annotations

from typing import Any

import pytest

from fedbd.report.found_text import found_text

SAID: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"acted": False, "reason": "no"}, ""),
    ({"target": None, "size": None, "pruned": None}, ""),
    (
        {"target": 0, "target_share": 0.984, "declared": True},
        "target label 0, 98.4 % of the unlearned model's answers, a backdoor declared",
    ),
    (
        {"target": 3, "target_share": 0.5, "declared": False},
        "target label 3, 50.0 % of the unlearned model's answers, no backdoor declared",
    ),
    (
        {
            "target": 3,
            "anomaly_index": 4.26,
            "size": 5.04,
            "size_share": 0.0788,
            "success": 1.0,
            "success_without": 0.0,
        },
        "target label 3, anomaly index 4.3; trigger of 5.0 pixels (7.9 % of the image), 100.0 % success (0.0 % without "
        "it)",
    ),
    (
        {"masked": "convolution", "channels": 112, "pruned": 7, "threshold": 0.35},
        "no BatchNorm: masks on the convolutions' output channels; 7 of 112 channels pruned at threshold 0.35",
    ),
    ({"masked": "batchnorm", "channels": 112, "pruned": 0, "threshold": None}, "0 of 112 channels pruned"),
    ({"masked": "convolution"}, ""),  # nothing was masked in the end: the reason says why
    ({"neurons": 64, "flipped": 9, "threshold": 0.0123}, "9 of 64 neurons flipped at threshold 0.0123"),
]


@pytest.mark.parametrize(("notes", "text"), SAID)
def test_a_sentence_of_what_the_notes_know(notes: dict[str, Any], text: str) -> None:
    assert found_text(notes) == text
