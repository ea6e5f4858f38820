"""Whether two runs are paired: equal seeds pair them only where they share the draws that the seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbd.report.run_view import RunView

SHARED = (
    "data",
    "partition",
    "trusted set",
    "model",
    "cohort",
    "rounds",
    "attackers",
    "measured rounds",
    "test images",
)
"""What two scenarios must have in common, beside the seed, in words."""


def unpaired_because(runs: Sequence[RunView], reference: Sequence[RunView]) -> str:
    """Return why no paired differences can be formed, as a clause, or "" where they can.

    Args:
        runs: An arm's finished runs, of different seeds.
        reference: The same of the arm that it is compared with.
    """
    others = {run.seed: run for run in reference}
    pairs = [(run, others[run.seed]) for run in runs if run.seed in others]
    if runs and others and not pairs:
        return "they have no seed in common"
    differing = [name for name in SHARED if any(_part(a, name) != _part(b, name) for a, b in pairs)]
    if not differing:
        return ""
    listed = " and ".join([", ".join(differing[:-1]), differing[-1]] if differing[1:] else differing)
    single = len(differing) == 1 and not differing[0].endswith("s")
    return f"their {listed} {'differs' if single else 'differ'}"


def _part(run: RunView, name: str) -> Any:
    """Return what a run's scenario says of one thing that pairs share."""
    scenario = run.scenario
    if name == "data":  # where the files lie decides nothing
        return {key: value for key, value in (scenario.get("data") or {}).items() if key != "root"}
    if name == "measured rounds":
        return (scenario.get("evaluation") or {}).get("every", 1)
    if name == "test images":
        return (scenario.get("evaluation") or {}).get("samples")
    if name != "attackers":
        return scenario.get("trusted" if name == "trusted set" else name)
    if (scenario.get("cohort") or {}).get("attackers_per_round") is None:
        return None  # otherwise whom a cohort draws depends on who attacks when
    return [(attack.get("clients"), attack.get("rounds")) for attack in scenario.get("attacks") or ()]
