"""``fedbd resume`` as a user meets it: a failed run goes on, a finished one is compared, anything else is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedbd
from fedbd.records.record import same_records

ROOT = Path(fedbd.__file__).resolve().parent.parent
SCENARIO: dict[str, Any] = {
    "name": "small",
    "seed": 1,
    "rounds": 3,
    "data": "digits",
    "partition": {"name": "iid", "clients": 2},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {"epochs": 1, "batch_size": 64, "lr": 0.05},
    "local_defense": {"name": "someones:Flaky"},
    "engine": {"executor": "serial"},
}
SOMEONES = '''
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedbd.training import train


@dataclass(frozen=True, kw_only=True)
class Flaky:
    """Fails in its third round as long as a file is there."""

    def fit(self, model, data, plan, memory, rng):
        rounds = int(memory.get("rounds", np.array(0))) + 1
        if rounds == 3 and Path("FOLDER/broken").exists():
            raise RuntimeError("the third round is too much")
        notes = train(model, data, plan, rng)
        return {"rounds": np.array(rounds)}, {**notes, "rounds": rounds}
'''


def say(where: Path, *words: str) -> tuple[int, str]:
    """Run a command; return its status and all that it says."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{where}", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedbd", *words]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_a_failed_run_goes_on_once_its_cause_is_gone(tmp_path: Path) -> None:
    (tmp_path / "someones.py").write_text(SOMEONES.replace("FOLDER", str(tmp_path)))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(SCENARIO))
    (tmp_path / "broken").touch()
    status, said = say(tmp_path, "run", "a.yaml")
    assert status == 1, said
    assert "the third round is too much" in said
    status, said = say(tmp_path, "run", "a.yaml")
    assert status == 2, said
    folder = "runs/small/seed-1"
    expected = f"{folder}: holds an earlier run that did not finish; continue it with `fedbd resume {folder}`"
    assert expected in " ".join(said.split())
    assert say(tmp_path, "resume", folder)[0] == 1  # its cause is still there
    (tmp_path / "broken").unlink()
    status, said = say(tmp_path, "resume", folder, folder)
    assert status == 0, said
    assert f"{folder}: goes on after round 2" in said
    assert "small seed 1  done after 3 rounds" in said
    assert said.count("round 3/3") == 1
    assert say(tmp_path, "run", "a.yaml", "--out", "whole", "--quiet") == (0, "")
    assert same_records(tmp_path / folder, tmp_path / "whole" / "small" / "seed-1") == []
    status, said = say(tmp_path, "resume", folder, "--json", "--quiet")
    assert status == 0
    [run] = json.loads(said)["runs"]
    assert run["summary"]["resumed_from"] == [2, 2]
    status, said = say(tmp_path, "resume", folder)
    assert status == 0
    assert f"{folder}: has finished already" in said


@pytest.mark.parametrize("as_json", [False, True])
def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, as_json: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "central.yaml").touch()
    status, said = say(tmp_path, "resume", "none", "empty", "training", *(["--json"] if as_json else []))
    assert status == 2
    if as_json:
        assert [problem["path"] for problem in json.JSONDecoder().raw_decode(said)[0]["problems"]] == [
            "none",
            "empty",
            "training",
        ]
    else:
        assert "none: must be the folder of a run, got no folder; start it with `fedbd run`" in said
        assert "empty: must be the folder of a run, got a folder without scenario.yaml" in said
        assert "repeat the `fedbd train` that began it" in said
        assert "Traceback" not in said
