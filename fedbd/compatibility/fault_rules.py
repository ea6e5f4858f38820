"""Simulated faults that cannot work: rules of ``fedbd.compatibility``, in the same form."""

from __future__ import annotations

from collections.abc import Iterator

from fedbd.config.plans import Window
from fedbd.config.scenario import Scenario
from fedbd.errors import Problem
from fedbd.faults import HARMLESS, WAITED_FOR, chosen
from fedbd.roles import selected

LONGEST_WAIT = 600.0
"""Seconds that a scenario may let a server wait for each client that it knows will not answer."""


def faulty_clients_exist(s: Scenario) -> Iterator[Problem]:
    """Faults find their clients, and act in some round."""
    clients = s.partition.clients
    for i, plan in enumerate(s.faults):
        path = f"faults[{i}]"
        for client in sorted(set(plan.clients.ids or ())):
            if client >= clients:
                expected = f"must be clients from 0 to {clients - 1} (partition.clients is {clients})"
                yield Problem(path=f"{path}.clients.ids", expected=expected, got=str(client))
        if plan.clients.count is not None and plan.clients.count > clients:
            expected = f"must be <= partition.clients ({clients})"
            yield Problem(path=f"{path}.clients.count", expected=expected, got=str(plan.clients.count))
        if plan.rounds.first > s.rounds:
            expected = f"must be <= rounds ({s.rounds}), or nobody ever fails"
            yield Problem(path=f"{path}.rounds.first", expected=expected, got=str(plan.rounds.first))


def faults_have_their_stage(s: Scenario) -> Iterator[Problem]:
    """Nobody fails at encrypting or decrypting where nothing is encrypted."""
    for i, plan in enumerate(s.faults):
        if plan.stage != "train" and s.secure_sum is None:
            expected = "must be train where secure_sum is null: nothing is encrypted or decrypted"
            remedy = "add secure_sum: ckks, or leave stage out"
            yield Problem(path=f"faults[{i}].stage", expected=expected, got=repr(plan.stage), remedy=remedy)


def faults_can_be_survived(s: Scenario) -> Iterator[Problem]:
    """The engine can go on after a client that hangs or dies, and the server does not wait for hours."""
    for i, plan in enumerate(s.faults):
        path = f"faults[{i}].kind"
        if plan.kind in ("hang", "die") and s.engine.name == "local" and s.engine.executor == "serial":
            expected = f"must not be {plan.kind} with engine.executor: serial: clients run in the driver's own process"
            yield Problem(path=path, expected=expected, remedy="set engine.executor: process")
        if plan.kind == "die" and s.engine.name == "ray":
            expected = "must not be die on ray: Flower gives a dead actor further clients, and all of them fail"
            yield Problem(path=path, expected=expected, remedy="set engine.name: local, or take kind: hang or vanish")
        if plan.kind in WAITED_FOR and s.engine.timeout > LONGEST_WAIT:
            expected = f"{plan.kind} is waited for in every round: engine.timeout must be <= {LONGEST_WAIT:g} seconds"
            remedy = "set engine.timeout to what a healthy client needs at most"
            yield Problem(path=path, expected=expected, got=f"{s.engine.timeout:g}", remedy=remedy)


def somebody_is_left(s: Scenario) -> Iterator[Problem]:
    """Faults that are certain leave enough clients, where a run is to survive them."""
    clients, needed = s.partition.clients, 1 if s.secure_sum is None else 2
    if s.on_client_failure != "skip" or any(selected(plan.clients, clients) > clients for plan in s.faults):
        return
    certain = [
        (plan.rounds, chosen(s, number))
        for number, plan in enumerate(s.faults)
        if plan.probability == 1 and plan.kind not in HARMLESS
    ]
    for round_ in sorted({rounds.first for rounds, _ in certain if rounds.first <= s.rounds}):
        failing = frozenset(range(clients)) & _together(certain, round_)
        if clients - len(failing) < needed:
            yield Problem(
                path="faults",
                expected=f"must leave {needed} of {clients} clients that can answer, or no round can be carried out",
                got=f"{clients - len(failing)} in round {round_}",
                remedy="take fewer clients, give them a probability below 1, or set on_client_failure: fail",
            )
            return


def _together(certain: list[tuple[Window, frozenset[int]]], round_: int) -> frozenset[int]:
    return frozenset(client for rounds, who in certain if round_ in rounds for client in who)


CHECKS = (faulty_clients_exist, faults_have_their_stage, faults_can_be_survived, somebody_is_left)
