"""A run that was ended and taken up again leaves the records of one that was not, on every engine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedbd.config.run_text import scenario_text
from fedbd.config.scenario import Scenario, from_dict
from fedbd.errors import UserError
from fedbd.flower.app_loader import load_component
from fedbd.records.checkpoint import FOLDER
from fedbd.records.record import SCENARIO, read_rounds, read_summary, resumed_from, same_records
from fedbd.records.run_lock import LOCK, writing
from fedbd.running.engines import execute, flower_app_dir
from fedbd.running.jobs import run_all
from fedbd.running.resuming import plan_resumption, resume
from fedbd.running.runs import RunResult, plan, run

Make = Callable[..., Scenario]
SERIAL = {"executor": "serial"}
ROUNDS = load_component(flower_app_dir(), "server", "step", "Rounds")
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "rounds": 5,
    "data": "digits",
    "partition": {"name": "iid", "clients": 3},
    "cohort": {"size": 2},
    "trusted": {"size": 60},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 64, "lr": 0.05, "lr_decay": 0.9},
    "attacks": [{"name": "badnets", "clients": {"ids": [0]}, "target": 0, "trigger": "grid"}],
    "evaluation": {"twin": False},
    "engine": SERIAL,
}
LOOP = {
    "cleanup": [
        {"name": "clp", "label": "kept", "u": 1.0, "rounds": [2], "mode": "in_loop", "rollback": None}
        | {"mask": "persist", "server_optimizer_state": "keep"},
        {"name": "finetune", "epochs": 1, "rounds": [4]},
    ],
    "strategy": {"name": "fedadam", "arguments": {"eta": 0.02}},
}


class Told:
    """A watcher that notes which runs finish."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def update(self, run_id: str, record: dict[str, Any]) -> None: ...

    def finish(self, run_id: str, summary: dict[str, Any]) -> None:
        self.finished.append(run_id)

    def fail(self, run_id: str, reason: str) -> None:
        raise AssertionError(reason)


class Death(BaseException):
    """Ends a run at once."""


@contextmanager
def death_after(line: int) -> Iterator[None]:
    """Let a run die when the line of a round is on the disk, before its checkpoint."""
    write = ROUNDS._write  # type: ignore[attr-defined]

    def dying(self: Any, record: Any) -> None:
        write(self, record)
        if record["round"] == line:
            raise Death

    ROUNDS._write = dying  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ROUNDS._write = write  # type: ignore[attr-defined]


def dead(scenario: Scenario, out: Path, line: int) -> Path:
    with death_after(line), pytest.raises(Death):
        run(scenario, out)
    return out / scenario.name / f"seed-{scenario.seed}"


def measures(folder: Path) -> dict[str, Any]:
    """The summary without what is said to differ, and without the times in its cleanups and detectors."""
    found = read_summary(folder) or {}
    volatile = ("name", "seconds_total", "seconds_per_round", "peak_memory_bytes", "resumed_from", "cipher_noise")
    kept = {name: value for name, value in found.items() if name not in volatile}
    return json.loads(json.dumps(kept), object_hook=lambda entry: {k: v for k, v in entry.items() if k != "seconds"})


def test_every_stage_goes_on(make: Make, reference: RunResult, tmp_path: Path) -> None:
    folder = dead(make(SERIAL), tmp_path, 2)
    assert [line["round"] for line in read_rounds(folder)] == [0, 1, 2]
    assert (read_summary(folder) or {})["status"] == "failed"
    assert sorted(entry.name for entry in (folder / FOLDER).iterdir()) == ["round-1.json", "round-1.npz"]
    result = resume(folder)
    assert same_records(reference.path, result.path) == []
    assert measures(result.path) == measures(reference.path)
    assert (result.summary["resumed_from"], reference.summary["resumed_from"]) == ([1], [])
    assert (result.path / "model.safetensors").read_bytes() == (reference.path / "model.safetensors").read_bytes()
    assert not (result.path / FOLDER).exists()
    assert resume(folder).summary == result.summary  # a finished run is only read


def test_encrypted_with_workers(make: Make, encrypted: RunResult, tmp_path: Path) -> None:
    folder = dead(make({"workers": 2}, secure_sum={"name": "ckks"}), tmp_path, 2)
    assert same_records(encrypted.path, resume(folder).path) == []


def test_clients_go_on_failing(tmp_path: Path) -> None:
    often = {"kind": "raise", "clients": {"share": 1.0}, "probability": 0.25}
    late = {"kind": "garbage", "clients": {"share": 1.0}, "probability": 0.3, "stage": "decrypt"}
    fields = {**SMALL, "seed": 0, "partition": {"name": "iid", "clients": 6}, "cohort": {"size": 5}}
    fields |= {"secure_sum": "ckks"}
    scenario = from_dict({**fields, "faults": [often, late], "on_client_failure": "skip"})
    whole = run(scenario, tmp_path / "whole")
    failed = [set(line["notes"].get("faults", {})) for line in whole.rounds[1:]]
    assert sum(map(len, failed[:2])) > 0 < sum(map(len, failed[2:]))
    folder = dead(scenario, tmp_path / "ended", 3)
    assert same_records(whole.path, resume(folder).path) == []


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The uninterrupted run with a persistent mask, moments and the re-learning test."""
    fields = {**SMALL, **LOOP, "evaluation": {"twin": False, "relearn": [1, 2]}}
    return run(from_dict(fields), tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize(("every", "deaths"), [(1, [2, 4]), (2, [1, 4, 5]), (3, [5])])
def test_a_mask_moments_and_relearning_go_on_however_often_it_dies(
    every: int, deaths: list[int], loop: RunResult, tmp_path: Path
) -> None:
    assert loop.rounds[2]["cleanup"]["kept"]["acted"]
    assert loop.summary["relearning"] is not None
    fields = {**SMALL, **LOOP, "evaluation": {"twin": False, "relearn": [1, 2]}, "checkpoint": {"every": every}}
    folder = dead(from_dict(fields), tmp_path, deaths[0])
    for line in deaths[1:]:
        with death_after(line), pytest.raises(Death):
            resume(folder)
    result = resume(folder)
    assert same_records(loop.path, result.path) == []
    assert measures(result.path) == measures(loop.path)
    assert result.summary["resumed_from"] == [(line - 1) // every * every for line in deaths]


def test_the_mask_is_needed(loop: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**SMALL, **LOOP, "evaluation": {"twin": False, "relearn": [1, 2]}}
    folder = dead(from_dict(fields), tmp_path, 4)
    restore = ROUNDS.restore  # type: ignore[attr-defined]
    monkeypatch.setattr(ROUNDS, "restore", lambda self, lines, state: restore(self, lines, {**state, "mask": {}}))
    assert same_records(loop.path, resume(folder).path) != []


def test_the_relearning_stage_goes_on(loop: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**SMALL, **LOOP, "evaluation": {"twin": False, "relearn": [1, 2]}, "checkpoint": {"every": 4}}
    app = sys.modules[ROUNDS.__module__.replace(".step", ".app")]  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(app, "relearn", lambda *_: (_ for _ in ()).throw(Death()))
        run(from_dict(fields), tmp_path)
    result = resume(tmp_path / "small" / "seed-3")
    assert result.summary["resumed_from"] == [5]
    assert same_records(loop.path, result.path) == []
    assert measures(result.path) == measures(loop.path)


def test_no_checkpoint_yet_means_from_the_first_round(tmp_path: Path) -> None:
    whole = run(from_dict({**SMALL, "name": "whole"}), tmp_path)
    folder = dead(from_dict(SMALL), tmp_path, 1)
    assert not (folder / FOLDER).exists()
    result = resume(folder)
    assert same_records(whole.path, result.path) == []
    assert result.summary["resumed_from"] == [0]


def test_a_damaged_checkpoint_costs_a_round_and_is_named(tmp_path: Path) -> None:
    whole = run(from_dict({**SMALL, "name": "whole"}), tmp_path)
    folder = dead(from_dict(SMALL), tmp_path, 4)
    with open(folder / FOLDER / "round-3.npz", "r+b") as file:
        file.seek(500)
        file.write(b"?")
    planned = plan_resumption([folder])
    assert "after round 2 (later ones are damaged: " in planned.notes[folder]
    result = resume(folder)
    assert same_records(whole.path, result.path) == []
    assert resumed_from(folder) == [2]
    [part] = json.loads((folder / "environment.json").read_text())["resumed"]
    assert "round-3.json: must be a whole checkpoint" in part["damaged_checkpoints"][0]
    assert part["packages"]["torch"]


def test_a_twin_that_was_ended_goes_on_too(tmp_path: Path) -> None:
    fields = {**SMALL, "evaluation": {"twin": True}}
    whole = run(from_dict({**fields, "name": "whole"}), tmp_path / "whole")
    with death_after(3), pytest.raises(Death):  # the twin runs first, and dies
        run(from_dict(fields), tmp_path)
    [twin] = (tmp_path / "twins").iterdir()
    jobs = plan([from_dict(fields)], tmp_path)
    assert [(job.folder, job.resume) for job in jobs] == [(twin, "same-code"), (tmp_path / "small" / "seed-3", "")]
    result = run(from_dict(fields), tmp_path)
    assert same_records(whole.path, result.path) == []
    assert resumed_from(twin) == [2]


def test_a_missing_twin_is_run_with_the_rest(tmp_path: Path) -> None:
    fields = {**SMALL, "evaluation": {"twin": True}}
    whole = run(from_dict({**fields, "name": "whole"}), tmp_path / "whole")
    run(from_dict({**fields, "rounds": 5, "name": "other"}), tmp_path)  # leaves the twin
    folder = dead(from_dict(fields), tmp_path, 3)
    shutil.rmtree(tmp_path / "twins")
    result = resume(folder)
    assert same_records(whole.path, result.path) == []
    assert [path.name for path in (tmp_path / "twins").iterdir()] != []


def test_a_twin_that_cannot_go_on_is_run_anew(tmp_path: Path) -> None:
    fields = {**SMALL, "rounds": 3, "evaluation": {"twin": True}}
    whole = run(from_dict({**fields, "name": "whole"}), tmp_path / "whole")
    folder = dead(from_dict({**fields, "evaluation": {"twin": False}}), tmp_path, 2)
    text = (folder / SCENARIO).read_text()
    (folder / SCENARIO).write_text(text.replace("twin: false", "twin: true"))
    shutil.rmtree(folder / FOLDER)  # as if it had ended before its first checkpoint
    with death_after(1), pytest.raises(Death):
        run(from_dict({**fields, "name": "other"}), tmp_path)
    [twin] = (tmp_path / "twins").iterdir()
    assert len(read_rounds(twin)) == 2
    assert same_records(whole.path, resume(folder).path) == []
    assert resumed_from(twin) == []


def test_a_warm_up_may_be_named_beside_the_run_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = from_dict({**SMALL, "rounds": 2, "start": {"warm_up": 2}})
    with death_after(2), pytest.raises(Death):
        run(scenario, tmp_path)  # dies in its warm-up
    (warm_up,) = (tmp_path / "warm-ups").iterdir()
    folder = tmp_path / "small" / "seed-3"
    folder.mkdir(parents=True)
    (folder / SCENARIO).write_text(scenario_text(scenario))
    monkeypatch.chdir(tmp_path)
    jobs = plan_resumption([folder.relative_to(tmp_path), warm_up.relative_to(tmp_path)]).jobs
    told = Told()
    assert run_all(jobs, told, 1) == []
    assert told.finished == [str(job.folder) for job in jobs]
    assert (read_summary(folder) or {})["status"] == "finished"


def refused(folder: Path, **more: Any) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
    with pytest.raises(UserError) as error:
        plan_resumption([folder], **more)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return str(error.value)


def test_what_cannot_go_on_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must be the folder of a run, got no folder; start it with `fedbd run`" in refused(tmp_path / "none")
    assert "got a folder without scenario.yaml" in refused(tmp_path)
    without = dead(from_dict({**SMALL, "checkpoint": None, "name": "without"}), tmp_path, 3)
    assert "keeps no checkpoints (checkpoint: null), so nothing can go on; run it anew" in refused(without)
    folder = dead(from_dict(SMALL), tmp_path, 3)
    with writing(folder):
        assert "is being written by another fedbd run" in refused(folder)
    assert not (folder / LOCK).exists()
    text = (folder / SCENARIO).read_text()
    (folder / SCENARIO).write_text(text.replace("lr: 0.05", "lr: 0.06"))
    assert "is of another scenario than the scenario.yaml beside it" in refused(folder, other_code=True)
    (folder / SCENARIO).write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("fedbd.running.resuming.digest", lambda _: "other")
        assert "is of a run on other data than are there now; put the data back" in refused(folder, other_code=True)
    lines = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text("".join(lines.splitlines(keepends=True)[1:]))
    assert "rounds.jsonl: must hold the rounds 0 to 2, each once, for its checkpoint to go on, got 2" in refused(folder)
    (folder / "rounds.jsonl").write_text(lines)
    for file in (folder / FOLDER).glob("*.npz"):
        file.write_bytes(b"")
    assert f"remove {folder / FOLDER}, and the run starts from its first round again" in refused(folder)


def test_other_code_is_refused_unless_it_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(from_dict({**SMALL, "name": "whole"}), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fedbd.records.checkpoint.code_digest", lambda _: "older")
        folder = dead(from_dict(SMALL), tmp_path, 3)
    assert "was written by other code, so records might differ (fedbd's own sources changed)" in refused(folder)
    assert same_records(whole.path, resume(folder, other_code=True).path) == []


def test_run_says_how_to_go_on(tmp_path: Path) -> None:
    folder = dead(from_dict(SMALL), tmp_path, 3)
    with pytest.raises(UserError) as error:
        plan([from_dict(SMALL)], tmp_path)
    assert f"holds an earlier run that did not finish; continue it with `fedbd resume {folder}`" in str(error.value)


@pytest.mark.flower
@pytest.mark.parametrize("name", ["ray", "deployment"])
def test_flowers_own_runtimes_go_on(name: str, tmp_path: Path) -> None:
    fields = {**SMALL, **LOOP, "secure_sum": {"name": "ckks"}}
    whole = run(from_dict({**fields, "name": "whole"}), tmp_path)
    scenario = from_dict({**fields, "engine": {"name": name, "workers": 2}})
    folder = tmp_path / "small" / "seed-3"

    def look() -> None:
        if len(read_rounds(folder)) > 3:
            raise Death

    with writing(folder), pytest.raises(Death):
        execute(scenario, folder, None, poll=look)
    assert (read_summary(folder) or {}).get("status") != "finished"
    result = resume(folder)
    assert same_records(whole.path, result.path) == []
    assert measures(result.path) == measures(whole.path)
    [from_round] = result.summary["resumed_from"]
    assert from_round in (2, 3, 4)


def test_clients_own_batch_norm_and_warm_ups_go_on(tmp_path: Path) -> None:
    fields = {**SMALL, "rounds": 4, "batch_norm": "local", "start": {"warm_up": 2}}
    scenario = from_dict({**fields, "cleanup": [{"name": "flain", "bound": 0.3, "rounds": [4]}]})
    whole = run(scenario, tmp_path / "whole")
    with death_after(2), pytest.raises(Death):
        run(scenario, tmp_path / "cut")  # dies in its warm-up
    folder = dead(scenario, tmp_path / "cut", 3)
    (warm_up,) = (tmp_path / "cut" / "warm-ups").iterdir()
    assert (read_summary(warm_up) or {})["resumed_from"] == [1]
    result = resume(folder)
    assert same_records(whole.path, result.path) == []
    assert (whole.path / "model.safetensors").read_bytes() == (result.path / "model.safetensors").read_bytes()
    assert result.summary["resumed_from"] == [2]
    assert result.summary["started_from"]["file"] == str(warm_up / "model.safetensors")
