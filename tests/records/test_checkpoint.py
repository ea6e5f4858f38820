"""A checkpoint is whole or it is not there; damage is found; only what wrote it goes on from it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbd.errors import CheckpointError, RunFailed
from fedbd.records import checkpoint as module
from fedbd.records.checkpoint import (
    FOLDER,
    Checkpoint,
    Stamp,
    can_resume,
    differences,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)

STAMP = Stamp(scenario="s", data="d", code="c", versions={"torch": "2.13"})


def state(round_: int) -> dict[str, Any]:
    return {"weights": np.arange(50, dtype=np.float32) + round_, "note": f"round {round_}", "by": {3: [1.5, None]}}


def write(folder: Path, *rounds: int) -> None:
    for round_ in rounds:
        write_checkpoint(folder, Checkpoint(round=round_, stamp=STAMP, state=state(round_)))


def read(folder: Path) -> Checkpoint:
    found = read_checkpoint(folder)
    assert found is not None
    return found


def test_small_arrays_of_any_type_and_large_ones_come_back(tmp_path: Path) -> None:
    arrays = [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.array(2.5),
        np.zeros((0, 4), np.float32),
        np.array(["a", "ü"]),
        np.array([True, False]),
        np.arange(6, dtype=">i2"),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(40_000, dtype=np.float32)[::2],
        np.float32(0.1),
    ]
    write_checkpoint(tmp_path, Checkpoint(round=1, stamp=STAMP, state=arrays))
    found = read(tmp_path).state
    assert [type(array) for array in found] == [type(array) for array in arrays]
    for one, other in zip(found, arrays, strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        if one.size and one.ndim:
            one[:1] = one[-1:]  # what a method remembers it may change


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / FOLDER).iterdir())


def test_the_last_two_are_kept_and_the_last_is_read(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    write(tmp_path, 1, 2, 10)
    assert files(tmp_path) == ["round-10.json", "round-10.npz", "round-2.json", "round-2.npz"]
    found = read(tmp_path)
    assert (found.round, found.stamp, found.damaged) == (10, STAMP, ())
    assert found.state["note"] == "round 10"
    assert found.state["by"] == {3: [1.5, None]}
    assert np.array_equal(found.state["weights"], state(10)["weights"])
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["round-2.json", "round-2.npz"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_the_one_before_stands_in_for_a_damaged_one(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1, 2)
    file = tmp_path / FOLDER / name
    if damage == "removed":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "truncated" else 0)
    found = read(tmp_path)
    assert (found.round, found.state["note"]) == (1, "round 1")
    if (name, damage) != ("round-2.json", "removed"):  # without it there is no second checkpoint
        assert "round-2.json: must be a whole checkpoint" in found.damaged[0]
    write(tmp_path, 2)
    assert (read(tmp_path).round, read(tmp_path).damaged) == (2, ())


@pytest.mark.parametrize("name", ["round-1.json", "round-1.npz"])
def test_no_flipped_bit_goes_unseen(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    file = tmp_path / FOLDER / name
    whole = file.read_bytes()
    rng = np.random.default_rng(4)
    for position in rng.choice(len(whole), size=60, replace=False):
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(broken))
        with pytest.raises(CheckpointError) as refused:
            read_checkpoint(tmp_path)
        assert "must be a whole checkpoint" in str(refused.value)
        assert f"remove {tmp_path / FOLDER}, and the run starts from its first round again" in str(refused.value)
        assert not can_resume(tmp_path, STAMP)
    file.write_bytes(whole)
    assert read(tmp_path).round == 1


@pytest.mark.parametrize("text", ['"abc"', "[]", "{}", "[" * 100_000])
def test_one_that_is_no_checkpoint_costs_only_itself(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / FOLDER / "round-2.json").write_text(text)
    found = read(tmp_path)
    assert (found.round, len(found.damaged)) == (1, 1)


def test_another_form_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    file = tmp_path / FOLDER / "round-2.json"
    body = json.loads(file.read_text())
    del body["seal"]
    body["version"] = 99
    file.write_text(json.dumps({**body, "seal": module._seal(body)}))
    with pytest.raises(CheckpointError, match="must be of form fedbd checkpoint 2, got fedbd checkpoint 99"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("step", range(8))
def test_an_end_at_any_step_of_writing_leaves_a_whole_one(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 2)
    steps = iter(range(100))

    def dying(name: str) -> None:
        real = getattr(os, name)

        def act(*arguments: Any, **options: Any) -> Any:
            if next(steps) >= step:
                raise KeyboardInterrupt  # as a kill: nothing after it happens, and nobody cleans up
            return real(*arguments, **options)

        monkeypatch.setattr(module.os, name, act)

    for name in ("fsync", "replace", "unlink"):
        dying(name)
    try:
        write(tmp_path, 3)
        ended = False
    except KeyboardInterrupt:
        ended = True
    monkeypatch.undo()
    found = read(tmp_path)
    assert found.round == (3 if step >= 4 else 2)  # two files, each synced and renamed, make it
    assert found.state["note"] == f"round {found.round}"
    assert ended == (step < 7)  # then the folder is synced, and the two files of round 1 are removed
    write(tmp_path, 3)
    assert files(tmp_path) == ["round-2.json", "round-2.npz", "round-3.json", "round-3.npz"]
    assert read(tmp_path).round == 3


def test_what_cannot_be_saved_or_written_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"round 3: no checkpoint can hold this: x is a .*; set checkpoint: null"):
        write_checkpoint(tmp_path, Checkpoint(round=3, stamp=STAMP, state={"x": object()}))
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(RunFailed, match=r"cannot be written: .*make room and go on with `fedbd resume`"):
        write(tmp_path, 1)


def test_only_what_wrote_it_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert differences(STAMP, STAMP, "run") == []
    assert not can_resume(tmp_path, STAMP)  # the lines of its rounds are not there
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    assert can_resume(tmp_path, STAMP)
    other = dataclasses.replace(STAMP, scenario="t")
    for anyway in (False, True):
        [problem] = differences(STAMP, other, "run", other_code=anyway)
        assert str(problem).startswith("run: is of another scenario than the scenario.yaml beside it; put")
    changed = Stamp(scenario="s", data="d", code="d", versions={"torch": "2.15"})
    [problem] = differences(STAMP, changed, "run")
    assert "(torch 2.13 became 2.15, fedbd's own sources changed)" in str(problem)
    assert "pass --other-code" in str(problem)
    assert differences(STAMP, changed, "run", other_code=True) == []
    assert not can_resume(tmp_path, changed)
