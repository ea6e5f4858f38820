"""Fields of the cleanups chosen for the model of the table, on seeds and images apart from those that are reported.

    fedbd train scenarios/central/cifar10-badnets.yaml -s name=cifar10-tuning -s held_out=5000 -s seed=12 --no-twin
    python benchmarks/cleanup_tuning.py run  runs/cifar10-tuning OUT --seeds 12 13
    python benchmarks/cleanup_tuning.py show OUT

Each method has eight trials. Half of the held-out images are there to trust, the other half to judge by: no test image
is seen. Chosen is the trial with the highest mean of CA - ASR, which takes the real trigger: a choice that a defender
could not make, and the same one for every method; and the one among those that acted on every seed and nowhere gave the
target class up. Each result is a file in OUT; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from central_table import PLAN, Arm, lost_target, one_seed, place, results_of

from fedbd.central.plan import CentralData, assemble_central, load_central

RATES = (0.1, 0.03, 0.01, 0.003)
TRIALS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "finetune": (2500, [{"lr": lr, "lr_drop_epoch": drop} for lr, drop in product(RATES, (2, 10))]),
    "nad": (2500, [{"lr": lr, "teacher_lr": lr, "lr_drop_epoch": drop} for lr, drop in product(RATES, (2, 10))]),
    "fine_pruning": (2500, [{"lr": lr, "keep_within": within} for lr, within in product(RATES, (0.02, 0.1))]),
    "rnp": (
        500,
        [
            {"unlearn_lr": ascent, "recover_lr": recovery, "keep_within": within}
            for ascent, recovery, within in product((0.01, 0.003), (0.05, 0.02), (0.05, 0.1))
        ],
    ),
    "clp": (500, [{"u": u} for u in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)]),
    "linf_pruning": (500, [{"keep_within": within} for within in (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)]),
    "flain": (500, [{"bound": bound} for bound in (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15)]),
}
"""Method -> how many clean images it gets, and its trials."""

COMMON: dict[str, dict[str, Any]] = {
    "rnp": {"augment": "crop_flip"},
    "linf_pruning": {"knowledge": "real", "oracle": True},
}


def trials() -> dict[str, Arm]:
    """Return the trials of all methods, by name."""
    return {
        f"{method} {number}": Arm(({"name": method, **COMMON.get(method, {}), **fields},), size)
        for method, (size, wanted) in TRIALS.items()
        for number, fields in enumerate(wanted, 1)
    }


def halved(data: CentralData) -> CentralData:
    """Return the data with every second held-out image as the test set, and the others to trust."""
    test = data.dataset.train.subset(data.held_out[1::2])
    return replace(data, dataset=replace(data.dataset, test=test), held_out=data.held_out[::2])


def run(folder: Path, out: Path, seeds: list[int], methods: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        plan = load_central(PLAN, [f"seed={seed}", "name=cifar10-tuning", "held_out=5000"])
        todo = {
            name: arm
            for name, arm in trials().items()
            if name.partition(" ")[0] in methods and not place(out, name, seed).exists()
        }
        if todo:
            one_seed(plan, halved(assemble_central(plan)), folder, out, todo)


def show(out: Path) -> None:
    print("| method | seeds | fields | CA % | target class | ASR % | highest CA - ASR | highest that keeps the class |")
    print("|---" * 8 + "|")
    arms = trials()
    for method, found in by_method(out).items():
        best = max(found, key=lambda name: gain(found[name]))
        keeping = [name for name, lines in found.items() if not any(map(lost_target, lines)) and acted(lines)]
        kept = max(keeping, key=lambda name: gain(found[name]), default=None)
        for name, lines in found.items():
            common = {"name", *COMMON.get(method, {})}
            fields = {key: value for key, value in arms[name].chain[0].items() if key not in common}
            text = ", ".join(f"{key} {value}" for key, value in fields.items())
            keys = ("clean_accuracy_after", "target_class_accuracy_after", "attack_success_after")
            cells = [method, str(len(lines)), text, *(f"{100 * mean(lines, key):.1f}" for key in keys)]
            print("| " + " | ".join([*cells, "yes" if name == best else "", "yes" if name == kept else ""]) + " |")


def by_method(out: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return what was measured: method -> trial -> a line for each seed."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, lines in results_of(out, trials()).items():
        found.setdefault(name.partition(" ")[0], {})[name] = list(lines.values())
    return found


def mean(lines: list[dict[str, Any]], key: str) -> float:
    return float(statistics.mean(line[key] for line in lines))


def acted(lines: list[dict[str, Any]]) -> bool:
    """Say whether a trial acted on every seed."""
    return all(line["acted"] for line in lines)


def gain(lines: list[dict[str, Any]]) -> float:
    """Return the mean of CA - ASR over seeds."""
    return mean(lines, "clean_accuracy_after") - mean(lines, "attack_success_after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = commands.add_parser("run")
    wanted.add_argument("models", type=Path)
    wanted.add_argument("out", type=Path)
    wanted.add_argument("--seeds", type=int, nargs="+", default=[12, 13])
    wanted.add_argument("--methods", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    wanted.add_argument("--threads", type=int, default=1)
    commands.add_parser("show").add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        show(given.out)
        return
    torch.set_num_threads(given.threads)
    run(given.models, given.out, given.seeds, given.methods)


if __name__ == "__main__":
    main()
