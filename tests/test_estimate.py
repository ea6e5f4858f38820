"""``fedbd run --dry-run``: arithmetic against hand-made numbers, and traffic against the record of a real run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbd import estimate
from fedbd.cli import main as cli
from fedbd.config.scenario import from_dict
from fedbd.estimate import Pace
from fedbd.prepared import prepare
from fedbd.report.estimate_text import estimate_text, size
from fedbd.running.runs import run

RAW: dict[str, Any] = {
    "name": "small",
    "rounds": 4,
    "data": "digits",
    "partition": {"name": "iid", "clients": 4},
    "trusted": {"size": 148},
    "model": {"name": "mlp", "hidden": [16]},
    "training": {"epochs": 2, "batch_size": 64, "lr": 0.05},
    "attacks": [
        {
            "name": "badnets",
            "clients": {"ids": [3]},
            "rounds": {"first": 3},
            "target": 0,
            "trigger": "grid",
            "training": {"epochs": 6, "lr": 0.05},
        }
    ],
    "cleanup": [{"name": "finetune", "every": 2}],
    "engine": {"executor": "serial"},
}
PACE = Pace(
    image=1.0, poisoned=2.0, client=10.0, clean=0.5, triggered=0.25, encrypt=3.0, add=0.5, decrypt=7.0, blob=1000
)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "cores", lambda: 2)


def test_the_sums_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200 images at four clients: 300 each; two workers; the attacker acts in rounds 3 and 4 of 4."""
    monkeypatch.setattr(estimate, "_pace", lambda prepared: PACE)
    found = estimate.estimate(prepare(from_dict({**RAW, "engine": {}, "secure_sum": "ckks"})))
    honest = 10 + 2 * 300
    attacked = 10 + 6 * 300 * 2.0  # longer than the three others on one worker
    assert found.seconds == {
        "train": pytest.approx((2 * 2 * honest + 2 * attacked) / 4),
        # In two of four rounds the attacker keeps one worker busy longer than the other three clients the other one.
        "encrypt": (2 * 2 * 3.0 + 2 * 1 * 3.0) / 4,
        "aggregate": 4 * 0.5,
        "decrypt": 7.0,  # two clients, two workers
        "evaluate": pytest.approx(449 * 0.75 / 2),
        "total": pytest.approx((2 * 2 * honest + 2 * attacked) / 4 + 4.5 + 2 + 7 + 449 * 0.375),
    }
    assert found.twin_seconds is not None  # the twin runs in the clear, and nobody attacks
    assert found.twin_seconds["total"] == pytest.approx(2 * honest + 449 * 0.375)
    faulty = {"faults": [{"kind": "raise", "clients": {"ids": [0]}}], "on_client_failure": "skip"}
    other = estimate.estimate(prepare(from_dict({**RAW, **faulty, "engine": {}, "secure_sum": "ckks"})))
    assert other.twin_seconds is not None  # where clients fail the twin is encrypted, too
    assert (other.twin_seconds["encrypt"], other.twin_seconds["decrypt"]) == (2 * 3.0, 7.0)
    assert found.run_seconds == pytest.approx(4 * (found.seconds["total"] + found.twin_seconds["total"]))
    assert found.parameters == 64 * 16 + 16 + 16 * 10 + 10
    assert found.data_bytes == 1797 * 64
    assert found.bytes_up == 4 * 1000 + 2 * 8 * (found.parameters + 1)
    assert found.bytes_down == 4 * (4 * found.parameters + 4 * 128) + 2 * 1000
    assert found.not_counted == ["the start of the run", "cleanup finetune"]


def test_evaluating_less_and_more_workers_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_pace", lambda prepared: PACE)
    every = {**RAW, "engine": {}, "cleanup": [], "evaluation": {"every": 2, "twin": False}}
    one = estimate.estimate(prepare(from_dict(every)), workers=1)
    four = estimate.estimate(prepare(from_dict(every)), workers=4)
    assert one.seconds["evaluate"] == pytest.approx(449 * 0.375 / 2)
    assert (one.workers, four.workers, one.twin_seconds) == (1, 4, None)
    assert one.seconds["train"] == pytest.approx((2 * 4 * 610 + 2 * (3 * 610 + 3610)) / 4)
    assert four.seconds["train"] == pytest.approx((2 * 610 + 2 * 3610) / 4)
    serial = estimate.estimate(prepare(from_dict({**every, "engine": {"executor": "serial"}})), workers=4)
    assert (serial.workers, serial.seconds["train"]) == (1, one.seconds["train"])


def test_the_median_of_a_few_turns_without_the_first() -> None:
    slept: list[float] = []
    moments = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate.time, "perf_counter", lambda: next(moments))
        assert estimate.timed(lambda: slept.append(1)) == 2.0
    assert len(slept) == 4


@pytest.mark.parametrize("secure", [None, "ckks"])
def test_traffic_is_that_of_a_run_and_nothing_is_written(secure: str | None, tmp_path: Path) -> None:
    raw = {**RAW, "rounds": 1, "attacks": [], "cleanup": [], "secure_sum": secure}
    scenario = from_dict(raw)
    before = list(tmp_path.iterdir())
    found = estimate.estimate(prepare(scenario))
    assert list(tmp_path.iterdir()) == before
    assert all(value > 0 for name, value in found.seconds.items() if secure or name in ("train", "evaluate", "total"))
    line = run(scenario, tmp_path).rounds[1]
    assert found.bytes_up == pytest.approx(line["bytes_up"], rel=0.05)
    assert found.bytes_down == pytest.approx(line["bytes_down"], rel=0.05)


def test_the_command_prints_it_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(RAW))
    said = []
    for more in ([], ["--json"], ["--seeds", "2"]):
        monkeypatch.setattr(sys, "argv", ["fedbd", "run", "small.yaml", "--dry-run", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    assert said[0].startswith("small seed 0: about ")
    assert "cleanup finetune" in said[0]
    (only,) = json.loads(said[1])["estimates"]
    assert set(only) == {field.name for field in dataclasses.fields(estimate.Estimate)}
    assert json.loads(said[1])["run_seconds"] == only["run_seconds"]
    assert said[2].splitlines()[-1].startswith("all, one after the other")
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_sizes_and_lines() -> None:
    assert [size(count) for count in (0, 999, 1000, 1.5e6, 2e9, 5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "2 GB",
        "5e+03 GB",
    ]
    seconds = {"train": 1.0, "encrypt": 0.0, "aggregate": 0.0, "decrypt": 0.0, "evaluate": 0.5, "total": 1.5}
    found = estimate.Estimate(
        name="a",
        seed=1,
        rounds=100,
        workers=2,
        seconds=seconds,
        twin_seconds=None,
        run_seconds=150.0,
        parameters=1234,
        data_bytes=10**6,
        process_bytes=5 * 10**8,
        bytes_down=2000,
        bytes_up=3000,
        not_counted=["the start of the run"],
    )
    assert estimate_text(found).splitlines() == [
        "a seed 1: about 2m30s in all: 100 rounds of 1.5 s, without a twin",
        "  a round   1.5 s on 2 workers (train 1, evaluate 0.5)",
        "  memory    500 MB a process at most, 3 processes; 1 MB of images are shared; the model has 1,234 weights",
        "  traffic   2 kB down and 3 kB up a round",
        "  without   the start of the run",
    ]
    both = dataclasses.replace(found, twin_seconds={"total": 0.5}, run_seconds=200.0)
    assert estimate_text(both).splitlines()[:2] == [
        "a seed 1: about 3m20s in all: 100 rounds of 1.5 s, and 100 of 0.5 s for its attack-free twin",
        "  a round   1.5 s on 2 workers (train 1, evaluate 0.5)",
    ]


def test_a_long_run_is_looked_at_here_and_there() -> None:
    assert estimate._looked_at(4) == [1, 2, 3, 4]
    spread = estimate._looked_at(1_000_000)
    assert (len(spread), spread[0], spread[-1]) == (estimate.COHORTS, 1, 1_000_000)
    assert max(np.diff(spread)) - min(np.diff(spread)) <= 1
