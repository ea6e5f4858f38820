"""The same scenario and seed give the same records, whatever the engine, the number of workers and the encryption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedbd.config.scenario import Scenario
from fedbd.records.record import same_records
from fedbd.running.runs import RunResult, run

Make = Callable[..., Scenario]
CKKS = {"secure_sum": {"name": "ckks"}}


def test_the_reference_exercises_every_stage(reference: RunResult) -> None:
    assert [line["round"] for line in reference.rounds] == [0, 1, 2]
    assert len({line["weights_sha256"] for line in reference.rounds}) == 3
    last = reference.rounds[-1]
    assert last["attackers"] == [0]
    assert last["polluted"] == [1]
    assert reference.rounds[1]["notes"]["clients"]["1"]["isolated"] > 0
    assert last["notes"]["clients"]["1"]["stage"] == "unlearn"
    assert last["cleanup"]["rnp"]["after"]["clean_accuracy"] is not None
    assert last["detection"]["rnp_unlearned"]["positives"] > 0
    assert last["server_saw"]["kind"] == "updates"


@pytest.mark.parametrize("workers", [1, 2])
def test_plain_with_workers(workers: int, make: Make, reference: RunResult, tmp_path: Path) -> None:
    result = run(make({"workers": workers}), tmp_path)
    assert same_records(reference.path, result.path) == []


def test_encrypted_serial(make: Make, reference: RunResult, encrypted: RunResult, tmp_path: Path) -> None:
    result = run(make({"executor": "serial"}, **CKKS), tmp_path)
    assert same_records(reference.path, result.path, across_secure_sum=True) == []
    assert same_records(encrypted.path, result.path) == []


def test_encrypted_with_one_worker(make: Make, encrypted: RunResult, tmp_path: Path) -> None:
    assert same_records(encrypted.path, run(make({"workers": 1}, **CKKS), tmp_path).path) == []


def test_encrypted_with_two_workers(reference: RunResult, encrypted: RunResult) -> None:
    assert same_records(reference.path, encrypted.path, across_secure_sum=True) == []
    assert [line["bit_exact"] for line in encrypted.rounds[1:]] == [True, True]
    assert encrypted.rounds[1]["server_saw"]["kind"] == "sum"
    assert encrypted.rounds[1]["server_saw"]["clients_per_sum"] == [2]


@pytest.mark.flower
def test_ray(make: Make, reference: RunResult, encrypted: RunResult, tmp_path: Path) -> None:
    result = run(make({"name": "ray", "workers": 2}, **CKKS), tmp_path)
    assert same_records(encrypted.path, result.path) == []
    assert same_records(reference.path, result.path, across_secure_sum=True) == []


@pytest.mark.flower
def test_superlink_with_two_supernodes(make: Make, reference: RunResult, encrypted: RunResult, tmp_path: Path) -> None:
    result = run(make({"name": "deployment"}, **CKKS), tmp_path)
    assert same_records(encrypted.path, result.path) == []
    assert same_records(reference.path, result.path, across_secure_sum=True) == []


def test_another_seed_gives_other_records(make: Make, reference: RunResult, tmp_path: Path) -> None:
    result = run(make({"executor": "serial"}, seed=6, rounds=1), tmp_path)
    assert any("weights_sha256" in difference for difference in same_records(reference.path, result.path))
