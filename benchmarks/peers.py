"""BlazeFL's workload under fedbd's own engine and under Flower's Ray engine: the same app on the same machine.

    FEDBD_DATA=/path/to/data python benchmarks/peers.py [--clients 100] [--rounds 5] [--epochs 5] [--model cnn]
        [--data FILE.yaml] [--engines local ray] [--workers N] [--repeats 1] [--json FILE]

The workload is BlazeFL's (https://arxiv.org/abs/2604.03606): CIFAR-10, 100 clients of which all take part, 5 rounds, 5
local epochs, batches of 50, plain FedAvg, a small CNN or a ResNet-18. Smaller numbers make a smaller run; what was run
is printed. Engines take turns. ``whole`` is the command from start to end, ``rounds`` the sum of the rounds' seconds
from the record; ``cpu`` is what all of its processes computed, looked up five times a second: a busy machine stretches
the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from scale import family

from fedbd.records.environment import cores
from fedbd.records.record import read_rounds

CIFAR10 = {"name": "cifar10"}


def scenario(given: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Return the workload as a scenario of one engine."""
    data = yaml.safe_load(Path(given.data).read_text(encoding="utf-8")) if given.data else CIFAR10
    return {
        "name": f"peers-{engine}",
        "rounds": given.rounds,
        "data": data,
        "partition": {"name": "iid", "clients": given.clients},
        "model": {"name": given.model},
        "training": {"epochs": given.epochs, "batch_size": 50, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0},
        "evaluation": {"twin": False, "every": given.rounds},
        "engine": {"name": engine, "workers": given.workers},
    }


def note_cpu(pid: int, used: dict[int, float]) -> None:
    """Note the CPU seconds that a process and its family have used so far, by process."""
    for each in family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            used[each] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(given: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Run the workload once; return its seconds and what its model was at the end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "peers.yaml")
        file.write_text(yaml.safe_dump(scenario(given, engine)), encoding="utf-8")
        command = [sys.executable, "-m", "fedbd", "run", str(file), "--out", folder]
        used: dict[int, float] = {}
        started = time.perf_counter()
        with open(Path(folder, "output.txt"), "w+", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            while process.poll() is None:
                note_cpu(process.pid, used)
                time.sleep(0.2)
            whole = time.perf_counter() - started
            if process.returncode:
                out.seek(0)
                raise SystemExit(f"engine {engine} failed:\n{out.read()}")
        lines = read_rounds(Path(folder, f"peers-{engine}", "seed-0"))
    seconds = [line["seconds"]["total"] for line in lines[1:]]
    end = lines[-1]
    return {
        "engine": engine,
        "whole": whole,
        "rounds": sum(seconds),
        "later_round": statistics.median(seconds[1:] or seconds),
        "cpu": sum(used.values()),
        "clean_accuracy": end["clean_accuracy"],
        "weights_sha256": end["weights_sha256"],
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--model", default="cnn")
    parser.add_argument(
        "--data", help="a YAML file with a scenario's data section; default: CIFAR-10 as torchvision has it"
    )
    parser.add_argument("--engines", nargs="+", choices=("local", "ray"), default=["local", "ray"])
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    what = (
        f"{given.clients} clients, all of them, {given.rounds} rounds, {given.epochs} epochs, batch 50, {given.model}"
    )
    print(f"{what}, {given.workers} workers, {cores()} cores", flush=True)
    found = []
    for _ in range(given.repeats):
        for engine in given.engines:
            found.append(measured(given, engine))
            print(
                "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items()),
                flush=True,
            )
    if len({row["weights_sha256"] for row in found}) > 1:
        raise SystemExit("the engines did not compute the same model")
    if given.json:
        given.json.write_text(json.dumps({"what": what, "runs": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
