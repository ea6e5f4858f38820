"""Sample detection over incoming inputs: clean and triggered test images, mixed, as a served model would get them."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from fedbd.errors import MethodRefused
from fedbd.metrics import precision_at, predict, roc_auc, tpr_at_fpr
from fedbd.plans import AttackPlan, DetectionPlan
from fedbd.prepared import Prepared
from fedbd.seeding import torch_rng
from fedbd.types import Notes, Samples

EMPTY: Notes = {"auc": None, "tpr_at_fpr_1": None, "tpr_at_fpr_5": None, "precision": None}


def detect(prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int) -> Notes:
    """Return the record of one detector in one round.

    Half of the inputs carry the trigger of one of the attacks in turn (only images of other classes than its target);
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
    try:
        scores, notes = plan.method.impl.score(model, inputs, prepared.federation.trusted, rng)
    except MethodRefused as refusal:
        seconds = time.perf_counter() - started
        return {**base, **counts, "seconds": seconds, "notes": {"acted": False, "reason": str(refusal)}}
    seconds = time.perf_counter() - started
    if not np.isfinite(scores).all():
        lost = f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite"
        return {**base, **counts, "seconds": seconds, "notes": {**notes, "acted": False, "reason": lost}}
    positive, negative = scores[triggered], scores[~triggered]
    return {
        "where": "incoming",
        "auc": roc_auc(positive, negative),
        "tpr_at_fpr_1": tpr_at_fpr(positive, negative, 0.01),
        "tpr_at_fpr_5": tpr_at_fpr(positive, negative, 0.05),
        "precision": precision_at(positive, negative, len(positive) / len(scores)),
        **counts,
        "seconds": seconds,
        "notes": notes,
    }


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
    labels = predict(model, Samples(images, torch.zeros(len(images), dtype=torch.int64)))
    return Samples(images, torch.as_tensor(labels)), truth.numpy()


def _stamped(rest: Samples, attack: AttackPlan, turn: int, attacks: int, half: int) -> torch.Tensor:
    eligible = torch.nonzero(rest.labels != attack.target)[:, 0][turn::attacks][: max(1, half // attacks)]
    raw = rest.images[eligible].to(torch.float32) / 255
    return (attack.trigger.impl.stamp(raw) * 255).round().to(torch.uint8)
