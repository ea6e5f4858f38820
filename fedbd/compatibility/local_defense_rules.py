"""Local defenses: what they remember must last. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections.abc import Iterator

from fedbd.config.scenario import Scenario
from fedbd.errors import Problem


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


def isolation_comes(s: Scenario) -> Iterator[Problem]:
    """A local defense that isolates after some participations does so within the run: in each round a client has one.

    Where fewer clients than all are drawn for a round, how many a client comes to is the draw's.
    """
    after = None if s.local_defense is None else getattr(s.local_defense.impl, "isolate_after", None)
    if after is not None and after > s.rounds:
        expected = f"must be <= rounds ({s.rounds}), or no client ever isolates"
        yield Problem(path="local_defense.isolate_after", expected=expected, got=str(after))


CHECKS = (
    pollution_lasts,
    isolation_comes,
)
