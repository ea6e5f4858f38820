"""Seconds of one round of the standard protocol, by phase, beside a bare PyTorch loop over as many images.

    FEDBD_DATA=/path/to/data python benchmarks/round.py [--rounds 4] [--repeats 3] [--scenario FILE] [--json FILE]

The bare loop is the limit: as many processes as fedbd has workers, one thread each, the same model, batch size, dtype,
memory format and optimizer, tensors in memory, and nothing else. fedbd and the loop take turns, so that both see the
same machine; the ratio is formed pair by pair. Round 1 of each run (workers start, caches fill) is not counted.
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

from fedbd.environment import cores
from fedbd.prepared import prepare
from fedbd.runs import run
from fedbd.scenario import Scenario, load_scenario
from fedbd.training import memory_format_of, sgd

PHASES = ("train", "encrypt", "aggregate", "decrypt", "cleanup", "detect", "evaluate", "total")


def bare_worker(scenario: Scenario, images: int, times: int, start: Barrier, done: Barrier) -> None:
    """Train ``images`` images in batches between two barriers, ``times`` times."""
    torch.set_num_threads(1)
    prepared = prepare(scenario)
    model = prepared.new_model()
    optimizer = sgd(model, scenario.training)
    layout = memory_format_of(model)
    size = scenario.training.batch_size
    x, y = prepared.dataset.train.batch(torch.arange(50 * size))
    batches = [(x[i : i + size].contiguous(memory_format=layout), y[i : i + size]) for i in range(0, len(y), size)]

    def steps(count: int) -> None:
        for i in range(count):
            x, y = batches[i % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    steps(20)
    for _ in range(times):
        start.wait()
        steps(images // size)
        done.wait()


def bare_seconds(scenario: Scenario, images: int, workers: int, times: int) -> list[float]:
    """Return the seconds that ``workers`` bare loops need for so many images together, ``times`` times."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(workers + 1), context.Barrier(workers + 1)
    share = images // workers
    processes = [
        context.Process(target=bare_worker, args=(scenario, share, times, start, done)) for _ in range(workers)
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
    bare = statistics.mean(bare_seconds(scenario, int(statistics.mean(images)), workers, len(lines)))
    return {
        "images": statistics.mean(images),
        "seconds": {name: statistics.mean(values) if None not in values else None for name, values in seconds.items()},
        "bare": bare,
        "ratio": bare / statistics.mean(seconds["train"]),
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
    print(f"  {'images':<10} {statistics.median(turn['images'] for turn in turns):7.0f} trained a round")
    print(f"  {'bare loop':<10} {statistics.median(turn['bare'] for turn in turns):7.3f} s for as many images")
    ratios = sorted(turn["ratio"] for turn in turns)
    print(f"  {'ratio':<10} {statistics.median(ratios):7.2f} (bare / train; {ratios[0]:.2f} .. {ratios[-1]:.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=2))


if __name__ == "__main__":
    main()
