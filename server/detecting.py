"""Sample detection: over incoming inputs as a served model would get them, and over clients' own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedbd import sample_detection
from fedbd.config.plans import DetectionPlan
from fedbd.prepared import Prepared
from fedbd.sample_detection import MEASURES, Served, three_ways, tried
from fedbd.scores import tpr_at_fpr
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.types import Notes, Samples


def detect(prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int) -> Notes:
    """Return the record of one detector over incoming inputs in one round.

    Half of the inputs carry the trigger of one of the attacks in turn (only images that it wants another label of);
    the label that comes with an input is the one that the model predicts. The detector sees images and labels, mixed,
    and the trusted data; which inputs are triggered only the scoring knows (``fedbd.sample_detection``).
    """
    seed, detector = prepared.scenario.seed, plan.method.impl
    base = {"where": "incoming", **dict.fromkeys(MEASURES)}
    if not prepared.scenario.attacks:
        return {**base, "positives": 0, "negatives": 0, "seconds": 0.0, "notes": {"reason": "no trigger to detect"}}
    served = Served(model=model, test=prepared.dataset.test, trusted=prepared.federation.trusted)
    inputs, triggered = incoming(prepared, plan, model, round_)
    rng = torch_rng(seed, "detection", round_)
    shuffle = numpy_rng(seed, "shuffled", round_)
    scores, measured = tried(served, detector, inputs, triggered, rng, shuffle)
    line = {**base, **measured}
    if scores is not None and plan.adversarial:
        line["adversarial"] = three_ways(
            served,
            detector,
            {evasion.method.name: evasion.method.impl for evasion in plan.adversarial},
            inputs.images[torch.as_tensor(triggered)],
            plan.samples,
            torch_rng(seed, "adversarial", round_),
            lambda name: torch_rng(seed, f"evasion/{name}", round_),
        )
    return line


def incoming(
    prepared: Prepared, plan: DetectionPlan, model: nn.Module, round_: int
) -> tuple[Samples, NDArray[np.bool_]]:
    """Return mixed inputs with predicted labels, and which of them are triggered."""
    served = Served(model=model, test=prepared.dataset.test, trusted=None)
    attacks = [(attack.trigger.impl, attack.target) for attack in prepared.scenario.attacks]
    rng = torch_rng(prepared.scenario.seed, "incoming", round_)
    inputs, triggered, _ = sample_detection.incoming(served, attacks, plan.samples, rng)
    return inputs, triggered


def own_data(prepared: Prepared, round_: int, observed: Mapping[int, Mapping[str, Any]]) -> Notes:
    """Return the records of the detectors that clients ran on their own training data.

    Measures are means over the polluted ones; the clients did not send them, the simulation noted them.
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
        entries = [entry for entry in noted.values() if entry.get("polluted", True)]
        line: Notes = {"where": "training"}
        for name in MEASURES:
            known = [entry[name] for entry in entries if entry.get(name) is not None]
            line[name] = sum(known) / len(known) if known else None
        for name in ("positives", "negatives"):
            line[name] = sum(entry[name] for entry in entries) if entries else None
        line["seconds"] = sum(entry["seconds"] for entry in noted.values()) if noted else None
        if plan.honest:
            line["honest"] = false_alarms(list(noted.values()))
        line["notes"] = {"clients": {str(client): _recorded(entry) for client, entry in noted.items()}}
        found[plan.key] = line
    return found


def false_alarms(entries: Sequence[Mapping[str, Any]]) -> Notes:
    """Return how honest clients' samples score beside the clean samples of polluted clients.

    Args:
        entries: What clients noted, with ``polluted`` and ``clean_scores``; those whose detector could not act lack
            them.

    Returns:
        ``clients`` and ``samples`` (honest ones that were scored), ``median`` and ``quantile_95`` of their scores, and
        ``flagged_at_fpr_1`` and ``flagged_at_fpr_5``: the share of them above the threshold that 1 or 5 % of the
        polluted clients' clean samples exceed. What would rest on too few samples is None (``scores.tpr_at_fpr``).
    """
    scored = [entry for entry in entries if "clean_scores" in entry]
    own = [entry["clean_scores"] for entry in scored if not entry["polluted"]]
    honest = np.concatenate([np.empty(0), *own])
    others = np.concatenate([np.empty(0), *(entry["clean_scores"] for entry in scored if entry["polluted"])])
    return {
        "clients": len(own),
        "samples": len(honest),
        "median": float(np.median(honest)) if len(honest) else None,
        "quantile_95": float(np.quantile(honest, 0.95)) if len(honest) else None,
        "flagged_at_fpr_1": tpr_at_fpr(honest, others, 0.01),
        "flagged_at_fpr_5": tpr_at_fpr(honest, others, 0.05),
    }


def _recorded(entry: Mapping[str, Any]) -> Notes:
    return {name: value for name, value in entry.items() if name not in ("seconds", "clean_scores")}
