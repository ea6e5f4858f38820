"""The temporary folder of a run's observations: made, removed, and cleared up after those that were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedbd.flower.observer import PREFIX, YOUNG, collect, observations, observe

DIES = """
import os, signal
from fedbd.flower.observer import observations
with observations() as folder:
    (folder / "1").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def aged(place: Path) -> Path:
    """Make a folder look as if nobody had written to it for a while."""
    then = time.time() - YOUNG - 1
    os.utime(place, (then, then))
    return place


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_run_left_is_removed_and_nothing_else(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    assert subprocess.run([sys.executable, "-c", DIES], env=environment, check=False).returncode == -9
    (left,) = temporary.glob(f"{PREFIX}*")
    (temporary / "elses").mkdir()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "elses")
    with observations() as young:  # the one that was left may still be waiting for its lock
        assert left.is_dir()
        aged(left)
        aged(young)
        with observations() as second:
            assert not left.exists()
            assert young.is_dir()  # it is locked
            assert second.is_dir()
    assert sorted(entry.name for entry in temporary.iterdir()) == ["elses", f"{PREFIX}link"]


def test_a_folder_that_goes_while_it_is_made_is_a_round_that_is_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBD_OBSERVER", str(temporary))
    context = Context(run_id=1, node_id=7, node_config={"partition-id": 5}, state=RecordDict(), run_config={})
    (temporary / "3").mkdir()
    looked = []

    def gone(path: Path) -> bool:  # what mkdir(exist_ok=True) asks once the system has said that the folder exists
        looked.append(path)
        path.rmdir()
        return False

    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_dir", gone)
        observe("train", {"loss": 0.5}, context, 3)
    assert looked == [temporary / "3"]
    assert collect(temporary, 3) == {}


def test_a_client_that_still_writes_disturbs_no_collection(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBD_OBSERVER", str(temporary))
    context = Context(run_id=1, node_id=7, node_config={"partition-id": 5}, state=RecordDict(), run_config={})
    stopped, failed = threading.Event(), []

    def write() -> None:
        try:
            while not stopped.is_set():
                observe("train", {"loss": 0.5}, context, 3)
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [collect(temporary, 3) for _ in range(500)]
    finally:
        stopped.set()
        writer.join()
    assert failed == []
    assert {json.dumps(each) for each in seen} == {"{}", '{"5": {"train": {"loss": 0.5}}}'}
