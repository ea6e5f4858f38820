from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbd.config.scenario import Scenario, from_dict, twin_of
from fedbd.errors import UserError
from fedbd.records.run_lock import LOCK, is_written, writing
from fedbd.running.identity import DataDigests, identity
from fedbd.running.runs import Job, plan, run, with_seeds

MINIMAL: dict[str, Any] = {"name": "t", "rounds": 3, "data": {"name": "digits"}, "model": {"name": "mlp"}}
ATTACK: dict[str, Any] = {"name": "badnets", "clients": {"count": 2}, "target": 0, "trigger": {"name": "grid"}}


def attacked(name: str = "attacked", **more: Any) -> Scenario:
    return from_dict({**MINIMAL, "name": name, "attacks": [ATTACK], **more})


def quiet(name: str = "quiet", **more: Any) -> Scenario:
    return from_dict({**MINIMAL, "name": name, **more})


def hash_of(scenario: Scenario) -> str:
    return identity(scenario, DataDigests().of(scenario))


def place_of(scenario: Scenario, out: Path) -> Path:
    return out / "twins" / hash_of(twin_of(scenario))[:16]


def run_in(folder: Path, status: str = "finished", rounds: int = 1) -> Path:
    """Leave what a run leaves."""
    folder.mkdir(parents=True)
    (folder / "scenario.yaml").write_text("name: t\n")
    (folder / "rounds.jsonl").write_text("".join(json.dumps({"round": i}) + "\n" for i in range(rounds)))
    (folder / "summary.json").write_text(json.dumps({"status": status}))
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(scenarios: list[Scenario], out: Path, **options: bool) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan(scenarios, out, **options)
    assert caught.value.heading == "nothing was started:"
    return [str(problem) for problem in caught.value.problems]


# Places and twins.


def test_a_scenario_without_attacks_is_one_job(tmp_path: Path) -> None:
    scenario = quiet(seed=7)
    assert plan([scenario], tmp_path) == [Job(scenario, tmp_path / "quiet" / "seed-7")]
    assert files(tmp_path) == set()


def test_an_attack_waits_for_its_twin(tmp_path: Path) -> None:
    scenario = attacked()
    place = place_of(scenario, tmp_path)
    assert plan([scenario], tmp_path) == [
        Job(twin_of(scenario), place),
        Job(scenario, tmp_path / "attacked" / "seed-0", needs=place, twin=place),
    ]


@pytest.mark.parametrize(
    "fields",
    [{"evaluation": {"twin": False}}, {"attacks": [{**ATTACK, "enabled": False}]}],
    ids=["not wanted", "nobody attacks"],
)
def test_no_twin_without_need(fields: dict[str, Any], tmp_path: Path) -> None:
    (job,) = plan([attacked(**fields)], tmp_path)
    assert (job.needs, job.twin) == (None, None)


def test_two_arms_share_a_twin_that_is_run_once(tmp_path: Path) -> None:
    plain, encrypted = attacked("plain", bucket_size=None), attacked("encrypted", secure_sum="ckks")
    defended = attacked("defended", aggregation="median")
    jobs = plan([plain, encrypted, defended], tmp_path)
    shared, own = place_of(plain, tmp_path), place_of(defended, tmp_path)
    assert place_of(encrypted, tmp_path) == shared != own
    assert [job.folder for job in jobs] == [
        shared,
        own,
        *(tmp_path / name / "seed-0" for name in ("plain", "encrypted", "defended")),
    ]
    assert [job.needs for job in jobs] == [None, None, shared, shared, own]
    assert all(job.twin == job.needs for job in jobs)
    assert not jobs[0].scenario.attacks[0].enabled


def test_seeds_have_twins_of_their_own(tmp_path: Path) -> None:
    jobs = plan(with_seeds([attacked(seed=4)], 3), tmp_path)
    assert len({job.folder for job in jobs}) == 6
    assert [job.scenario.seed for job in jobs] == [4, 5, 6, 4, 5, 6]
    for job in jobs[3:]:
        twin = next(other for other in jobs if other.folder == job.needs)
        assert twin.scenario.seed == job.scenario.seed


def test_seeds_follow_one_another_scenario_by_scenario() -> None:
    found = with_seeds([quiet("a", seed=1), quiet("b", seed=5)], 2)
    assert [(scenario.name, scenario.seed) for scenario in found] == [("a", 1), ("a", 2), ("b", 5), ("b", 6)]


def test_an_explicit_twin_is_used_and_run_first_whatever_the_order(tmp_path: Path) -> None:
    arm = attacked("arm")
    clean = attacked("clean", attacks=[{**ATTACK, "enabled": False}])
    for scenarios in ([arm, clean], [clean, arm]):
        jobs = plan(scenarios, tmp_path)
        assert [job.folder.parent.name for job in jobs] == ["clean", "arm"]
        assert jobs[1].needs == jobs[1].twin == jobs[0].folder
        assert jobs[0].needs is None


def test_an_explicit_clean_run_of_another_seed_is_no_twin(tmp_path: Path) -> None:
    clean = attacked("clean", attacks=[{**ATTACK, "enabled": False}], seed=1)
    jobs = plan([attacked("arm"), clean], tmp_path)
    assert [job.folder.parent.name for job in jobs] == ["twins", "clean", "arm"]


def test_a_finished_twin_is_used_again(tmp_path: Path) -> None:
    scenario = attacked()
    place = run_in(place_of(scenario, tmp_path))
    (job,) = plan([scenario], tmp_path)
    assert (job.needs, job.twin) == (None, place)
    assert files(place) == {"scenario.yaml", "rounds.jsonl", "summary.json"}


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_twin_that_did_not_finish_is_run_anew_in_an_empty_place(status: str, tmp_path: Path) -> None:
    scenario = attacked()
    place = run_in(place_of(scenario, tmp_path), status)
    twin, job = plan([scenario], tmp_path)
    assert (twin.folder, job.needs) == (place, place)
    assert not place.exists()


# Taken places.


def test_a_taken_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    taken = run_in(tmp_path / "quiet" / "seed-0")
    assert refusal([quiet(), quiet("other")], tmp_path) == [
        f"{taken}: holds an earlier run; pass --overwrite to replace it, or --out with another folder"
    ]
    assert files(taken) == {"scenario.yaml", "rounds.jsonl", "summary.json"}


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_started_run_is_as_taken_as_a_finished_one(status: str, tmp_path: Path) -> None:
    run_in(tmp_path / "quiet" / "seed-0", status, rounds=1)
    assert "holds an earlier run" in refusal([quiet()], tmp_path)[0]


def test_overwrite_removes_that_folder_and_nothing_else(tmp_path: Path) -> None:
    scenario = attacked()
    own = run_in(tmp_path / "attacked" / "seed-0")
    kept = [
        run_in(tmp_path / "attacked" / "seed-1"),
        run_in(tmp_path / "attacked-too" / "seed-0"),
        run_in(place_of(scenario, tmp_path)),
    ]
    (tmp_path / "attacked" / "notes.txt").write_text("mine")
    plan([scenario], tmp_path, overwrite=True)
    assert not own.exists()
    assert all(files(folder) == {"scenario.yaml", "rounds.jsonl", "summary.json"} for folder in kept)
    assert (tmp_path / "attacked" / "notes.txt").read_text() == "mine"


def test_a_run_that_ended_before_its_first_round_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / "quiet" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("it failed")
    plan([quiet()], tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_runs_is_never_removed(overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "quiet" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    assert refusal([quiet()], tmp_path, overwrite=overwrite) == [
        f"{folder}: must be new, empty or a run's folder; pass --out with another folder"
    ]
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "quiet" / "seed-0").mkdir(parents=True)
    assert len(plan([quiet()], tmp_path)) == 1


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    assert refusal([quiet()], out, overwrite=True) == [
        f"{out}: must be a folder that can be written; pass --out with another folder"
    ]
    assert out.read_text() == "a file"


def test_two_scenarios_of_one_name_are_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "quiet" / "seed-0")
    assert refusal([quiet(), quiet(rounds=9)], tmp_path, overwrite=True) == [
        f"{folder}: is wanted by two scenarios; give each scenario its own name, or another seed"
    ]
    assert folder.exists()


def test_one_name_with_two_seeds_is_fine(tmp_path: Path) -> None:
    assert len(plan([quiet(), quiet(seed=1)], tmp_path)) == 2


def test_seeds_that_meet_are_refused(tmp_path: Path) -> None:
    lines = refusal(with_seeds([quiet(seed=0), quiet(seed=1)], 2), tmp_path)
    assert lines == [
        f"{tmp_path / 'quiet' / 'seed-1'}: is wanted by two scenarios; give each scenario its own name, or another seed"
    ]


def test_every_problem_is_told_before_anything_starts(tmp_path: Path) -> None:
    run_in(tmp_path / "a" / "seed-0")
    strategy = {"name": "fedadam", "arguments": {"etta": 1}}
    lines = refusal([quiet("a"), quiet("b"), quiet("b"), quiet("c", strategy=strategy)], tmp_path)
    assert [line.rpartition(": ")[0].removeprefix(f"{tmp_path}/") for line in lines] == [
        "a/seed-0",
        "b/seed-0",
        "c: strategy.arguments.etta",
    ]


def test_a_strategys_problem_is_told_once_for_all_seeds(tmp_path: Path) -> None:
    scenario = quiet(strategy={"name": "fedadam", "arguments": {"etta": 1}})
    assert len(refusal(with_seeds([scenario], 5), tmp_path)) == 1


def test_an_earlier_run_goes_only_for_one_that_can_start(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "quiet" / "seed-0")
    with pytest.raises(UserError, match="must leave samples for the clients"):
        run(quiet(trusted={"size": 5000}), tmp_path, overwrite=True)
    assert files(folder) == {"scenario.yaml", "rounds.jsonl", "summary.json"}


def test_planning_changes_no_scenario(tmp_path: Path) -> None:
    scenario = attacked()
    before = dataclasses.replace(scenario)
    plan([scenario], tmp_path)
    assert scenario == before


@pytest.mark.parametrize("part", ["x_train", "y_train", "x_test", "y_test"])
def test_a_twin_on_other_data_is_another_run(part: str, tmp_path: Path) -> None:
    twin = twin_of(attacked(data={"name": "npz", "file": "data.npz", "root": str(tmp_path)}))
    shapes = {"x_train": (300, 8, 8), "y_train": 300, "x_test": (50, 8, 8), "y_test": 50}
    arrays = {
        name: np.random.default_rng(1).integers(10, size=shape).astype(np.uint8) for name, shape in shapes.items()
    }
    np.savez(tmp_path / "data.npz", **arrays)
    before = hash_of(twin)
    assert hash_of(twin) == before
    arrays[part].reshape(-1)[7] ^= 1
    np.savez(tmp_path / "data.npz", **arrays)
    assert hash_of(twin) != before
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "data.npz", tmp_path / "elsewhere" / "data.npz")
    moved = dataclasses.replace(twin, data=dataclasses.replace(twin.data, root=str(tmp_path / "elsewhere")))
    assert hash_of(moved) == hash_of(twin)


# Places that somebody is writing.

WRITTEN = "is being written by another fedbd run; wait until that has ended, or pass --out with another folder"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_run_that_is_being_written_is_refused_and_left_alone(rounds: int, overwrite: bool, tmp_path: Path) -> None:
    folder = run_in(tmp_path / "quiet" / "seed-0", "running", rounds)
    other = run_in(tmp_path / "other" / "seed-0", "failed", rounds=0)
    with writing(folder):
        assert refusal([quiet("other"), quiet()], tmp_path, overwrite=overwrite) == [f"{folder}: {WRITTEN}"]
    assert files(folder) == files(other) == {"scenario.yaml", "rounds.jsonl", "summary.json"}


def test_a_run_that_has_written_nothing_yet_is_refused_too(tmp_path: Path) -> None:
    folder = tmp_path / "quiet" / "seed-0"
    with writing(folder):
        assert refusal([quiet()], tmp_path) == [f"{folder}: {WRITTEN}"]
        assert folder.is_dir()
    assert len(plan([quiet()], tmp_path)) == 1


def test_a_twin_that_is_being_written_is_refused_before_anything_goes(tmp_path: Path) -> None:
    scenario = attacked()
    own = run_in(tmp_path / "attacked" / "seed-0")
    place = run_in(place_of(scenario, tmp_path), "failed")
    with writing(place):
        assert refusal([scenario], tmp_path, overwrite=True) == [f"{place}: {WRITTEN}"]
        assert files(place) == {"scenario.yaml", "rounds.jsonl", "summary.json", LOCK}
    assert files(own) == {"scenario.yaml", "rounds.jsonl", "summary.json"}


def test_a_finished_twin_is_used_while_its_process_still_ends(tmp_path: Path) -> None:
    scenario = attacked()
    with writing(run_in(place_of(scenario, tmp_path))):
        assert len(plan([scenario], tmp_path)) == 1


def test_a_folder_is_locked_by_one_process_and_bears_no_trace_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    assert not is_written(folder)
    with writing(folder):
        assert is_written(folder)
        with pytest.raises(UserError, match="is being written by another fedbd run"), writing(folder):
            pass
        assert is_written(folder)
    assert not is_written(folder)
    assert files(folder) == set()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "quiet" / "seed-0"
    folder.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(folder / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_written(folder)
        assert refusal([quiet()], tmp_path) == [f"{folder}: {WRITTEN}"]
        process.kill()
        process.wait()
    assert files(folder) == {LOCK}
    assert not is_written(folder)
    assert len(plan([quiet()], tmp_path)) == 1
    with writing(folder):
        assert is_written(folder)


def test_a_lock_file_makes_no_folder_a_runs(tmp_path: Path) -> None:
    folder = tmp_path / "quiet" / "seed-0"
    folder.mkdir(parents=True)
    (folder / LOCK).touch()
    (folder / "thesis.tex").write_text("years of work")
    assert "must be new, empty or a run's folder" in refusal([quiet()], tmp_path, overwrite=True)[0]


# Checkpoints.


SILENT = """
import random

from flwr.serverapp.strategy import FedAvg


class Silent(FedAvg):
    mean_only = True

    def __init__(self):
        super().__init__()
        self.dice = random.Random(1)
"""


def test_a_strategy_that_no_checkpoint_can_hold_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent_strategy.py").write_text(SILENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    strategy = {"name": "silent_strategy:Silent"}
    [problem] = refusal([quiet(strategy=strategy)], tmp_path / "runs")
    assert problem == (
        "quiet: checkpoint: cannot hold what the strategy keeps: Silent.dice is a random.Random; set checkpoint: null, "
        "or give the class state_dict and load_state_dict"
    )
    assert len(plan([quiet(strategy=strategy, checkpoint="off")], tmp_path / "runs")) == 1


@pytest.mark.parametrize("status", ["failed", "finished"])
def test_an_unfinished_run_is_named_with_the_way_on(tmp_path: Path, status: str) -> None:
    folder = run_in(tmp_path / "quiet" / "seed-0", status, rounds=2)
    [problem] = refusal([quiet()], tmp_path)
    assert (f"continue it with `fedbd resume {folder}`" in problem) == (status == "failed")
    assert "pass --overwrite to replace it" in problem
