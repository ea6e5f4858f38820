"""The commands of the README for plain ``flwr run .``, as they stand there, on a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedbd
from fedbd.config.scenario import load_scenario
from fedbd.flower.command_line import free_ports
from fedbd.records.record import read_rounds, read_summary
from fedbd.running.runs import run

pytestmark = pytest.mark.flower

ROOT = Path(fedbd.__file__).resolve().parent.parent
SCENARIO = """\
name: quickstart
seed: 3
rounds: 2
data: digits
partition: {name: iid, clients: 2}
model: {name: mlp, hidden: [8]}
training: {epochs: 1, batch_size: 64, lr: 0.05}
attacks:
  - {name: badnets, clients: {ids: [1]}, target: 0, trigger: grid}
"""
DECOY = "raise SystemExit('this is not the app')\n"


def commands() -> list[str]:
    """Return the two blocks of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    after = text.partition("<!-- commands: tests/flower/test_flwr_run.py runs these -->")[2]
    return re.findall(r"^```bash\n(.*?)^```", after, re.DOTALL | re.MULTILINE)


def fitted(block: str) -> str:
    """Return a block for this machine: free ports, two clients, the environment that runs the tests."""
    ports = free_ports(1)
    low = free_ports(1)[0]
    changes = {
        "$PWD/.venv/bin": str(Path(sys.executable).parent),
        "PORT=18000": f"PORT={ports[0]}",
        "19100": str(low),
        "num-supernodes=10": "num-supernodes=2",
        "num-partitions=10": "num-partitions=2",
        "{0..9}": "0 1",
    }
    for old, new in changes.items():
        block = block.replace(old, new)
    return block


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the app's files, with a small scenario; somebody else's ``server.py`` and ``clients.py`` above it."""
    place = tmp_path / "checkout"
    for name in ("clients", "server", "scenarios"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    (place / "scenarios" / "quickstart.yaml").write_text(SCENARIO)
    (tmp_path / "server.py").write_text(DECOY)
    (tmp_path / "clients.py").write_text(DECOY)
    return place


@pytest.fixture
def foreign() -> Iterator[list[bytes]]:
    """Somebody else's service on the port on which Flower looks for a SuperLink; what it is sent."""
    heard: list[bytes] = []
    with socket.socket() as service:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            service.bind(("127.0.0.1", 39091))
        except OSError:
            pytest.skip("somebody has Flower's port")
        service.listen()

        def serve() -> None:
            while True:
                try:
                    peer, _ = service.accept()
                    heard.append(peer.recv(100))
                    peer.close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield heard
        service.shutdown(socket.SHUT_RDWR)


def bash(block: str, folder: Path, mark: str) -> subprocess.CompletedProcess[str]:
    """Run a block as a shell with job control does, and see that nothing stays behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    environment |= {"PYTHONPATH": str(ROOT), "FEDBD_TEST_MARK": mark, "FLWR_TELEMETRY_ENABLED": "0", "NO_COLOR": "1"}
    file = folder / "commands.sh"
    file.write_text(f"set -m\n{block}")
    out = folder / "commands.log"
    with open(out, "w", encoding="utf-8") as log:
        done = subprocess.run(
            ["bash", str(file)], cwd=folder, env=environment, stdout=log, stderr=log, timeout=540, check=False
        )
    deadline = time.monotonic() + 30
    while (left := bearers(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, 9)
    assert left == [], "processes stayed behind"
    return subprocess.CompletedProcess(
        done.args, done.returncode, out.read_text(encoding="utf-8", errors="replace"), ""
    )


def bearers(mark: str) -> list[int]:
    """Return the processes whose environment holds a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"FEDBD_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def shared(line: dict[str, Any]) -> dict[str, Any]:
    """Return what a line holds whoever runs the app: all but times, observed notes and the floor of the twin."""
    names = ("round", "participants", "attackers", "clean_accuracy", "attack_success", "weights_sha256", "bytes_up")
    return {name: line[name] for name in names}


@pytest.mark.parametrize(("number", "out"), [(0, "simulated"), (1, "deployed")], ids=["simulation", "supernodes"])
def test_the_commands_give_the_records_of_fedbd_run(
    number: int, out: str, checkout: Path, tmp_path: Path, foreign: list[bytes]
) -> None:
    done = bash(fitted(commands()[number]), checkout, f"flwr-run-{number}-{os.getpid()}")
    folder = checkout / "runs" / out
    assert '"status": "finished"' in done.stdout, done.stdout[-3000:]
    assert foreign == []
    summary = read_summary(folder)
    scenario = load_scenario(
        checkout / "scenarios" / "quickstart.yaml", ["evaluation.twin=false", "engine.executor=serial"]
    )
    expected = run(scenario, tmp_path / "runs")
    assert [shared(line) for line in read_rounds(folder)] == [shared(line) for line in expected.rounds]
    assert summary is not None
    assert summary["versions"] == expected.summary["versions"]  # no other torch was installed for it
    assert not list((checkout / "runs" / "flwr-home").rglob("site-packages"))


def test_a_run_that_fails_does_not_pass_for_a_good_one(checkout: Path) -> None:
    (checkout / "scenarios" / "quickstart.yaml").write_text(SCENARIO.replace("lr: 0.05", "lr: 1.0e+30"))
    done = bash(fitted(commands()[0]), checkout, f"flwr-run-bad-{os.getpid()}")
    assert '"status": "finished"' not in done.stdout
    summary = json.loads((checkout / "runs" / "simulated" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["reason"]
