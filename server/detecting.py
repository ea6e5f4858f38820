"""Sample detection: over incoming inputs as a served model would get them, and over polluted clients' own data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedbd.errors import MethodRefused
from fedbd.metrics import predict, roc_auc, score_measures
from fedbd.plans import AttackPlan, DetectionPlan
from fedbd.prepared import Prepared
from fedbd.scores import scores_of
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.targets import victims
from fedbd.types import Notes, Samples, quantized

MEASURES = ("auc", "auc_shuffled", "tpr_at_fpr_1", "tpr_at_fpr_5", "precision")
EMPTY: Notes = dict.fromkeys(MEASURES)


def detect(prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int) -> Notes:
    """Return the record of one detector over incoming inputs in one round.

    Half of the inputs carry the trigger of one of the attacks in turn (only images that it wants another label of);
    the label that comes with an input is the one that the model predicts. The detector sees images and labels, mixed,
    and the trusted data; which inputs are triggered only the scoring here knows.
    """
    scenario = prepared.scenario
    base = {"where": "incoming", **EMPTY}
    if not scenario.attacks:
        return {**base, "positives": 0, "negatives": 0, "seconds": 0.0, "notes": {"reason": "no trigger to detect"}}
    inputs, triggered = incoming(prepared, plan, model, round_)
    rng = torch_rng(scenario.seed, f"detection/{plan.key}", round_)
    started = time.perf_counter()
    counts = {"positives": int(triggered.sum()), "negatives": int((~triggered).sum())}
    scores, notes = scores_of(plan.method.impl, model, inputs, prepared.federation.trusted, rng)
    line = {**base, **counts, "seconds": time.perf_counter() - started, "notes": notes}
    if scores is None:
        return line
    line |= score_measures(scores, triggered, numpy_rng(scenario.seed, f"shuffled/{plan.key}", round_))
    if plan.adversarial:
        line["adversarial"] = three_ways(prepared, plan, model, round_, inputs.images[torch.as_tensor(triggered)])
    return line


def three_ways(
    prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int, triggered: torch.Tensor
) -> Notes:
    """Return per evasion how well one detector tells clean, triggered and adversarial inputs apart, pair by pair.

    One pass over a mixture of all three, so that each pair is compared on scores of one kind. Only adversarial examples
    that the model gets wrong, of images that it gets right, count (K. Jin et al., https://arxiv.org/abs/2006.14871).
    """
    test, seed = prepared.dataset.test, prepared.scenario.seed
    order = torch.randperm(len(test), generator=torch_rng(seed, f"adversarial/{plan.key}", round_))
    right = torch.as_tensor(predict(model, test)) == test.labels
    eligible = order[right[order]]
    count = min(plan.samples, len(eligible) // 2)
    if count == 0:
        return {e.method.name: {**dict.fromkeys(PAIRS), "examples": 0, "success": None} for e in plan.adversarial}
    clean, victims = test.subset(eligible[:count]), test.subset(eligible[count : 2 * count])
    found: Notes = {}
    for evasion in plan.adversarial:
        name, rng = evasion.method.name, torch_rng(seed, f"evasion/{plan.key}/{evasion.method.name}", round_)
        try:
            perturbed, notes = evasion.method.impl.perturb(model, victims.images.float() / 255, victims.labels, rng)
        except MethodRefused as refusal:
            found[name] = {**dict.fromkeys(PAIRS), "examples": 0, "success": None, "reason": str(refusal)}
            continue
        images = quantized(perturbed)
        fooled = images[torch.as_tensor(predict(model, images)) != victims.labels]
        found[name] = {
            **_pairs(prepared, plan, model, [clean.images, fooled, triggered[:count]], rng),
            "examples": len(fooled),
            "success": len(fooled) / max(1, len(images)),
            "notes": notes,
        }
    return found


PAIRS = {"clean_adversarial": (0, 1), "clean_backdoor": (0, 2), "adversarial_backdoor": (1, 2)}
"""Name -> the kind with lower and the kind with higher scores if the AUC is above 1/2."""


def _pairs(
    prepared: Prepared, plan: DetectionPlan, model: nn.Module, kinds: list[torch.Tensor], rng: torch.Generator
) -> Notes:
    if min(map(len, kinds)) == 0:
        return dict.fromkeys(PAIRS)
    images = torch.cat(kinds)
    kind = np.repeat(np.arange(len(kinds)), [len(each) for each in kinds])
    mixed = torch.randperm(len(images), generator=rng)
    inputs, kind = as_served(model, images[mixed]), kind[mixed.numpy()]
    scores, notes = scores_of(plan.method.impl, model, inputs, prepared.federation.trusted, rng)
    if scores is None:
        return {**dict.fromkeys(PAIRS), "reason": notes.get("reason")}
    return {name: roc_auc(scores[kind == high], scores[kind == low]) for name, (low, high) in PAIRS.items()}


def own_data(prepared: Prepared, round_: int, observed: Mapping[int, Mapping[str, Any]]) -> Notes:
    """Return the records of the detectors that polluted clients ran on their own training data.

    Measures are means over these clients; the clients did not send them, the simulation noted them.
    """
    found: Notes = {}
    for plan in prepared.scenario.detection:
        if plan.where != "training" or not plan.due(round_):
            continue
        noted = {
            client: notes["train"]["detection"][plan.key]
            for client, notes in observed.items()
            if plan.key in notes.get("train", {}).get("detection", {})
        }
        entries = list(noted.values())
        line: Notes = {"where": "training"}
        for name in MEASURES:
            known = [entry[name] for entry in entries if entry.get(name) is not None]
            line[name] = sum(known) / len(known) if known else None
        for name in ("positives", "negatives"):
            line[name] = sum(entry[name] for entry in entries) if entries else None
        line["seconds"] = sum(entry["seconds"] for entry in entries) if entries else None
        line["notes"] = {"clients": {str(client): _timeless(entry) for client, entry in noted.items()}}
        found[plan.key] = line
    return found


def _timeless(entry: Mapping[str, Any]) -> Notes:
    return {name: value for name, value in entry.items() if name != "seconds"}


def as_served(model: nn.Module, images: torch.Tensor) -> Samples:
    """Return inputs with the labels that a model predicts."""
    labels = predict(model, Samples(images, torch.zeros(len(images), dtype=torch.int64)))
    return Samples(images, torch.as_tensor(labels))


def incoming(
    prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int
) -> tuple[Samples, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Return mixed inputs with predicted labels, and which of them are triggered."""
    test, scenario = prepared.dataset.test, prepared.scenario
    rng = torch_rng(scenario.seed, f"incoming/{plan.key}", round_)
    order = torch.randperm(len(test), generator=rng)
    half = min(plan.samples, len(test) // 2)
    clean = test.subset(order[:half])
    rest = test.subset(order[half:])
    parts = [_stamped(rest, attack, i, len(scenario.attacks), half) for i, attack in enumerate(scenario.attacks)]
    images = torch.cat([clean.images, *parts])
    truth = torch.cat([torch.zeros(half, dtype=torch.bool), torch.ones(len(images) - half, dtype=torch.bool)])
    mixed = torch.randperm(len(images), generator=rng)
    images, truth = images[mixed], truth[mixed]
    return as_served(model, images), truth.numpy()


def _stamped(rest: Samples, attack: AttackPlan, turn: int, attacks: int, half: int) -> torch.Tensor:
    eligible = torch.nonzero(victims(rest.labels, attack.target))[:, 0][turn::attacks][: max(1, half // attacks)]
    raw = rest.images[eligible].to(torch.float32) / 255
    return quantized(attack.trigger.impl.stamp(raw))
