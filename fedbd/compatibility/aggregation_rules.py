"""Buckets, rules, encryption and the Flower strategy. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections.abc import Iterator

from fedbd.config.field_values import shown
from fedbd.config.scenario import Scenario
from fedbd.errors import Problem, ScenarioError
from fedbd.registry import location
from fedbd.roles import assignment, locally_defended, members, role_of, selected
from fedbd.types import Need, Role


def buckets_fit(s: Scenario) -> Iterator[Problem]:
    """Buckets are no larger than the cohort."""
    if s.bucket_size is not None and s.bucket_size > s.cohort_size:
        expected = f"must be <= the cohort ({s.cohort_size}) or null for one sum"
        yield Problem(path="bucket_size", expected=expected, got=str(s.bucket_size))


def rule_can_act(s: Scenario) -> Iterator[Problem]:
    """The aggregation rule sees what it needs, in enough rows, and has its trusted data."""
    rule, name = s.aggregation.impl, s.aggregation.name
    rows = max(rule.minimum_rows, 2 if Need.INDIVIDUAL in s.needs and s.bucket_size is None else 1)
    enough = f"set bucket_size to {s.cohort_size // rows} or less"
    if s.cohort_size < rows:
        enough = f"set cohort.size to at least {rows}"
    if Need.INDIVIDUAL in s.needs and s.bucket_size is None:
        yield Problem(
            path="aggregation",
            expected=f"'{name}' compares updates, but bucket_size: null shows it one sum over the cohort",
            remedy=f"{enough}, or take a rule that acts on a sum (mean, norm_clip with where: client) and repair the "
            "model afterwards (cleanup: [rnp])",
        )
    elif s.buckets < rule.minimum_rows:
        rows_are = "updates" if s.bucket_size == 1 else f"buckets of {s.bucket_size}"
        expected = f"'{name}' needs at least {rule.minimum_rows} updates or buckets"
        yield Problem(path="aggregation", expected=expected, got=f"{s.buckets} {rows_are}", remedy=enough)
    if Need.IDS in s.needs and s.bucket_size != 1:
        expected = f"'{name}' follows clients over rounds and needs bucket_size: 1"
        yield Problem(path="aggregation", expected=expected, got=f"bucket_size: {shown(s.bucket_size)}")
    if Need.TRUSTED in s.needs and s.trusted is None:
        yield Problem(path="aggregation", expected=f"'{name}' needs trusted data", remedy="add trusted: {size: 500}")


def sum_is_exact(s: Scenario) -> Iterator[Problem]:
    """The encryption's noise stays below half a grid step for the clients of one sum."""
    if s.secure_sum is None:
        return
    per_sum = s.cohort_size if s.bucket_size is None else min(s.cohort_size, 2 * s.bucket_size - 1)
    for name, sentence in s.secure_sum.impl.problems(per_sum):
        yield Problem(path=f"secure_sum.{name}" if name else "secure_sum", expected=sentence)


def two_decrypt(s: Scenario) -> Iterator[Problem]:
    """Two clients decrypt and are compared."""
    if s.secure_sum is not None and s.cohort_size < 2:
        yield Problem(
            path="cohort.size", expected="must be >= 2 under encryption: two clients decrypt and are compared", got="1"
        )


def strategy_known(s: Scenario) -> Iterator[Problem]:
    """The Flower strategy has a name we know, or is a path."""
    try:
        location("strategy", s.strategy.name, "strategy.name")
    except ScenarioError as error:
        yield from error.problems


def proximal_term_acts(s: Scenario) -> Iterator[Problem]:
    """FedProx's term has a weight, and a client that trains with it."""
    mu = s.strategy.arguments.get("proximal_mu")
    named = s.strategy.name.rpartition(":")[2].lower() == "fedprox"
    path = "strategy.arguments.proximal_mu"
    if not named and mu is None:
        return
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 < mu < float("inf"):
        expected, remedy = "must be a number > 0: it is the weight of the proximal term", "take fedavg for none"
        yield Problem(path=path, expected=expected, got=shown(mu), remedy=remedy)
    clients, chosen = s.partition.clients, s.local_defense_clients
    listed = sum(members(attack, clients) for attack in s.attacks)
    if listed > clients or (chosen is not None and selected(chosen, clients) > clients):
        return  # refused for that
    always = {
        client
        for client, attack in assignment(s).items()
        if all(role_of(attack, round_) is Role.ATTACKER for round_ in range(1, s.rounds + 1))
    }
    if len(always | locally_defended(s)) >= clients:
        yield Problem(
            path=path,
            expected="has no client that trains with it: attackers ignore it, a local defense has its own objective",
            remedy="give local_defense_clients fewer than all clients, leave local_defense out, or take fedavg",
        )


CHECKS = (
    buckets_fit,
    rule_can_act,
    sum_is_exact,
    two_decrypt,
    strategy_known,
    proximal_term_acts,
)
