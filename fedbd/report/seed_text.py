"""What several seeds of an arm give, in a few characters: the spread, and the paired difference to another arm."""

from __future__ import annotations

from fedbd.report.arms import Statistic
from fedbd.report.console import percent

FEW_SEEDS = 5
"""Fewer seeds give an impression, and a range in place of a standard deviation."""


def spread_text(found: Statistic | None) -> str:
    """Return the spread of a share over seeds in percent: ``90.8..91.6``, from five seeds on ``±0.3``, or nothing."""
    if found is None or found.sd is None:
        return ""
    if found.n >= FEW_SEEDS:
        return f"±{percent(found.sd)}"
    return f"{percent(min(found.values.values()))}..{percent(max(found.values.values()))}"


def difference_text(found: Statistic | None) -> str:
    """Return the paired difference in percentage points and its interval: ``+1.2 [+0.3, +2.0]``, or nothing."""
    if found is None or found.difference is None:
        return ""
    text = signed(found.difference)
    return text + (f" [{signed(found.interval[0])}, {signed(found.interval[1])}]" if found.interval else "")


def signed(value: float) -> str:
    """Return a difference of shares in percentage points: ``+1.2``."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"
