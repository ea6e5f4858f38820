"""Every sample detector on a backdoored model: clean, triggered and adversarial inputs, and poisoned training data.

    python benchmarks/detector_table.py run  MODELS OUT --seeds 1 2 3
    python benchmarks/detector_table.py show OUT

MODELS as in central_table.py. Incoming inputs are test images with the labels that the model predicts, 1,000 clean and
1,000 triggered; then, as `fedbd detect --adversarial` has it, 500 of each kind (100 with CW, which is slow):
adversarial examples that the model gets wrong, of images that it gets right, and other clean images that it gets right.
Training data are 5,000 of the poisoned training set with their labels as given. Trusted data: 500 held-out images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from central_table import PLAN, build, models
from numpy.typing import NDArray

from fedbd.central.plan import assemble_central, load_central
from fedbd.registry import METHODS
from fedbd.sample_detection import PAIRS, Served, incoming, three_ways, tried
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.types import Evasion, Notes, Samples

DETECTORS: dict[str, dict[str, Any]] = {
    "rnp_unlearned": {"name": "rnp_unlearned", "augment": "crop_flip"},
    "abl_isolation": {"name": "abl_isolation"},
    "model_mutation": {"name": "model_mutation"},
    "model_mutation, adversarial": {"name": "model_mutation", "seeks": "adversarial"},
    "label_switching": {"name": "label_switching"},
    "kernel_density": {"name": "kernel_density"},
    "lid": {"name": "lid"},
    "activation_clustering": {"name": "activation_clustering"},
    "spectral_signatures": {"name": "spectral_signatures"},
    "strip": {"name": "strip"},
    "strip, 100 overlays": {"name": "strip", "overlays": 100},
    "frequency": {"name": "frequency"},
}
EVASIONS = {"fgsm": 500, "pgd": 500, "cw": 100}


class Once:
    """An evasion that makes its adversarial examples once: all detectors are tried on the same."""

    def __init__(self, evasion: Evasion) -> None:
        self.evasion = evasion
        self.made: tuple[torch.Tensor, torch.Tensor, Notes] | None = None

    def perturb(
        self, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator
    ) -> tuple[torch.Tensor, Notes]:
        """Return what the evasion made of these images, anew or as it was."""
        if self.made is None:
            self.made = (images, *self.evasion.perturb(model, images, labels, rng))
        if not torch.equal(images, self.made[0]):
            raise ValueError("other images than those that the examples were made of")
        return self.made[1:]


def one_seed(seed: int, folder: Path, out: Path) -> None:
    plan = load_central(PLAN, [f"seed={seed}"])
    data = assemble_central(plan)
    both = models(plan, data, folder)
    if not both or plan.poison is None:
        print(f"seed {seed}: no model in {folder}")
        return
    planted = [(plan.poison.trigger.impl, plan.poison.target)]
    trusted = data.trusted(500, 0.5, seed)
    on = {
        where: Served(model=model, test=data.dataset.test, trusted=trusted)
        for where, model in zip(("incoming", "twin"), both, strict=False)  # there may be no twin
    }
    inputs = {where: incoming(served, planted, 1000, torch_rng(seed, "incoming")) for where, served in on.items()}
    rows = np.sort(numpy_rng(seed, "training").permutation(len(data.train))[:5000])
    own = (data.train.subset(rows), np.isin(rows, data.poisoned))
    evasions = {name: Once(build("evasion", {"name": name})) for name in EVASIONS}
    for name, fields in DETECTORS.items():
        file = out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}.json"
        if file.exists():
            continue
        detector, found = build("detection", fields), {}
        for where, served in on.items():
            samples, triggered, _ = inputs[where]
            found[where] = judged(served, detector, samples, triggered, seed)
        if "reason" not in found["incoming"]:
            found["training"] = on_training_data(on["incoming"], detector, own, seed)
            samples, triggered, _ = inputs["incoming"]
            caught = samples.images[torch.as_tensor(triggered)]
            found |= against(on["incoming"], detector, evasions, caught, seed)
        file.with_suffix(".part").write_text(json.dumps(found) + "\n", encoding="utf-8")
        file.with_suffix(".part").rename(file)
        print(seed, name, {where: values.get("auc") for where, values in found.items()}, flush=True)


def judged(served: Served, detector: Any, samples: Samples, truth: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    _, line = tried(served, detector, samples, truth, torch_rng(seed, "score"), numpy_rng(seed, "shuffled"))
    notes = line.pop("notes")
    return line if line["auc"] is not None else {"reason": notes.get("reason")}


def on_training_data(
    served: Served, detector: Any, own: tuple[Samples, NDArray[np.bool_]], seed: int
) -> dict[str, Any]:
    if getattr(detector, "needs_trusted", False):
        return {"reason": "a client holds no trusted data"}
    return judged(replace(served, trusted=None), detector, *own, seed)


def against(
    served: Served, detector: Any, evasions: dict[str, Once], triggered: torch.Tensor, seed: int
) -> dict[str, Any]:
    found = {}
    for name, evasion in evasions.items():
        order, rng = torch_rng(seed, "adversarial"), torch_rng(seed, name)
        found |= three_ways(served, detector, {name: evasion}, triggered, EVASIONS[name], order, lambda _, rng=rng: rng)
    return found


def show(out: Path) -> None:
    asked = [(evasion, pair) for evasion in EVASIONS for pair in PAIRS if pair != "clean_backdoor"]
    titles = [f"{evasion} {pair.replace('_', '/')}" for evasion, pair in asked]
    titles = ["clean/backdoor AUC", "shuffled", "on the twin", "TPR at 5 % FPR", "training data", *titles]
    print("| " + " | ".join(["detector", "seeds", *titles, "s, 2,000 inputs"]) + " |")
    print("|---" * (3 + len(titles)) + "|")
    for name in DETECTORS:
        files = sorted(out.glob(f"{name.replace(', ', '_').replace(' ', '_')}-[0-9]*.json"))
        lines = [json.loads(file.read_text()) for file in files]
        if not lines:
            continue
        cells = [
            name,
            ", ".join(file.stem.rpartition("-")[2] for file in files),
            spread(lines, "incoming", "auc"),
            spread(lines, "incoming", "auc_shuffled"),
            spread(lines, "twin", "auc"),
            spread(lines, "incoming", "tpr_at_fpr_5"),
            spread(lines, "training", "auc"),
        ]
        cells += [spread(lines, evasion, pair) for evasion, pair in asked]
        print("| " + " | ".join([*cells, spread(lines, "incoming", "seconds", 1)]) + " |")


def spread(lines: list[dict[str, Any]], where: str, key: str, digits: int = 2) -> str:
    values = [line[where][key] for line in lines if line.get(where, {}).get(key) is not None]
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


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
    missing = {fields["name"] for fields in DETECTORS.values()} ^ set(METHODS["detection"])
    if missing:
        raise SystemExit(f"the table and the registry differ in {', '.join(sorted(missing))}")
    if given.command == "show":
        show(given.out)
        return
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        one_seed(seed, given.models, given.out)


if __name__ == "__main__":
    main()
