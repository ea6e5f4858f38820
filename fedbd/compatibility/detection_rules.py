"""Detectors and local defenses. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fedbd.config.plans import DetectionPlan
from fedbd.config.scenario import Scenario
from fedbd.defenses.trusted_data import needs_trusted
from fedbd.errors import Problem
from fedbd.roles import selected


def detectors_act(s: Scenario) -> Iterator[Problem]:
    """Detectors over training data find polluted clients, and need nothing that a client does not have."""
    for i, plan in enumerate(s.detection):
        path = f"detection[{i}]"
        if plan.where == "incoming":
            if plan.honest:
                expected = "must be false unless where is training: incoming inputs are no client's"
                yield Problem(path=f"{path}.honest", expected=expected, got="true")
            if plan.adversarial and not s.attacks:
                expected = "must be left out where there is no attack: inputs of all kinds are told apart together"
                yield Problem(path=f"{path}.adversarial", expected=expected)
            continue
        if not any(attack.role == "polluted" for attack in s.attacks):
            yield Problem(
                path=f"{path}.where",
                expected="must be incoming where no client is polluted: an attacker does not look for its own poison",
                got="'training'",
                remedy="give an attack role: polluted",
            )
        if plan.samples != DetectionPlan.samples:
            expected = f"must be {DetectionPlan.samples} with where: training: clients score all they hold"
            yield Problem(path=f"{path}.samples", expected=expected, got=str(plan.samples))
        if needs_trusted(plan.method.impl):
            expected = f"must be incoming: '{plan.method.name}' needs trusted data, and clients hold none"
            yield Problem(path=f"{path}.where", expected=expected, got="'training'")
        if plan.adversarial:
            expected = "must be left out with where: training: nobody attacks inputs there"
            yield Problem(path=f"{path}.adversarial", expected=expected)


def evasions_differ(s: Scenario) -> Iterator[Problem]:
    """The records name an evasion by its method."""
    for i, plan in enumerate(s.detection):
        for name, times in Counter(evasion.method.name for evasion in plan.adversarial).items():
            if times > 1:
                path, got = f"detection[{i}].adversarial", f"'{name}' {times} times"
                remedy = "give the detector a second entry with its own label"
                yield Problem(path=path, expected="must name each evasion once", got=got, remedy=remedy)


def local_defense_somewhere(s: Scenario) -> Iterator[Problem]:
    """Who runs the local defense is a choice among the clients, and there is one to run."""
    chosen, clients = s.local_defense_clients, s.partition.clients
    if chosen is None:
        return
    if s.local_defense is None:
        yield Problem(path="local_defense_clients", expected="must be null without a local_defense")
    if selected(chosen, clients) > clients or any(client >= clients for client in chosen.ids or ()):
        expected = f"must be a choice among partition.clients ({clients})"
        yield Problem(path="local_defense_clients", expected=expected)


CHECKS = (
    detectors_act,
    evasions_differ,
    local_defense_somewhere,
)
