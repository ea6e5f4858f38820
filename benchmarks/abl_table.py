"""ABL's isolation and its quick demo on a single data set: CIFAR-10, WRN-16-1, a tenth of the images poisoned.

    python benchmarks/abl_table.py run  MODELS OUT --seeds 1 2 3
    python benchmarks/abl_table.py show OUT

MODELS as in central_table.py. Ten epochs of flooding on the poisoned set isolate 1 % (resumable); five
epochs of ascent on these then repair the backdoored model, as the authors' demo does. Controls: the truly poisoned
images (oracle) and random ones in the same number. The whole schedules, of the code and of the paper, are central
trainings: ``fedbd train scenarios/central/cifar10-abl.yaml`` (and ``cifar10-abl-paper.yaml``).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from central_table import PLAN, models
from numpy.typing import NDArray

from fedbd.central.plan import CentralData, CentralPlan, assemble_central, load_central, measure
from fedbd.central.training import NOTES, train_central
from fedbd.config.schema import Method
from fedbd.defenses.local.abl_central import ABLCentral
from fedbd.seeding import numpy_rng, torch_rng

TUNING = ABLCentral(finetune_epochs=0, unlearn_epochs=0)


def isolated_by_tuning(plan: CentralPlan, data: CentralData, out: Path) -> NDArray[np.int64]:
    """Return the isolated 1 %, most suspicious first."""
    tuning, folder = replace(plan, training=None, defense=Method("abl_central", TUNING)), out / f"tuned-{plan.seed}"
    train_central(
        tuning, data, folder, lambda line: print(plan.seed, "tuning", line["epoch"], line["loss"], flush=True)
    )
    return np.array(json.loads((folder / NOTES).read_text())["isolated"], dtype=np.int64)


def one_seed(seed: int, folder: Path, out: Path) -> None:
    plan = load_central(PLAN, [f"seed={seed}"])
    data = assemble_central(plan)
    both = models(plan, data, folder)
    if not both:
        print(f"seed {seed}: no model in {folder}")
        return
    found = isolated_by_tuning(plan, data, out)
    rng = numpy_rng(seed, "abl-controls")
    sets = {
        "isolated": found,
        "truly poisoned (oracle)": rng.permutation(data.poisoned)[: len(found)],
        "random": rng.permutation(len(data.train))[: len(found)],
    }
    hits = int(np.isin(found, data.poisoned).sum())
    result: dict[str, Any] = {
        "isolated": len(found),
        "precision": hits / len(found),
        "recall": hits / len(data.poisoned),
    }
    for name, indices in sets.items():
        result[name] = demo(plan, data, both[0], indices)
        print(
            seed,
            name,
            [(round(e["clean_accuracy"], 4), round(e["attack_success"], 4)) for e in result[name]],
            flush=True,
        )
    (out / f"demo-{seed}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def demo(plan: CentralPlan, data: CentralData, model: torch.nn.Module, isolated: NDArray[np.int64]) -> list[Any]:
    """Return CA and ASR before the demo and after each of its epochs."""
    repaired = copy.deepcopy(model)
    course = [measure(plan, data, repaired)]
    ABLCentral.quick_demo().fit(
        repaired,
        data.train,
        torch_rng(plan.seed, "demo"),
        on_epoch=lambda _: course.append(measure(plan, data, repaired)),
        isolated=isolated,
    )
    return course


def show(out: Path) -> None:
    print("| seed | isolated | precision % | unlearned set | CA/ASR % before, after epochs 1 to 5 |")
    print("|---|---|---|---|---|")
    for file in sorted(out.glob("demo-*.json")):
        result = json.loads(file.read_text())
        for name in ("isolated", "truly poisoned (oracle)", "random"):
            course = ", ".join(f"{100 * e['clean_accuracy']:.1f}/{100 * e['attack_success']:.1f}" for e in result[name])
            head = [file.stem.removeprefix("demo-"), str(result["isolated"]), f"{100 * result['precision']:.1f}"]
            print("| " + " | ".join([*head, name, course]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("models", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--seeds", type=int, nargs="+", default=[1])
    shown = commands.add_parser("show")
    shown.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        show(given.out)
        return
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        if not (given.out / f"demo-{seed}.json").exists():
            one_seed(seed, given.models, given.out)


if __name__ == "__main__":
    main()
