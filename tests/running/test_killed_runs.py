"""Runs that are killed, the whole process group at once, at seeded random moments, go on to the same records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbd
from fedbd.config.scenario import from_dict
from fedbd.flower.supervisor import descendants
from fedbd.records.record import read_rounds, read_summary, same_records
from fedbd.running.runs import run

ROOT = Path(fedbd.__file__).resolve().parent.parent
PATIENCE = 600.0
BASE: dict[str, Any] = {
    "name": "killed",
    "seed": 7,
    "rounds": 24,
    "data": "digits",
    "partition": {"name": "iid", "clients": 4},
    "cohort": {"size": 3},
    "trusted": {"size": 60},
    "model": {"name": "cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 64, "lr": 0.05, "lr_decay": 0.95},
    "attacks": [{"name": "badnets", "clients": {"ids": [0]}, "target": 0, "trigger": "grid", "rounds": {"first": 2}}],
    "evaluation": {"twin": False},
    "engine": {"workers": 2},
}
POLLUTED = {**BASE["attacks"][0], "role": "polluted", "per": "dataset", "share": 0.1, "rounds": {"first": 1}}
CKKS = {"name": "ckks"}
CASES: dict[str, dict[str, Any]] = {
    "fedavg-faults": {
        "faults": [
            {"kind": "raise", "clients": {"count": 1}, "probability": 0.4},
            {"kind": "die", "clients": {"count": 1}, "probability": 0.3, "rounds": {"first": 3}},
        ],
        "on_client_failure": "skip",
    },
    "fedavgm-ckks": {
        "secure_sum": CKKS,
        "strategy": {"name": "fedavgm", "arguments": {"server_momentum": 0.3}},
        "checkpoint": {"every": 2},
    },
    "fedadam-abl": {
        "attacks": [POLLUTED],
        "local_defense": {"name": "abl", "isolate_after": 2, "confidence": None},
        "strategy": {"name": "fedadam", "arguments": {"eta": 0.02}},
    },
    "mask-relearning-ckks": {
        "secure_sum": CKKS,
        "cleanup": [
            {"name": "clp", "u": 1.0, "rounds": [2], "mode": "in_loop", "mask": "persist", "rollback": None},
            {"name": "finetune", "epochs": 1, "rounds": [5]},
        ],
        "strategy": {"name": "fedadam", "arguments": {"eta": 0.02}},
        "evaluation": {"twin": False, "relearn": [1, 2]},
    },
}


def command(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start fedbd in a process group of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "fedbd", *words],
            cwd=folder,
            env=env,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def kill_after(process: subprocess.Popen[bytes], run_dir: Path, lines: int, delay: float) -> bool:
    """Kill a command's group so many seconds after its run has so many lines; return False if it ended before."""
    deadline = time.monotonic() + PATIENCE
    while len(read_rounds(run_dir)) < lines and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)
    time.sleep(delay)
    family = list(descendants(process.pid))
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20.0
    while any(alive(pid) for pid in family):
        assert time.monotonic() < deadline, f"processes outlive the run: {[pid for pid in family if alive(pid)]}"
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed_often(tmp_path: Path, case: dict[str, Any], kills: int, rng: np.random.Generator) -> tuple[Path, list[int]]:
    """Kill a run so often, at random moments, then let it end; return its folder and how many lines each kill found."""
    (tmp_path / "scenario.yaml").write_text(json.dumps({**BASE, **case}))
    folder = tmp_path / "runs" / "killed" / "seed-7"
    moments: list[int] = []
    words: Sequence[str] = ("run", "scenario.yaml", "--quiet")
    for _ in range(kills):
        more = len(read_rounds(folder)) + int(rng.integers(1, 3))
        if not kill_after(command(tmp_path, *words), folder, more, float(rng.uniform(0, 1.0))):
            break
        if (read_summary(folder) or {}).get("status") == "finished":  # only its command still ran
            break
        moments.append(len(read_rounds(folder)))
        if folder.joinpath("scenario.yaml").exists():
            words = ("resume", str(folder), "--quiet")
    last = command(tmp_path, *words)
    assert last.wait(PATIENCE) == 0, (tmp_path / "said.txt").read_text()
    return folder, moments


def check(tmp_path: Path, name: str, kills: int, least: int) -> None:
    case = CASES[name]
    rng = np.random.default_rng([11, list(CASES).index(name)])
    folder, moments = killed_often(tmp_path, case, kills, rng)
    whole = run(from_dict({**BASE, **case}), tmp_path / "whole")
    assert same_records(whole.path, folder) == []
    found, wanted = read_summary(folder) or {}, whole.summary
    assert found["relearning"] == wanted["relearning"]
    assert found["clean_accuracy"] == wanted["clean_accuracy"]
    assert (folder / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert len(moments) >= least, moments
    assert len(found["resumed_from"]) == len(moments)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    check(tmp_path, "mask-relearning-ckks", kills=2, least=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_five_kills_change_no_record(tmp_path: Path, name: str) -> None:
    check(tmp_path, name, kills=5, least=4)
