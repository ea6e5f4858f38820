"""One client's round, without Flower: what honest, polluted and attacking clients do with the global model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedbd.params import assign, flatten, is_weight
from fedbd.prepared import Prepared
from fedbd.roles import role_of
from fedbd.scores import isolation_quality, score_measures, scores_of
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.training import TrainingPlan, train
from fedbd.types import Memory, Notes, Role, Samples, Vector


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a client's round leaves behind.

    Attributes:
        weights: (D,) float32, the local weights to send.
        examples: Number of the client's samples.
        memory: The local defense's memory for the client's next participation.
        notes: What the simulation observes (never part of a message).
        own: The state entries that the client keeps to itself (``Prepared.own_names``), as its training left them.
    """

    weights: Vector
    examples: int
    memory: Memory
    notes: Notes
    own: Memory = field(default_factory=dict)


def client_round(
    prepared: Prepared,
    client: int,
    round_: int,
    weights: Vector,
    memory: Memory,
    buffers: Mapping[str, NDArray[Any]] | None = None,
    proximal_mu: float = 0.0,
    own: Memory | None = None,
) -> Result:
    """Carry out one client's round.

    Args:
        prepared: The scenario with its data.
        client: Partition id.
        round_: The round, from 1.
        weights: (D,) float32 global weights, those that travel.
        memory: What the client's local defense remembered.
        buffers: The global model's integer entries: the one model of this process must not bring another client's.
        proximal_mu: Weight of FedProx's term, 0 for none, in the training of honest and polluted clients. An attacker
            ignores it whatever its attack, and a local defense has an objective of its own.
        own: The client's own state entries; None: those of a fresh model.
    """
    scenario = prepared.scenario
    attack = prepared.assigned.get(client)
    role = role_of(attack, round_)
    model = prepared.model
    own = own if own is not None else prepared.own_entries(prepared.new_model()) if prepared.own_names else {}
    whole = prepared.whole(weights, own)
    assign(model, whole, {**(buffers or {}), **{name: entry for name, entry in own.items() if not is_weight(entry)}})
    rng = torch_rng(scenario.seed, "train", round_, client)
    data = prepared.federation.client(client).to(scenario.engine.device)
    plan = plan_of(scenario.training, round_)
    ctx = prepared.attack_context(attack, whole) if attack is not None else None
    truth = None
    if role is Role.ATTACKER and attack is not None and ctx is not None:
        longer = plan_of(attack.training, round_) if attack.training is not None else plan
        notes = attack.method.impl.fit(model, data, longer, ctx, rng)
        seen = dataclasses.replace(ctx, global_weights=weights)
        delta = attack.method.impl.tamper(prepared.sent(flatten(model)) - weights, seen, rng)
        kept = prepared.own_entries(model)
        return Result(weights=weights + delta, examples=len(data), memory=memory, notes=notes, own=kept)
    if role is Role.POLLUTED and attack is not None and ctx is not None:
        data, truth = attack.method.impl.pollute(data, ctx, torch_rng(scenario.seed, "pollute", client))
    detected = detect_own(prepared, model, data, truth, round_, client)
    if scenario.local_defense is None or client not in prepared.defended:
        notes = train(model, data, plan, rng, proximal_mu=proximal_mu)
    else:
        before = memory.get("isolated")
        memory, notes = scenario.local_defense.impl.fit(model, data, plan, memory, rng)
        isolated = memory.get("isolated")
        if isolated is not None and (before is None or not np.array_equal(before, isolated)):
            notes = {**notes, **isolation_quality(isolated, truth, len(data))}  # once: a kept set stays what it was
    if truth is not None and len(truth) == 0:  # clean labels, and none of the client's images has the target label
        notes = {**notes, "poisoned": 0}
    notes = {**notes, **detected}
    delta = prepared.sent(flatten(model)) - weights
    clip = getattr(scenario.aggregation.impl, "clip_local", None)
    if clip is not None and scenario.aggregation.impl.where == "client":
        delta = clip(delta)
    kept = prepared.own_entries(model)
    return Result(weights=weights + delta, examples=len(data), memory=memory, notes=notes, own=kept)


def detect_own(
    prepared: Prepared,
    model: nn.Module,
    data: Samples,
    truth: NDArray[np.int64] | None,
    round_: int,
    client: int,
) -> Notes:
    """Let the due detectors score a client's data with the received model; what they found is only noted.

    A polluted client's data are scored, and an honest one's where the detector asks for it (``honest``).

    Args:
        prepared: The scenario with its data.
        model: The received model.
        data: The client's samples, the labels as given.
        truth: Poisoned indices; None where the client is not polluted.
        round_: The round, from 1.
        client: Partition id.
    """
    due = [plan for plan in prepared.scenario.detection if plan.where == "training" and plan.due(round_)]
    due = [plan for plan in due if plan.honest or truth is not None]
    if not due:
        return {}
    poisoned = np.zeros(len(data), dtype=bool)
    if truth is not None:
        poisoned[truth] = True
    found: Notes = {}
    for plan in due:
        rng = torch_rng(prepared.scenario.seed, "detection", round_, client)
        started = time.perf_counter()
        counts = {"positives": int(poisoned.sum()), "negatives": int((~poisoned).sum())}
        scores, notes = scores_of(plan.method.impl, model, data, None, rng)
        found[plan.key] = {**counts, "seconds": time.perf_counter() - started, "notes": notes}
        if plan.honest:
            found[plan.key] |= {"polluted": truth is not None}
        if scores is not None:
            shuffle = numpy_rng(prepared.scenario.seed, "shuffled", round_, client)
            found[plan.key] |= score_measures(scores, poisoned, shuffle)
            if plan.honest:
                found[plan.key] |= {"clean_scores": scores[~poisoned].tolist()}
    return {"detection": found}


def plan_of(plan: TrainingPlan, round_: int) -> TrainingPlan:
    """Return the plan with the learning rate of a round, at least the smallest float there is: 0 is no rate."""
    return dataclasses.replace(plan, lr=max(plan.lr * plan.lr_decay ** (round_ - 1), sys.float_info.min))
