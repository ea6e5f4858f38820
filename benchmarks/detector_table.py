"""Every sample detector on a backdoored model: clean, triggered and adversarial inputs, and poisoned training data.

    python benchmarks/detector_table.py run  MODELS OUT --seeds 1 2 3
    python benchmarks/detector_table.py show OUT

MODELS as in central_table.py. Incoming inputs are test images with the labels that the model predicts, 1,000 clean and
1,000 triggered, then 500 of each kind with adversarial ones (PGD, FGSM; 100 of each kind with CW, which is slow).
Training data are 5,000 of the poisoned training set with their labels as given. Trusted data: 500 held-out images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from central_table import PLAN, build, models

from fedbd import targets
from fedbd.central.plan import CentralData, assemble_central, load_central
from fedbd.errors import MethodRefused
from fedbd.metrics import predict, roc_auc, score_measures
from fedbd.registry import METHODS
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.types import Samples, TrustedData, quantized

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
PAIRS = {"clean/adversarial": (0, 1), "clean/backdoor": (0, 2), "adversarial/backdoor": (1, 2)}


def served(model: torch.nn.Module, images: torch.Tensor) -> Samples:
    return Samples(images, torch.as_tensor(predict(model, images)))


def mixed(model: torch.nn.Module, kinds: list[torch.Tensor], seed: int) -> tuple[Samples, np.ndarray]:
    images, kind = torch.cat(kinds), np.repeat(np.arange(len(kinds)), [len(each) for each in kinds])
    order = numpy_rng(seed, "mixed").permutation(len(images))
    return served(model, images[torch.as_tensor(order)]), kind[order]


def stamped(trigger: Any, images: torch.Tensor) -> torch.Tensor:
    return quantized(trigger.stamp(images.float() / 255))


def one_seed(seed: int, folder: Path, out: Path) -> None:
    plan = load_central(PLAN, [f"seed={seed}"])
    data = assemble_central(plan)
    both = models(plan, data, folder)
    if not both or plan.poison is None:
        print(f"seed {seed}: no model in {folder}")
        return
    trusted = data.trusted(500, 0.5, seed)
    sets = inputs(data, both[0], plan.poison.trigger.impl, plan.poison.target, seed)
    if len(both) > 1:
        sets["twin"] = inputs(data, both[1], plan.poison.trigger.impl, plan.poison.target, seed, ())["incoming"]
    for name, fields in DETECTORS.items():
        file = out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}.json"
        if file.exists():
            continue
        found = {}
        for where, (samples, kind) in sets.items():
            model = both[1] if where == "twin" else both[0]
            found[where] = judged(build("detection", fields), model, samples, kind, trusted, where, seed)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(seed, name, {where: values.get("auc") for where, values in found.items()}, flush=True)


def inputs(
    data: CentralData,
    model: torch.nn.Module,
    trigger: Any,
    target: targets.Target,
    seed: int,
    evasions: Any = tuple(EVASIONS),
) -> dict[str, tuple[Samples, np.ndarray]]:
    """Return by name the samples and of each what it is: 0 clean, 1 adversarial (or poisoned), 2 triggered."""
    test = data.dataset.test
    order = torch.as_tensor(numpy_rng(seed, "inputs").permutation(len(test)))
    clean, rest = test.images[order[:1000]], order[1000:]
    others = rest[targets.victims(test.labels[rest], target)]
    triggered = stamped(trigger, test.images[others[:1000]])
    samples, kind = mixed(model, [clean, triggered], seed)
    found = {"incoming": (samples, kind)}
    right = torch.as_tensor(predict(model, test)) == test.labels
    victims = others[1000:][right[others[1000:]]]
    for name in evasions:
        count = EVASIONS[name]
        chosen = test.subset(victims[:count])
        made, _ = build("evasion", {"name": name}).perturb(
            model, chosen.images.float() / 255, chosen.labels, torch_rng(seed, name)
        )
        images = quantized(made)
        fooled = images[torch.as_tensor(predict(model, images)) != chosen.labels]
        found[name] = mixed(model, [clean[:count], fooled, triggered[:count]], seed)
    if evasions:
        rows = np.sort(numpy_rng(seed, "training").permutation(len(data.train))[:5000])
        found["training"] = (data.train.subset(rows), np.isin(rows, data.poisoned).astype(np.int64))
    return found


def judged(
    detector: Any,
    model: torch.nn.Module,
    samples: Samples,
    kind: np.ndarray,
    trusted: TrustedData,
    where: str,
    seed: int,
) -> dict[str, Any]:
    if where == "training" and getattr(detector, "needs_trusted", False):
        return {"reason": "a client holds no trusted data"}
    started = time.perf_counter()
    try:
        given = None if where == "training" else trusted
        scores, _ = detector.score(model, samples, given, torch_rng(seed, "score"))
    except MethodRefused as refusal:
        return {"reason": str(refusal)}
    seconds = time.perf_counter() - started
    if where in EVASIONS:
        pairs = {name: roc_auc(scores[kind == high], scores[kind == low]) for name, (low, high) in PAIRS.items()}
        return {**pairs, "examples": int((kind == 1).sum()), "seconds": seconds}
    return {**score_measures(scores, kind > 0, numpy_rng(seed, "shuffled")), "seconds": seconds}


def show(out: Path) -> None:
    print(
        "| detector | clean/backdoor AUC | shuffled | on the twin | TPR at 5 % FPR | training data | "
        + " | ".join(f"{evasion} {pair}" for evasion in EVASIONS for pair in PAIRS if pair != "clean/backdoor")
        + " | s, 2,000 inputs |"
    )
    print("|---" * (7 + 2 * len(EVASIONS)) + "|")
    for name in DETECTORS:
        files = sorted(out.glob(f"{name.replace(', ', '_').replace(' ', '_')}-[0-9]*.json"))
        lines = [json.loads(file.read_text()) for file in files]
        if not lines:
            continue
        cells = [
            name,
            spread(lines, "incoming", "auc"),
            spread(lines, "incoming", "auc_shuffled"),
            spread(lines, "twin", "auc"),
            spread(lines, "incoming", "tpr_at_fpr_5"),
            spread(lines, "training", "auc"),
        ]
        cells += [spread(lines, evasion, pair) for evasion in EVASIONS for pair in PAIRS if pair != "clean/backdoor"]
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
