"""What cannot work together is refused when the scenario loads, with the reason and the remedy.

Each check yields problems and knows only the scenario, so that they read like a list of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from fedbd.errors import Problem, ScenarioError
from fedbd.registry import location
from fedbd.roles import members
from fedbd.scenario import Scenario
from fedbd.types import Need

Check = Callable[[Scenario], Iterator[Problem]]


def check(scenario: Scenario) -> list[Problem]:
    """Return every combination in a scenario that cannot work."""
    return [problem for rule in CHECKS for problem in rule(scenario)]


def cohort_fits(s: Scenario) -> Iterator[Problem]:
    """The cohort is no larger than the population."""
    if s.cohort_size > s.partition.clients:
        expected = f"must be <= partition.clients ({s.partition.clients})"
        yield Problem(path="cohort.size", expected=expected, got=str(s.cohort_size))


def attackers_fit(s: Scenario) -> Iterator[Problem]:
    """Attacks find their clients, and the cohort its attackers."""
    clients = s.partition.clients
    listed = [client for attack in s.attacks for client in attack.clients.ids or ()]
    for client, times in sorted(Counter(listed).items()):
        if times > 1:
            yield Problem(path="attacks", expected="must not list a client twice", got=f"client {client} {times} times")
        if client >= clients:
            expected = f"must list clients below partition.clients ({clients})"
            yield Problem(path="attacks", expected=expected, got=str(client))
    total = sum(members(attack, clients) for attack in s.attacks)
    if total > clients:
        yield Problem(path="attacks", expected=f"must take at most {clients} clients together", got=str(total))
    fixed = s.cohort.attackers_per_round
    if fixed is None:
        return
    most = min(total, s.cohort_size)
    if fixed > most:
        expected = f"must be <= the {total} attacking clients and the cohort of {s.cohort_size}"
        yield Problem(path="cohort.attackers_per_round", expected=expected, got=str(fixed))
    elif s.cohort_size - fixed > clients - total:
        expected = f"leaves {s.cohort_size - fixed} places for {clients - total} clients that never attack"
        yield Problem(path="cohort.attackers_per_round", expected=expected, remedy="shrink cohort.size")


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


def labels_differ(s: Scenario) -> Iterator[Problem]:
    """Names in the records are unique."""
    for kind, plans in (("attacks", s.attacks), ("cleanup", s.cleanup), ("detection", s.detection)):
        for key, times in Counter(plan.key for plan in plans).items():
            if times > 1:
                remedy = f"give each its own label (now {times} times '{key}')"
                yield Problem(path=kind, expected="must have different labels", remedy=remedy)


def buckets_fit(s: Scenario) -> Iterator[Problem]:
    """Buckets are no larger than the cohort."""
    if s.bucket_size is not None and s.bucket_size > s.cohort_size:
        expected = f"must be <= the cohort ({s.cohort_size}) or null for one sum"
        yield Problem(path="bucket_size", expected=expected, got=str(s.bucket_size))


def rule_can_act(s: Scenario) -> Iterator[Problem]:
    """The aggregation rule sees what it needs, in enough rows, and has its trusted data."""
    rule, name = s.aggregation.impl, s.aggregation.name
    if Need.INDIVIDUAL in s.needs and s.bucket_size is None:
        most = max(1, s.cohort_size // max(rule.minimum_rows, 2))
        yield Problem(
            path="aggregation",
            expected=f"'{name}' compares updates, but bucket_size: null shows it one sum over the cohort",
            remedy=f"set bucket_size (at most {most} here), or take a rule that acts on a sum (mean, norm_clip with "
            "where: client) and clean up afterwards (cleanup: rnp)",
        )
    elif s.buckets < rule.minimum_rows:
        what = "updates" if s.bucket_size == 1 else f"buckets of {s.bucket_size}"
        yield Problem(
            path="aggregation",
            expected=f"'{name}' needs at least {rule.minimum_rows} rows",
            got=f"{s.buckets} {what}",
            remedy="enlarge cohort.size or shrink bucket_size",
        )
    if Need.IDS in s.needs and s.bucket_size != 1:
        expected = f"'{name}' follows clients over rounds and needs bucket_size: 1"
        yield Problem(path="aggregation", expected=expected)
    if Need.TRUSTED in s.needs and s.trusted is None:
        yield Problem(path="aggregation", expected=f"'{name}' needs trusted data", remedy="add trusted: {size: 500}")


def trusted_there(s: Scenario) -> Iterator[Problem]:
    """Methods that need clean data have them."""
    for path, plan in s.guards:
        if s.trusted is None and getattr(plan.method.impl, "needs_trusted", False):
            expected = f"'{plan.method.name}' needs trusted data, and trusted is null"
            remedy = "add trusted: {size: 500}, or take a method that needs no data"
            yield Problem(path=path, expected=expected, remedy=remedy)


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


def engine_fits(s: Scenario) -> Iterator[Problem]:
    """Engine fields that would be ignored are refused."""
    if s.engine.client_gpus and s.engine.name != "ray":
        expected = "is for engine.name: ray only"
        yield Problem(path="engine.client_gpus", expected=expected, got=f"{s.engine.client_gpus:g}")
    if s.engine.executor == "serial" and (s.engine.workers or 1) > 1:
        expected = "must be 1 or null with executor: serial"
        yield Problem(path="engine.workers", expected=expected, got=str(s.engine.workers))


CHECKS: tuple[Check, ...] = (
    cohort_fits,
    attackers_fit,
    attacks_act,
    labels_differ,
    buckets_fit,
    rule_can_act,
    trusted_there,
    sum_is_exact,
    two_decrypt,
    strategy_known,
    engine_fits,
)
