"""The stages of a training that a defense carried out: where each ended, and whether what it isolated was poisoned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fedbd.report.console import percent
from fedbd.report.training_progress import measures_text


def stage_lines(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per stage and one for the isolation; none of a training without stages.

    Args:
        epochs: The lines of ``epochs.jsonl``.
    """
    lines = []
    for stage, group in groupby(epochs, key=lambda line: line.get("stage")):
        if stage is None:
            continue
        own = list(group)
        lines.append(f"{stage}: epochs {own[0]['epoch']}..{own[-1]['epoch']}, then {measures_text(own[-1])}")
        lines += [_isolation(line) for line in own if line.get("isolated") is not None]
    return lines


def _isolation(line: Mapping[str, Any]) -> str:
    share, precision, recall = (line.get(f"isolation_{name}") for name in ("share", "precision", "recall"))
    text = f"isolated after epoch {line['epoch']}: {line['isolated']} images ({percent(share)} %)"
    truth = f"recall {percent(recall)} % of the poisoned" if recall is not None else "nothing is poisoned"
    return f"{text}; precision {percent(precision)} %, {truth}"
