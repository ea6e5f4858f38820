"""Attacks: their clients, rounds and targets. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections.abc import Iterator

from fedbd.attacks.poisoning import cover_problem
from fedbd.config.scenario import Scenario
from fedbd.errors import Problem
from fedbd.roles import members
from fedbd.targets import target_problem


def clients_listed(s: Scenario) -> Iterator[Problem]:
    """Listed attackers are clients, each once."""
    clients = s.partition.clients
    seen: dict[int, int] = {}
    for i, attack in enumerate(s.attacks):
        path = f"attacks[{i}].clients.ids"
        for client in attack.clients.ids or ():
            if client >= clients:
                expected = f"must be clients from 0 to {clients - 1} (partition.clients is {clients})"
                yield Problem(path=path, expected=expected, got=str(client))
            if client in seen:
                got = f"{client} twice" if seen[client] == i else f"{client} as in attacks[{seen[client]}]"
                yield Problem(path=path, expected="must list clients that no attack has yet", got=got)
            seen.setdefault(client, i)


def attackers_fit(s: Scenario) -> Iterator[Problem]:
    """Attacks find their clients, and the cohort its attackers in each round of an attack window."""
    clients, fixed = s.partition.clients, s.cohort.attackers_per_round
    total = sum(members(attack, clients) for attack in s.attacks)
    if total > clients:
        expected = f"must take at most partition.clients ({clients}) clients together"
        yield Problem(path="attacks", expected=expected, got=str(total))
    if fixed is None or total > clients or s.cohort_size > clients:
        return
    path = "cohort.attackers_per_round"
    if not s.attacks:
        yield Problem(path=path, expected="must be null where there are no attacks", got=str(fixed))
        return
    acting = _acting(s)
    most = min(*acting, s.cohort_size)
    least = s.cohort_size - clients + max(acting)
    if fixed > most:
        expected = f"must be <= {most}: the attacks have {min(acting)} clients and the cohort is of {s.cohort_size}"
        yield Problem(path=path, expected=expected, got=str(fixed))
    elif fixed < least:
        others = clients - max(acting)
        expected = f"must be >= {least}: a cohort of {s.cohort_size} finds only {others} clients that do not attack"
        yield Problem(path=path, expected=expected, got=str(fixed), remedy=f"or set cohort.size to {others + fixed}")


def _acting(s: Scenario) -> list[int]:
    """Return how many clients the attacks of a round have together, for each such number that occurs."""
    windows = [attack.rounds for attack in s.attacks]
    turns = {window.first for window in windows} | {window.last + 1 for window in windows if window.last is not None}
    sizes = {
        sum(members(attack, s.partition.clients) for attack in s.attacks if turn in attack.rounds) for turn in turns
    }
    return sorted(sizes - {0})


def attacks_act(s: Scenario) -> Iterator[Problem]:
    """Every attack acts in some round, and pollution is something that can lie in a data set."""
    for i, attack in enumerate(s.attacks):
        if attack.rounds.first > s.rounds:
            expected = f"must be <= rounds ({s.rounds}), or the attack never acts"
            yield Problem(path=f"attacks[{i}].rounds.first", expected=expected, got=str(attack.rounds.first))
        if attack.role == "polluted" and getattr(attack.method.impl, "per", "dataset") != "dataset":
            yield Problem(
                path=f"attacks[{i}].per",
                expected="must be dataset for a polluted client: it trains by itself, only its data is poisoned",
                got=repr(attack.method.impl.per),
            )


def targets_fit(s: Scenario) -> Iterator[Problem]:
    """An attack can have its target, and its trigger what the attack asks of it."""
    for i, attack in enumerate(s.attacks):
        impl, path = attack.method.impl, f"attacks[{i}]"
        found = [
            target_problem(attack.target, attack.method.name, impl, f"{path}.target"),
            cover_problem(impl, attack.trigger, f"{path}.cover"),
        ]
        yield from (problem for problem in found if problem is not None)


CHECKS = (
    clients_listed,
    attackers_fit,
    attacks_act,
    targets_fit,
)
