"""Detectors over clients' own training data, through a whole run: noted by polluted clients, pooled by the recorder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbd.config.scenario import from_dict
from fedbd.flower.app_loader import load_component
from fedbd.records.record import read_rounds, same_records
from fedbd.running.engines import flower_app_dir
from fedbd.running.runs import run

false_alarms: Any = load_component(flower_app_dir(), "server", "detecting", "false_alarms")
RAW: dict[str, Any] = {
    "name": "training-detection",
    "seed": 3,
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 32, "lr": 0.05},
    "attacks": [
        {
            "name": "badnets",
            "role": "polluted",
            "per": "dataset",
            "share": 0.1,
            "clients": {"ids": [0, 1]},
            "target": 0,
            "trigger": {"name": "grid"},
        }
    ],
    "detection": [{"name": "abl_isolation", "where": "training", "rounds": [2]}],
    "engine": {"executor": "serial"},
}


def test_polluted_clients_data_are_searched_and_the_twin_has_none(tmp_path: Path) -> None:
    found = run(from_dict(RAW), tmp_path)
    assert found.rounds[1]["detection"] == {}
    line = found.rounds[2]["detection"]["abl_isolation"]
    clients = line["notes"]["clients"]
    assert line["where"] == "training"
    assert set(clients) == {"0", "1"}
    assert line["positives"] == sum(entry["positives"] for entry in clients.values()) > 0
    assert line["auc"] == pytest.approx((clients["0"]["auc"] + clients["1"]["auc"]) / 2)
    assert not any("seconds" in entry for entry in clients.values())
    assert all("detection" not in notes for notes in found.rounds[2]["notes"]["clients"].values())
    (twin,) = (tmp_path / "twins").iterdir()
    quiet = read_rounds(twin)[2]["detection"]["abl_isolation"]
    assert (quiet["auc"], quiet["positives"], quiet["negatives"]) == (None, None, None)


def test_workers_find_the_same(tmp_path: Path) -> None:
    alone = {**RAW, "evaluation": {"twin": False}}
    one = run(from_dict(alone), tmp_path / "one")
    two = run(from_dict({**alone, "engine": {"workers": 2}}), tmp_path / "two")
    assert same_records(one.path, two.path) == []


def test_honest_clients_tell_how_often_a_detector_is_wrong_where_there_is_nothing(tmp_path: Path) -> None:
    asked = {**RAW, "detection": [{**RAW["detection"][0], "honest": True}]}
    plain = run(from_dict({**RAW, "evaluation": {"twin": False}}), tmp_path / "plain").rounds[2]
    line = run(from_dict(asked), tmp_path / "asked").rounds[2]
    found = line["detection"]["abl_isolation"]
    clients = found["notes"]["clients"]
    assert set(clients) == {"0", "1", "2", "3"}
    assert [clients[name]["polluted"] for name in "0123"] == [True, True, False, False]
    assert "clean_scores" not in clients["2"]
    assert (clients["2"]["positives"], clients["2"]["auc"]) == (0, None)
    for name in ("auc", "positives", "negatives", "precision"):
        assert found[name] == plain["detection"]["abl_isolation"][name]  # of the polluted ones, as without
    honest = found["honest"]
    assert (honest["clients"], honest["samples"]) == (2, clients["2"]["negatives"] + clients["3"]["negatives"])
    assert 0 <= honest["flagged_at_fpr_5"] <= 1
    assert honest["flagged_at_fpr_1"] is None  # the polluted clients' clean samples are under 1,000
    assert line["weights_sha256"] == plain["weights_sha256"]
    (twin,) = (tmp_path / "asked" / "twins").iterdir()
    quiet = read_rounds(twin)[2]["detection"]["abl_isolation"]
    assert (quiet["honest"]["clients"], quiet["auc"], quiet["honest"]["flagged_at_fpr_5"]) == (4, None, None)


def test_false_alarms_by_hand() -> None:
    entries = [
        {"polluted": True, "clean_scores": list(range(200))},  # 5 % of them, 190 to 199, are above 189
        {"polluted": False, "clean_scores": [0.0, 189.0, 189.5, 300.0]},
        {"polluted": False},  # its detector could not act
    ]
    assert false_alarms(entries) == {
        "clients": 1,
        "samples": 4,
        "median": 189.25,
        "quantile_95": pytest.approx(283.425),
        "flagged_at_fpr_1": None,
        "flagged_at_fpr_5": 0.5,
    }
    nobody = false_alarms([])
    assert (nobody["clients"], nobody["median"], nobody["flagged_at_fpr_5"]) == (0, None, None)
