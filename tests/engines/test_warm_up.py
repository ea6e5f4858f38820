"""Runs that start from clean rounds: the same as doing it by hand, and done once for all who share them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedbd.central.subject import source_of
from fedbd.config.scenario import Scenario, fingerprint, from_dict, twin_of, warm_up_of
from fedbd.errors import CheckpointError
from fedbd.prepared import prepare
from fedbd.records.record import read_rounds, read_summary, same_records
from fedbd.report.console import LiveRuns
from fedbd.running.jobs import run_all
from fedbd.running.runs import plan, run

ABL = {"name": "abl", "isolate_after": 2}
RAW: dict[str, Any] = {
    "name": "warm",
    "seed": 3,
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "trusted": {"size": 60},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 64, "lr": 0.05, "lr_decay": 0.9},
    "cohort": {"size": 3, "attackers_per_round": 1},
    "attacks": [{"name": "badnets", "clients": {"count": 1}, "target": 0, "trigger": {"name": "grid"}}],
    "strategy": {"name": "fedavgm", "arguments": {"server_momentum": 0.5}},
    "server_rate": 0.9,
    "aggregation": {"name": "norm_clip", "bound": 2.0},
    "cleanup": [{"name": "finetune", "epochs": 1, "rounds": [2]}],
    "evaluation": {"twin": False},
    "engine": {"executor": "serial"},
    "start": {"warm_up": 3},
}


def scenario(**fields: Any) -> Scenario:
    return from_dict({**RAW, **fields})


def test_it_is_the_two_steps_that_one_would_do_by_hand(tmp_path: Path) -> None:
    warm = run(scenario(), tmp_path / "warm")
    left_out = ("attacks", "aggregation", "cleanup", "start")
    clean = {key: value for key, value in RAW.items() if key not in left_out}
    first = run(from_dict({**clean, "name": "clean", "rounds": 3, "cohort": {"size": 3}}), tmp_path / "hand")
    second = run(scenario(start={"checkpoint": str(first.path / "model.safetensors")}), tmp_path / "hand")
    assert same_records(warm.path, second.path) == []
    assert warm.rounds[0]["weights_sha256"] == first.rounds[-1]["weights_sha256"] != first.rounds[0]["weights_sha256"]
    for name in ("model.safetensors",):
        assert (warm.path / name).read_bytes() == (second.path / name).read_bytes()
    (place,) = (tmp_path / "warm" / "warm-ups").iterdir()
    assert (place / "model.safetensors").read_bytes() == (first.path / "model.safetensors").read_bytes()
    assert [line["clean_accuracy"] is None for line in read_rounds(place)] == [False, True, True, False]
    told = warm.summary["started_from"]
    assert told == {"file": str(place / "model.safetensors"), "sha256": told["sha256"], "warm_up": 3}
    assert second.summary["started_from"] == {
        "file": str(first.path / "model.safetensors"), "sha256": told["sha256"], "warm_up": None
    }  # fmt: skip
    assert first.summary["started_from"] is None
    source = source_of(str(warm.path), "CHECKPOINT", [])
    assert source is not None
    assert source.start == place / "model.safetensors"


def quick(**fields: Any) -> Scenario:
    return scenario(rounds=1, start={"warm_up": 1}, cleanup=[], **fields)


def test_two_arms_and_their_twins_share_one_that_is_run_once_and_first(tmp_path: Path) -> None:
    arms = [
        quick(name="plain", aggregation="mean", evaluation={}),
        quick(name="median", aggregation="median", evaluation={}),
        quick(name="sums", aggregation="mean", secure_sum={"name": "ckks"}, evaluation={"twin": False}),
    ]
    jobs = plan(arms, tmp_path)
    names = ["plain (warm-up)", "plain (twin)", "median (twin)", "plain", "median", "sums"]
    assert [job.scenario.name for job in jobs] == names
    warm_up = jobs[0].folder
    assert warm_up.parent == tmp_path / "warm-ups"
    assert [job.needs for job in jobs] == [None, warm_up, warm_up, jobs[1].folder, jobs[2].folder, warm_up]
    assert {job.start for job in jobs[1:]} == {warm_up / "model.safetensors"}
    with open(tmp_path / "out.txt", "w") as sink, contextlib.redirect_stdout(sink), LiveRuns(quiet=True) as live:
        for job in jobs:
            live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
        assert run_all(jobs, live, 1) == []
    starts = {read_rounds(job.folder)[0]["weights_sha256"] for job in jobs[1:]}
    assert starts == {read_rounds(warm_up)[-1]["weights_sha256"]}
    again = plan(arms, tmp_path, overwrite=True)
    assert [job.scenario.name for job in again] == ["plain", "median", "sums"]
    assert {(job.needs, job.start) for job in again} == {(None, warm_up / "model.safetensors")}


def test_one_that_was_killed_is_done_again(tmp_path: Path) -> None:
    (first, then) = plan([quick()], tmp_path)
    first.folder.mkdir(parents=True)
    (first.folder / "scenario.yaml").write_text("name: t\n")
    (first.folder / "rounds.jsonl").write_text(json.dumps({"round": 0}) + "\n")
    (first.folder / "model.safetensors").write_bytes(b"half")
    assert plan([quick()], tmp_path) == [first, then]
    assert not first.folder.exists()
    assert run(quick(), tmp_path).summary["status"] == "finished"
    (first.folder / "model.safetensors").unlink()  # a finished one without its model is none
    assert plan([quick()], tmp_path, overwrite=True) == [first, then]


def test_its_failure_is_told_to_those_that_wait_for_it(tmp_path: Path) -> None:
    arm = quick(evaluation={}, engine={"workers": 1, "timeout": 1e-6})
    jobs = plan([arm], tmp_path)
    with LiveRuns(quiet=True) as live:
        for job in jobs:
            live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
        failures = {failure.folder: failure.reason for failure in run_all(jobs, live, 1)}
    warm_up, twin, own = (job.folder for job in jobs)
    first = failures[warm_up].partition("\n")[0]
    assert failures[twin] == f"its warm-up failed: {first}"
    assert failures[own] == f"its attack-free twin failed: its warm-up failed: {first}"
    assert (read_summary(own) or {})["status"] == "failed"


def test_it_depends_on_what_it_computes_and_on_nothing_else() -> None:
    base = warm_up_of(scenario())
    assert base is not None
    same = [
        scenario(name="other", rounds=9, aggregation="mean", cleanup=[], attacks=[], cohort={"size": 3}),
        scenario(local_defense=ABL, secure_sum={"name": "ckks"}, aggregation="mean", detection=["strip"]),
        twin_of(scenario()),
    ]
    other = [
        scenario(seed=4),
        scenario(start={"warm_up": 2}),
        scenario(server_rate=1.0),
        scenario(strategy="fedavg"),
        scenario(training={"epochs": 2}),
        scenario(trusted=None, cleanup=[]),
    ]
    for each in same:
        made = warm_up_of(each)
        assert made is not None
        assert fingerprint(made) == fingerprint(base)
    for each in other:
        made = warm_up_of(each)
        assert made is not None
        assert fingerprint(made) != fingerprint(base)
        assert fingerprint(each) != fingerprint(scenario())
    assert warm_up_of(from_dict({**RAW, "start": None})) is None
    assert from_dict(json.loads(json.dumps(_plain(base)))) == base  # it can be written down and read again


def _plain(scenario_: Scenario) -> Any:
    from fedbd.config.scenario import to_dict

    return to_dict(scenario_)


def test_without_its_result_a_run_does_not_start() -> None:
    prepared = prepare(scenario())
    with pytest.raises(CheckpointError, match="needs the result of 3 clean rounds, and it is not there; start the run"):
        prepared.start_model()
    fresh = prepare(dataclasses.replace(scenario(), start=None))
    assert fresh.start_model() is not None
