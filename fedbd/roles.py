"""The ground truth: who is honest, polluted or attacking in which round, and who takes part.

A pure function of the scenario. It is read by the cohort draw, by the client step to act, and when the record is
written; by the local engine to start long jobs first; and to tell a cleanup with ``oracle: true``. Never by another
defense. Messages carry the scenario, from which a client works out its own part; an update carries no role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbd.config.plans import AttackPlan, Selection
from fedbd.config.scenario import Scenario
from fedbd.seeding import numpy_rng
from fedbd.types import Role


def assignment(scenario: Scenario) -> dict[int, AttackPlan]:
    """Return which attack each assigned client belongs to, whatever the round.

    Attacks choose in their order; listed ids are taken first, the rest is drawn (seeded) from the clients left over, so
    that no client serves two attacks.
    """
    clients = scenario.partition.clients
    taken: dict[int, AttackPlan] = {}
    for attack in scenario.attacks:
        taken |= {client: attack for client in attack.clients.ids or ()}
    for number, attack in enumerate(scenario.attacks):
        free = np.array([client for client in range(clients) if client not in taken], dtype=np.int64)
        wanted = members(attack, clients) - len(attack.clients.ids or ())
        if wanted > 0:
            drawn = numpy_rng(scenario.seed, "roles", number).choice(free, wanted, replace=False)
            taken |= {int(client): attack for client in drawn}
    return taken


def members(attack: AttackPlan, clients: int) -> int:
    """Return how many clients an attack has (a share is rounded, and is at least one client)."""
    return selected(attack.clients, clients)


def selected(chosen: Selection, clients: int) -> int:
    """Return how many of so many clients a selection takes (a share is rounded, and is at least one client)."""
    if chosen.ids is not None:
        return len(set(chosen.ids))
    return chosen.count if chosen.count is not None else max(1, round((chosen.share or 0) * clients))


def locally_defended(scenario: Scenario) -> frozenset[int]:
    """Return the clients that run the local defense when they do not attack; drawn apart from any attack's."""
    clients, chosen = scenario.partition.clients, scenario.local_defense_clients
    if scenario.local_defense is None:
        return frozenset()
    if chosen is None:
        return frozenset(range(clients))
    if chosen.ids is not None:
        return frozenset(chosen.ids)
    drawn = numpy_rng(scenario.seed, "local-defense").choice(clients, selected(chosen, clients), replace=False)
    return frozenset(int(client) for client in drawn)


def active(attack: AttackPlan, round_: int) -> bool:
    """Return whether an attack is carried out in a round."""
    return attack.enabled and round_ in attack.rounds


def role_of(attack: AttackPlan | None, round_: int) -> Role:
    """Return what a client assigned to ``attack`` (or to none) is in a round."""
    if attack is None or not active(attack, round_):
        return Role.HONEST
    return Role.ATTACKER if attack.role == "attacker" else Role.POLLUTED


def draw_cohort(scenario: Scenario, round_: int) -> tuple[int, ...]:
    """Return the clients of a round, ascending, drawn without replacement.

    With ``cohort.attackers_per_round`` exactly so many clients of the attacks whose window a round is in take part in
    it, also in the attack-free twin: arms stay paired.
    """
    clients, size = scenario.partition.clients, scenario.cohort_size
    rng = numpy_rng(scenario.seed, "cohort", round_)
    fixed = scenario.cohort.attackers_per_round
    if fixed is None or not any(round_ in attack.rounds for attack in scenario.attacks):
        return tuple(sorted(int(client) for client in rng.choice(clients, size, replace=False)))
    bad = sorted(client for client, attack in assignment(scenario).items() if round_ in attack.rounds)
    good = sorted(set(range(clients)) - set(bad))
    drawn = [*rng.choice(bad, fixed, replace=False), *rng.choice(good, size - fixed, replace=False)]
    return tuple(sorted(int(client) for client in drawn))


def roles_in(scenario: Scenario, round_: int, clients: tuple[int, ...]) -> Mapping[int, Role]:
    """Return the role of each of some clients in a round."""
    assigned = assignment(scenario)
    return {client: role_of(assigned.get(client), round_) for client in clients}


def expected_images(scenario: Scenario, attack: AttackPlan | None, samples: int, round_: int) -> int:
    """Return how many images a client trains on in a round: what an engine schedules by, and no message shows.

    Args:
        scenario: The scenario.
        attack: What the client is assigned to, or None.
        samples: How many it holds.
        round_: The round, from 1.
    """
    attacks = attack is not None and role_of(attack, round_) is Role.ATTACKER
    plan = attack.training if attacks and attack is not None and attack.training is not None else scenario.training
    return plan.epochs * samples


def attack_window(scenario: Scenario) -> tuple[int, int] | None:
    """Return first and last attacked round of the run over all enabled attacks, or None for none."""
    return _span([attack for attack in scenario.attacks if attack.enabled], scenario.rounds)


def planned_window(scenario: Scenario) -> tuple[int, int] | None:
    """Return first and last round of the run over all attacks, enabled or not, or None for none.

    An attack-free twin has the one of the run whose twin it is: both are measured over the same rounds.
    """
    return _span(scenario.attacks, scenario.rounds)


def _span(attacks: Sequence[AttackPlan], rounds: int) -> tuple[int, int] | None:
    windows = [
        (attack.rounds.first, min(attack.rounds.last or rounds, rounds))
        for attack in attacks
        if attack.rounds.first <= rounds
    ]
    return (min(first for first, _ in windows), max(last for _, last in windows)) if windows else None
