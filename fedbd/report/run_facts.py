"""What ``fedbd show`` says of a run beside its tables: which clients failed, and where its attack-free twin lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.report.run_view import RunView
from fedbd.summary import failed_clients

LISTED = 20
"""Rows of failures that are printed."""


def render_facts(console: Console, folder: Path, run: RunView) -> None:
    """Print what there is to say, nothing for a run in which no client failed and that had no twin.

    Args:
        console: Where to print.
        folder: The run's folder.
        run: What is in it.
    """
    _render_failures(console, run)
    twin = twin_of(folder, run)
    if twin is not None:
        gone = "" if twin.is_dir() else " (not there any more)"
        console.print(f"Attack-free twin: {twin}{gone}", markup=False, highlight=False, soft_wrap=True)


def twin_of(folder: Path, run: RunView) -> Path | None:
    """Return the folder of a run's attack-free twin, None where it had none or is older than that record."""
    found = run.summary.get("twin")
    return None if found is None else Path(os.path.normpath(folder / found))


def _render_failures(console: Console, run: RunView) -> None:
    """Print who failed in which rounds, whether that was simulated, and what the server came to know."""
    found = failures(run)
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("client", "failed in rounds", "simulated", "what the server saw"):
        table.add_column(title, overflow="fold")
    for (client, simulated, reason), rounds in list(found.items())[:LISTED]:
        table.add_row(client, span_text(rounds), simulated or "no", Text(reason))
    console.print(table)
    if len(found) > LISTED:
        more = f"{len(found) - LISTED} more: notes.faults in rounds.jsonl names them all."
        console.print(more, style="dim", markup=False, highlight=False)


def failures(run: RunView) -> dict[tuple[str, str, str], list[int]]:
    """Return the rounds of each (client, simulated fault, reason), in the order of the clients.

    The fault is what the scenario's ``faults`` made it do, as ``hang at train``; "" for a client that failed by itself.
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    for line in run.rounds:
        acted = (line.get("notes") or {}).get("simulated_faults") or {}
        for client, reason in failed_clients(line).items():
            meant = ", ".join(f"{kind} at {stage}" for stage, kind in acted.get(client, {}).items())
            found.setdefault((client, meant, reason), []).append(line["round"])
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0]), item[1])))


def span_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs of them drawn together: ``1, 3..5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("..".join(map(str, span)) for span in spans)
