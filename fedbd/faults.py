"""The ground truth of simulated faults: who fails how, at which stage, in which round.

A pure function of the scenario, like ``fedbd.roles``, and drawn apart from it: a run and its attack-free twin have the
same faults. Clients read it to fail, and the recorder to say that a failure was meant; the server and every defense
have to find out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from fedbd.config.plans import Stage
from fedbd.config.scenario import Scenario
from fedbd.roles import selected
from fedbd.seeding import numpy_rng

HARMLESS = ("extra_metric", "huge_count")
"""Kinds after which a client's update still counts."""
WAITED_FOR = ("vanish", "hang")
"""Kinds that the server can only wait for, until its patience ends."""


def chosen(scenario: Scenario, number: int) -> frozenset[int]:
    """Return the clients of ``scenario.faults[number]``, the same in every round."""
    clients, who = scenario.partition.clients, scenario.faults[number].clients
    if who.ids is not None:
        return frozenset(who.ids)
    return _drawn(scenario.seed, number, clients, selected(who, clients))


@lru_cache(maxsize=64)
def _drawn(seed: int, number: int, clients: int, wanted: int) -> frozenset[int]:
    """Return the drawn clients; kept, for every message asks."""
    drawn = numpy_rng(seed, "faults", number).choice(clients, wanted, replace=False)
    return frozenset(int(client) for client in drawn)


def fault_of(scenario: Scenario, round_: int, client: int, stage: Stage) -> str | None:
    """Return the kind of fault that a client has at a stage of a round, or None; of several the first one listed."""
    for number, plan in enumerate(scenario.faults):
        if plan.stage != stage or round_ not in plan.rounds or client not in chosen(scenario, number):
            continue
        if numpy_rng(scenario.seed, "fault", number, round_, client).random() < plan.probability:
            return plan.kind
    return None


def simulated(
    scenario: Scenario, round_: int, participants: Iterable[int], asked: Iterable[int]
) -> dict[int, dict[str, str]]:
    """Return by client the faults that were acted out in a round, ``{stage: kind}``; clients without any are left out.

    Args:
        scenario: The scenario.
        round_: The round.
        participants: The cohort.
        asked: Clients that were asked to decrypt.
    """
    if not scenario.faults:
        return {}
    decrypting = frozenset(asked)
    found: dict[int, dict[str, str]] = {}
    for client in participants:
        stages: list[Stage] = ["train"]
        at_training = fault_of(scenario, round_, client, "train")
        if at_training is None or at_training in HARMLESS:  # else it never came to the encryption
            stages += ["encrypt"]
        if client in decrypting:
            stages += ["decrypt"]
        acted: dict[str, str] = {}
        for stage in stages:
            kind = fault_of(scenario, round_, client, stage)
            acted |= {stage: kind} if kind is not None else {}
        if acted:
            found[client] = acted
    return found
