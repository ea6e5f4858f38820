"""What the engine costs when clients cost nothing: memory over the population, time and server memory over the cohort.

    python benchmarks/scale.py population [--clients 100 1000 10000]
    python benchmarks/scale.py cohort [--clients 1000] [--executor serial process]
    python benchmarks/scale.py server [--clients 10 100 400] [--encrypted]
    python benchmarks/scale.py start [--rounds 5]

``population``: PSS of all processes of ``fedbd run``, ten clients a round. ``cohort``: seconds of a round of idle
clients. ``server``: PSS of the server with a model of 1 M weights. ``start``: seconds from ``fedbd run`` to the first
round of the quickstart, so many times.

PSS shares what processes have in common among them (/proc/PID/smaps_rollup), and is sampled every 50 ms; the largest
sum counts. CPU seconds stand beside wall seconds: on a machine with other work only the former mean something.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg

from fedbd.crypto.agent_client import start_agent
from fedbd.crypto.ckks import Ckks
from fedbd.defenses.aggregation.mean import Mean
from fedbd.flower.arrays import pack_all
from fedbd.flower.executors import ProcessPoolExecutor, SerialExecutor
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.strategy import DefendedStrategy
from fedbd.records.environment import cores

APP = (Path(__file__).resolve().parent / "idle_app.py", "app")
QUICKSTART = Path(__file__).resolve().parent.parent / "scenarios" / "quickstart.yaml"
SCENARIO = """\
name: population
rounds: 3
data: {{name: generated, samples: 20000, shape: [1, 8, 8]}}
partition: {{name: iid, clients: {clients}}}
cohort: {{size: 10}}
model: {{name: cnn, width: 4}}
training: {{epochs: 1}}
attacks:
  - {{name: badnets, clients: {{share: 0.1}}, target: 0, trigger: grid}}
evaluation: {{twin: false}}
"""


def pss(pids: list[int]) -> int:
    """Return the proportional set size of some processes together, in bytes; those that have ended count nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def watched(command: list[str], *, whole: bool) -> tuple[int, str]:
    """Run a command; return the largest PSS of it (``whole``: and of its family), and what it printed."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        most = 0
        while process.poll() is None:
            most = max(most, pss(family(process.pid) if whole else [process.pid]))
            time.sleep(0.05)
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return most, text


def population(sizes: list[int]) -> None:
    """Print the memory of a whole run for several populations."""
    for clients in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "population.yaml")
            file.write_text(SCENARIO.format(clients=clients), encoding="utf-8")
            most, _ = watched([sys.executable, "-m", "fedbd", "run", str(file), "--out", folder], whole=True)
        print(f"population {clients:6d}, ten a round: {most / 1e6:7.1f} MB in all processes", flush=True)


def cohort(clients: int, executor: str, weights: int, rounds: int, encrypted: bool) -> None:
    """Print wall and CPU seconds per round of idle clients; round 1, in which workers read the app, apart."""
    logging.getLogger("flwr").disabled = True
    torch.set_num_threads(1)
    marks: list[tuple[float, float]] = []

    def mark(_: object = None) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with contextlib.ExitStack() as stack:
        scheme = Ckks() if encrypted else None
        env = {"FEDBD_KEY_AGENT": stack.enter_context(start_agent(scheme)).handle} if scheme is not None else {}
        os.environ.update(env)
        pool = SerialExecutor(APP) if executor == "serial" else ProcessPoolExecutor(APP, cores(), worker_env=env)
        grid = LocalGrid(stack.enter_context(pool), clients)
        inner = FedAvg(fraction_evaluate=0.0)
        strategy = DefendedStrategy(inner, aggregation=Mean(), secure_sum=scheme, clients=clients, after_round=mark)
        mark()
        strategy.start(grid, pack_all({"w": np.zeros(weights, np.float32)}), num_rounds=rounds)
    for number, (wall, cpu) in enumerate(steps(marks), start=1):
        load = os.getloadavg()[0]
        print(
            f"{clients} idle clients, {executor}, {weights} weights, round {number}: {wall:.2f} s wall, "
            f"{cpu:.2f} s CPU of the driver, load {load:.1f}",
            flush=True,
        )


def start(turns: int) -> None:
    """Print how long the quickstart takes until its first round begins: until the line of round 0 is written."""
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            line = Path(folder, "quickstart", "seed-5", "rounds.jsonl")
            command = [sys.executable, "-m", "fedbd", "run", str(QUICKSTART), "--out", folder, "--no-twin", "-q"]
            started = time.perf_counter()
            process = subprocess.Popen(command)
            while not (line.exists() and line.stat().st_size) and process.poll() is None:
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            if process.wait():
                raise SystemExit("the quickstart failed")
        print(f"quickstart, start to first round: {seconds:.2f} s, load {os.getloadavg()[0]:.1f}", flush=True)


def steps(marks: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the differences of successive marks."""
    for before, after in itertools.pairwise(marks):
        yield after[0] - before[0], after[1] - before[1]


def server(sizes: list[int], weights: int, encrypted: bool) -> None:
    """Print the server's memory for several cohorts."""
    for clients in sizes:
        more = ["--encrypted"] if encrypted else []
        command = [sys.executable, __file__, "cohort", "--clients", str(clients), "--weights", str(weights)]
        most, _ = watched([*command, "--rounds", "2", "--executor", "process", *more], whole=False)
        kind = "encrypted" if encrypted else "in the clear"
        print(
            f"{clients:5d} clients a round, {weights} weights, {kind}: {most / 1e6:7.1f} MB in the server", flush=True
        )


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("population", "cohort", "server", "start"))
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--executor", nargs="+", choices=("serial", "process"), default=["serial", "process"])
    parser.add_argument("--weights", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encrypted", action="store_true")
    given = parser.parse_args()
    if given.what == "population":
        population(given.clients or [100, 1000, 10000])
    elif given.what == "start":
        start(given.rounds)
    elif given.what == "server":
        server(given.clients or [10, 100, 400], given.weights or 1_000_000, given.encrypted)
    else:
        for clients in given.clients or [1000]:
            for executor in given.executor:
                cohort(clients, executor, given.weights or 1000, given.rounds, given.encrypted)


if __name__ == "__main__":
    main()
