"""All-to-all, clean labels, covered batches and triggers with a pose of their own, through whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedbd.config.scenario import from_dict
from fedbd.records.record import read_rounds, same_records
from fedbd.running.runs import run

RAW: dict[str, Any] = {
    "name": "modes",
    "seed": 4,
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "trusted": {"size": 100},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 32, "lr": 0.05},
    "attacks": [
        {"name": "badnets", "label": "all", "clients": {"ids": [0]}, "target": "all_to_all", "trigger": "square"},
        {
            "name": "badnets",
            "label": "clean",
            "role": "polluted",
            "per": "dataset",
            "labels": "clean",
            "share": 0.5,
            "clients": {"ids": [1]},
            "target": 7,
            "trigger": {"name": "object_overlay", "seed": 3},
        },
        {
            "name": "badnets",
            "label": "warped",
            "share": 0.2,
            "cover": 2.0,
            "clients": {"ids": [2]},
            "target": 1,
            "trigger": {"name": "wanet", "s": 2.0},
        },
    ],
    "cleanup": [
        {"name": "rnp_label", "rounds": [2], "unlearn_epochs": 20},
        {"name": "linf_pruning", "rounds": [2], "knowledge": "inputs", "oracle": True, "count": 1},
    ],
    "detection": [
        {"name": "strip", "rounds": [2], "samples": 40},
        {"name": "abl_isolation", "where": "training", "rounds": [2]},
    ],
    "evaluation": {"relearn": [1]},
}


def test_every_mode_is_carried_out_measured_and_the_same_with_workers(tmp_path: Path) -> None:
    found = run(from_dict({**RAW, "engine": {"executor": "serial"}}), tmp_path / "serial")
    line = found.rounds[2]
    assert set(line["per_attack"]) == {"all", "clean", "warped"}
    assert line["per_attack"]["all"]["evaluated_samples"] == line["evaluated_samples"]
    assert line["per_attack"]["clean"]["evaluated_samples"] < line["evaluated_samples"]
    assert line["per_attack"]["all"]["clean_accuracy_without_target"] is None
    assert all(0 <= entry["attack_success_floor"] <= 1 for entry in line["per_attack"].values())
    clients = line["notes"]["clients"]
    assert clients["0"]["poisoned"] > 0
    assert clients["2"]["poisoned"] > 0
    assert "poisoned" not in clients["1"]
    assert line["detection"]["abl_isolation"]["positives"] > 0
    assert line["cleanup"]["rnp_label"]["notes"].keys() >= {"target"} or not line["cleanup"]["rnp_label"]["acted"]
    assert found.summary["relearning"] is not None
    with Image.open(found.path / "triggers.png") as picture:
        assert picture.size[0] > picture.size[1] / 2  # three triggers, two of them side by side
    workers = run(from_dict({**RAW, "engine": {"workers": 2}}), tmp_path / "workers")
    assert same_records(found.path, workers.path) == []
    (twin,) = (tmp_path / "serial" / "twins").iterdir()
    floor = read_rounds(twin)[2]["per_attack"]["all"]["attack_success"]
    assert line["per_attack"]["all"]["attack_success_floor"] == floor


def test_a_triggers_file_is_found_from_any_engines_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 200).save("pattern.png")
    attack = {**RAW["attacks"][0], "trigger": {"name": "blend", "file": "pattern.png"}}
    raw = {**RAW, "rounds": 1, "attacks": [attack], "cleanup": [], "detection": [], "evaluation": {"twin": False}}
    found = run(from_dict({**raw, "engine": {"workers": 2}}), tmp_path / "runs")
    assert found.rounds[1]["attack_success"] is not None
