"""Seconds of one round of the standard protocol, by phase, beside a bare PyTorch loop over as many images.

    FEDBD_DATA=/path/to/data python benchmarks/round.py [--rounds 4] [--repeats 3] [--scenario FILE] [--json FILE]

The bare loops are the limit: as many processes as fedbd has workers, one thread each, the same model, batch size,
dtype, memory format and optimizer, tensors in memory, and nothing else; one trains, one evaluates in chunks as large
as fedbd's. fedbd and the loops take turns, so that all see the same machine; ratios are formed pair by pair.
Round 1 of each run (workers start, caches fill) is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from fedbd.config.scenario import Scenario, load_scenario
from fedbd.estimate import CHUNK
from fedbd.prepared import prepare
from fedbd.records.environment import cores
from fedbd.running.runs import run
from fedbd.training import memory_format_of, sgd

PHASES = ("train", "encrypt", "aggregate", "decrypt", "cleanup", "detect", "evaluate", "total")


def bare_worker(kind: str, scenario: Scenario, images: int, times: int, start: Barrier, done: Barrier) -> None:
    """Train or evaluate ``images`` images in batches between two barriers, ``times`` times."""
    torch.set_num_threads(1)
    prepared = prepare(scenario)
    model = prepared.new_model()
    optimizer = sgd(model, scenario.training)
    layout = memory_format_of(model)
    size = scenario.training.batch_size if kind == "train" else CHUNK
    x, y = prepared.dataset.train.batch(torch.arange(50 * size))
    batches = [(x[i : i + size].contiguous(memory_format=layout), y[i : i + size]) for i in range(0, len(y), size)]

    def steps(count: int) -> None:
        if kind == "evaluate":
            with torch.inference_mode():
                model.eval()
                for i in range(count):
                    model(batches[i % len(batches)][0])
            return
        for i in range(count):
            x, y = batches[i % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    steps(20)
    for _ in range(times):
        start.wait()
        steps(round(images / size))
        done.wait()


def bare_seconds(kind: str, scenario: Scenario, images: int, workers: int, times: int) -> list[float]:
    """Return the seconds that ``workers`` bare loops need for so many images together, ``times`` times."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(workers + 1), context.Barrier(workers + 1)
    share = images // workers
    processes = [
        context.Process(target=bare_worker, args=(kind, scenario, share, times, start, done)) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    seconds = []
    for _ in range(times):
        start.wait()
        began = time.perf_counter()
        done.wait()
        seconds.append(time.perf_counter() - began)
    for process in processes:
        process.join()
    return seconds


def one_turn(scenario: Scenario, workers: int) -> dict[str, Any]:
    """Run fedbd, then the bare loop over the mean number of images of its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        lines = run(scenario, folder).rounds[2:]
    images = [sum(notes["images"] for notes in line["notes"]["clients"].values()) for line in lines]
    seconds = {name: [line["seconds"][name] for line in lines] for name in PHASES}
    measured = [
        line["evaluated_samples"] + sum(attack["evaluated_samples"] for attack in line["per_attack"].values())
        for line in lines
    ]
    bare = {
        kind: statistics.mean(bare_seconds(kind, scenario, int(statistics.mean(count)), workers, len(lines)))
        for kind, count in (("train", images), ("evaluate", measured))
    }
    return {
        "images": {"train": statistics.mean(images), "evaluate": statistics.mean(measured)},
        "seconds": {name: statistics.mean(values) if None not in values else None for name, values in seconds.items()},
        "bare": bare,
        "ratio": {kind: each / statistics.mean(seconds[kind]) for kind, each in bare.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", type=Path, default=Path(__file__).parent.parent / "scenarios/mnist-standard.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = [
        "attacks[0].rounds={first: 1}",
        "cohort.attackers_per_round=1",
        "secure_sum=null",
        "bucket_size=1",
        "evaluation.twin=false",
        f"rounds={arguments.rounds}",
        f"engine.workers={arguments.workers}",
        *arguments.settings,
    ]
    scenario = load_scenario(arguments.scenario, settings)
    turns = [
        one_turn(dataclasses.replace(scenario, seed=scenario.seed + i), arguments.workers)
        for i in range(arguments.repeats)
    ]
    middle = {
        name: statistics.median(turn["seconds"][name] for turn in turns)
        for name in PHASES
        if all(turn["seconds"][name] is not None for turn in turns)
    }
    load = os.getloadavg()[0]
    print(
        f"{scenario.name}: {arguments.workers} workers, {platform.processor() or platform.machine()}, load {load:.1f}"
    )
    print(f"torch {torch.__version__}; {arguments.repeats} turns of {arguments.rounds - 1} counted rounds; medians")
    for name, value in middle.items():
        print(f"  {name:<10} {value:7.3f} s")
    for kind in ("train", "evaluate"):
        count, bare = (statistics.median(turn[what][kind] for turn in turns) for what in ("images", "bare"))
        ratios = sorted(turn["ratio"][kind] for turn in turns)
        middle_ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {kind:<10} {count:7.0f} images; bare {bare:.3f} s; bare / fedbd {middle_ratio}")
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=2))


if __name__ == "__main__":
    main()
