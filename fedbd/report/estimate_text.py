"""What a run will take, in lines for people."""

from __future__ import annotations

from fedbd.estimate import Estimate
from fedbd.report.console import duration


def estimate_text(found: Estimate) -> str:
    """Return an estimate as a few lines."""
    parts = ", ".join(f"{name} {value:.3g}" for name, value in found.seconds.items() if name != "total" and value > 0)
    rounds = f"{found.rounds} rounds of {found.seconds['total']:.3g} s"
    twin = "without a twin"
    if found.twin_seconds is not None:
        twin = f"and {found.rounds} of {found.twin_seconds['total']:.3g} s for its attack-free twin"
    return "\n".join(
        [
            f"{found.name} seed {found.seed}: about {duration(found.run_seconds)} in all: {rounds}, {twin}",
            f"  a round   {found.seconds['total']:.3g} s on {found.workers} workers ({parts})",
            f"  memory    {size(found.process_bytes)} a process at most, {found.workers + 1} processes; "
            f"{size(found.data_bytes)} of images are shared; the model has {found.parameters:,} weights",
            f"  traffic   {size(found.bytes_down)} down and {size(found.bytes_up)} up a round",
            f"  without   {', '.join(found.not_counted)}",
        ]
    )


def size(count: float) -> str:
    """Return a number of bytes with a unit of powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
