"""The re-learning test goes on as the run itself would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbd.config.scenario import from_dict, to_dict
from fedbd.flower.app_loader import load_component
from fedbd.models.checkpoint import load_checkpoint
from fedbd.params import flatten
from fedbd.prepared import prepare
from fedbd.roles import draw_cohort, roles_in
from fedbd.running.engines import flower_app_dir
from fedbd.running.runs import run

further: Any = load_component(flower_app_dir(), "server", "relearning", "_further")
RAW: dict[str, Any] = {
    "name": "relearning",
    "seed": 3,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "model": {"name": "cnn", "width": 4},
    "cohort": {"size": 2},
    "training": {"epochs": 1, "batch_size": 32, "lr": 0.05, "lr_decay": 0.9},
    "attacks": [
        {
            "name": "badnets",
            "clients": {"ids": [0, 1]},
            "target": 0,
            "trigger": {"name": "grid"},
            "rounds": {"first": 1, "last": 2},
        }
    ],
    "engine": {"executor": "serial"},
}
CLEANUP = [{"name": "clp", "u": 1.0, "rounds": [2]}]


@pytest.mark.parametrize("scheme", [None, {"name": "ckks"}], ids=["plain", "encrypted"])
def test_the_control_goes_on_as_a_longer_run_does(scheme: Any, tmp_path: Path) -> None:
    tested = {**RAW, "rounds": 2, "cleanup": CLEANUP, "evaluation": {"relearn": [1, 2]}, "secure_sum": scheme}
    found = run(from_dict(tested), tmp_path / "tested")
    assert found.rounds[2]["cleanup"]["clp"]["acted"], found.rounds[2]["cleanup"]["clp"]["notes"]
    longer = {**RAW, "rounds": 4, "name": "longer", "evaluation": {"twin": False}}
    longer["attacks"] = [{**RAW["attacks"][0], "rounds": {"first": 1}}]
    lines = run(from_dict(longer), tmp_path / "longer").rounds
    relearning = found.summary["relearning"]
    assert set(relearning) == {"clp", "none", "twin"}
    for step in (1, 2):
        control = relearning["none"]["after"][str(step)]
        assert control["attack_success"] == lines[2 + step]["attack_success"]
        assert control["clean_accuracy"] == lines[2 + step]["clean_accuracy"]
    assert relearning["clp"] != relearning["none"] != relearning["twin"]


SCALES = """
import copy
import dataclasses

import numpy as np
import torch
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    \"\"\"Sets half of the first BatchNorm's scales to 0; the shifts stay, so that training would bring them back.\"\"\"

    prunes = True

    def clean(self, model, trusted, clues, rng):
        fixed = copy.deepcopy(model)
        name, norm = next((n, m) for n, m in fixed.named_modules() if isinstance(m, nn.BatchNorm2d))
        off = np.arange(norm.num_features) % 2 == 0
        with torch.no_grad():
            norm.weight[torch.from_numpy(off)] = 0.0
        return fixed, dataclasses.replace(clues, pruned={name: off}), {"acted": True}
"""
PERSISTENT = [
    {"name": "scales:Scales", "label": "scales", "rounds": [2], "mode": "in_loop", "mask": "persist", "rollback": None}
]


@pytest.fixture
def scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scales.py").write_text(SCALES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("scales")
def test_what_a_repair_switched_off_stays_off_while_the_attack_goes_on(tmp_path: Path) -> None:
    tested = {**RAW, "rounds": 2, "cleanup": PERSISTENT, "evaluation": {"relearn": [1, 2]}}
    found = run(from_dict(tested), tmp_path / "tested")
    longer = {**RAW, "rounds": 4, "name": "longer", "cleanup": PERSISTENT, "evaluation": {"twin": False}}
    longer["attacks"] = [{**RAW["attacks"][0], "rounds": {"first": 1}}]
    lines = run(from_dict(longer), tmp_path / "longer").rounds
    for step in (1, 2):
        repaired = found.summary["relearning"]["scales"]["after"][str(step)]
        assert repaired["clean_accuracy"] == lines[2 + step]["clean_accuracy"]
        assert repaired["attack_success"] == lines[2 + step]["attack_success"]


@pytest.mark.usefixtures("scales")
def test_the_twins_mask_stays_on_in_its_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict[str, Any] = {}
    hook = load_component(flower_app_dir(), "server", "app", "_relearn").__globals__  # type: ignore[attr-defined]
    monkeypatch.setitem(hook, "relearn", lambda grid, prepared, points, build: caught.update(points))
    scenario = from_dict({**RAW, "rounds": 2, "cleanup": PERSISTENT, "evaluation": {"relearn": [1]}})
    done = run(scenario, tmp_path)
    off = sum(int(mask.sum()) for mask in caught["twin"].mask.values())
    assert off > 0
    model = prepare(scenario).new_model()
    load_checkpoint(model, next(tmp_path.glob("twins/**/model.safetensors")))
    weights = dict(model.named_parameters())
    assert all(not weights[name][mask].any() for name, mask in caught["twin"].mask.items())
    assert (done.path / "mask.safetensors").is_file()


def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    first = run(from_dict({**RAW, "rounds": 2, "name": "first", "evaluation": {"twin": False}}), tmp_path)
    file = first.path / "model.safetensors"
    raw = {**RAW, "rounds": 2, "name": "second", "evaluation": {"twin": False}, "start": {"checkpoint": str(file)}}
    second = run(from_dict(raw), tmp_path)
    assert second.rounds[0]["weights_sha256"] == first.rounds[-1]["weights_sha256"]
    prepared = prepare(from_dict(raw))
    expected = prepared.new_model()
    load_checkpoint(expected, file)
    assert (flatten(prepared.start_model()) == flatten(expected)).all()


def test_every_further_round_is_attacked_and_nothing_else_goes_on() -> None:
    late = {**RAW["attacks"][0], "clients": {"ids": [0]}, "rounds": {"first": 3}}
    early = {**late, "label": "early", "clients": {"ids": [1]}, "rounds": {"last": 1}}
    fields: dict[str, Any] = {"attacks": [late, early], "cohort": {"size": 3, "attackers_per_round": 1}, "rounds": 4}
    guards = {"cleanup": CLEANUP, "detection": [{"name": "abl_isolation"}], "evaluation": {"relearn": [4]}}
    scenario = from_dict({**RAW, **fields, **guards, "secure_sum": {"name": "ckks"}})
    found = further(scenario, 6)
    for round_ in range(3, 7):
        roles = roles_in(found, round_, draw_cohort(found, round_))
        assert sum(role == "attacker" for role in roles.values()) == 1
    assert (found.rounds, found.cleanup, found.detection, found.secure_sum) == (6, (), (), None)
    assert from_dict(to_dict(found)) == found  # clients read it as any scenario, with every check
