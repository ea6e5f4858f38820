"""What ``fedbd show`` says of a run beside its tables: where its attack-free twin lies."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from fedbd.report.run_view import RunView


def render_facts(console: Console, folder: Path, run: RunView) -> None:
    """Print a line per fact, nothing for a run without any.

    Args:
        console: Where to print.
        folder: The run's folder.
        run: What is in it.
    """
    twin = twin_of(folder, run)
    if twin is not None:
        gone = "" if twin.is_dir() else " (not there any more)"
        console.print(f"Attack-free twin: {twin}{gone}", markup=False, highlight=False, soft_wrap=True)


def twin_of(folder: Path, run: RunView) -> Path | None:
    """Return the folder of a run's attack-free twin, None where it had none or is older than that record."""
    found = run.summary.get("twin")
    return None if found is None else Path(os.path.normpath(folder / found))
