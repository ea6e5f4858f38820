"""What cannot work together is refused when the scenario loads, with the reason and the remedy.

Each check yields problems and knows only the scenario, so that they read like a list of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedbd.compatibility import (
    aggregation_rules,
    attack_rules,
    batch_norm_rules,
    cleanup_rules,
    detection_rules,
    engine_rules,
    fault_rules,
    local_defense_rules,
    run_rules,
)
from fedbd.config.scenario import Scenario
from fedbd.errors import Problem

CHECKS: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    *run_rules.CHECKS,
    *attack_rules.CHECKS,
    *local_defense_rules.CHECKS,
    *cleanup_rules.CHECKS,
    *detection_rules.CHECKS,
    *batch_norm_rules.CHECKS,
    *aggregation_rules.CHECKS,
    *engine_rules.CHECKS,
    *fault_rules.CHECKS,
)
"""All rules; a scenario's problems come in their order."""


def check(scenario: Scenario) -> list[Problem]:
    """Return every combination in a scenario that cannot work."""
    return [problem for rule in CHECKS for problem in rule(scenario)]
