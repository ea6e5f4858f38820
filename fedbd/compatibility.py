"""What cannot work together is refused when the scenario loads, with the reason and the remedy.

Each check yields problems and knows only the scenario, so that they read like a list of rules.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator

from fedbd.errors import Problem, ScenarioError
from fedbd.field_values import shown
from fedbd.registry import location
from fedbd.roles import members
from fedbd.scenario import TWIN, Scenario
from fedbd.types import Need

Check = Callable[[Scenario], Iterator[Problem]]
LONGEST = 200
"""Bytes of a scenario's name, which is a folder's."""


def check(scenario: Scenario) -> list[Problem]:
    """Return every combination in a scenario that cannot work."""
    return [problem for rule in CHECKS for problem in rule(scenario)]


def cohort_fits(s: Scenario) -> Iterator[Problem]:
    """The cohort is no larger than the population."""
    if s.cohort_size > s.partition.clients:
        expected = f"must be <= partition.clients ({s.partition.clients})"
        yield Problem(path="cohort.size", expected=expected, got=str(s.cohort_size))


def name_is_a_folder(s: Scenario) -> Iterator[Problem]:
    """The name can be that of the folder in which the records go."""
    name = s.name.removesuffix(TWIN)
    if re.search(r"[/\\\x00-\x1f]", name) or name[:1] in ".~" or name != name.strip() or name == "twins":
        expected = "must be fit for a folder: no / or \\, no dot or ~ in front, no space around it, and not 'twins'"
        yield Problem(path="name", expected=expected, got=repr(s.name))
    elif len(os.fsencode(name)) > LONGEST:
        yield Problem(path="name", expected=f"must be fit for a folder: at most {LONGEST} bytes", got=shown(s.name))


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


def pollution_lasts(s: Scenario) -> Iterator[Problem]:
    """A local defense remembers samples by their places: what lies there must not change between participations."""
    for i, attack in enumerate(s.attacks):
        whole = attack.rounds.first == 1 and (attack.rounds.last is None or attack.rounds.last >= s.rounds)
        if attack.role == "polluted" and s.local_defense is not None and not whole:
            yield Problem(
                path=f"attacks[{i}].rounds",
                expected="must cover the whole run where polluted clients have a local defense: it remembers samples",
                got=f"{attack.rounds.first} to {attack.rounds.last or s.rounds}",
                remedy="leave rounds out",
            )


def labels_differ(s: Scenario) -> Iterator[Problem]:
    """Names in the records are unique."""
    for kind, plans in (("attacks", s.attacks), ("cleanup", s.cleanup), ("detection", s.detection)):
        for key, times in Counter(plan.key for plan in plans).items():
            if times > 1:
                got, remedy = f"'{key}' {times} times", "give each its own label"
                yield Problem(path=kind, expected="must have different labels", got=got, remedy=remedy)


def guards_run(s: Scenario) -> Iterator[Problem]:
    """Cleanups and detectors run in some round."""
    for path, plan in s.guards:
        late = [round_ for round_ in plan.rounds or () if round_ > s.rounds]
        if late:
            expected = f"must be rounds of the run (1 to {s.rounds})"
            yield Problem(path=f"{path}.rounds", expected=expected, got=", ".join(map(str, late)))
        elif plan.rounds is None and plan.every > s.rounds:
            expected = f"must be <= rounds ({s.rounds}), or '{plan.key}' never runs"
            yield Problem(path=f"{path}.every", expected=expected, got=str(plan.every))


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
        expected = "must be 0 unless engine.name is ray"
        yield Problem(path="engine.client_gpus", expected=expected, got=f"{s.engine.client_gpus:g}")
    if s.engine.executor == "serial" and (s.engine.workers or 1) > 1:
        expected = "must be 1 or null with executor: serial"
        yield Problem(path="engine.workers", expected=expected, got=str(s.engine.workers))
    if s.engine.executor == "serial" and s.engine.name != "local":
        yield Problem(path="engine.executor", expected="must be process unless engine.name is local", got="'serial'")


CHECKS: tuple[Check, ...] = (
    name_is_a_folder,
    cohort_fits,
    clients_listed,
    attackers_fit,
    attacks_act,
    pollution_lasts,
    labels_differ,
    guards_run,
    buckets_fit,
    rule_can_act,
    trusted_there,
    sum_is_exact,
    two_decrypt,
    strategy_known,
    engine_fits,
)
