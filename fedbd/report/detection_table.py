"""Sample detectors as tables: clean against triggered inputs, and each pair of the three kinds of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedbd.report.console import percent
from fedbd.report.rows import write_rows

Line = Mapping[str, Any]
PAIRS = {
    "clean_adversarial": "clean /\nadversarial",
    "clean_backdoor": "clean /\nbackdoor",
    "adversarial_backdoor": "adversarial /\nbackdoor",
}
MEASURES = ("auc", "auc_shuffled", "tpr_at_fpr_1", "tpr_at_fpr_5", "precision", "positives", "negatives", "seconds")


def render_detectors(console: Console, lines: Mapping[str, Line]) -> None:
    """Print what detectors made of clean and triggered inputs, and of adversarial ones where there are some.

    Args:
        console: Where to print.
        lines: Per detector a record of ``detection``: ``sample_detection.tried`` and ``adversarial``.
    """
    if any(line.get("positives") for line in lines.values()):
        table = _table("method", ("AUC", "shuffled\ntruth", "TPR %\nat 1 % FPR", "TPR %\nat 5 % FPR", "s"))
        for name, line in lines.items():
            shares = [percent(line[rate]) for rate in ("tpr_at_fpr_1", "tpr_at_fpr_5")]
            table.add_row(name, _auc(line["auc"]), _auc(line["auc_shuffled"]), *shares, f"{line['seconds']:.1f}")
        console.print(table)
    render_pairs(console, lines)
    for name, line in lines.items():
        reasons = {"": line.get("notes") or {}, **(line.get("adversarial") or {})}
        for evasion, entry in reasons.items():
            if entry.get("reason"):
                whose = f"{name}, {evasion}" if evasion else name
                console.print(f"{whose}: {entry['reason']}.", style="dim", markup=False, highlight=False)


def render_pairs(console: Console, lines: Mapping[str, Line]) -> None:
    """Print the AUCs of each pair of kinds of inputs, per detector and evasion; nothing where none was asked for."""
    table = _table("method,\nevasion", (*PAIRS.values(), "examples", "success %"))
    for name, line in lines.items():
        for evasion, entry in (line.get("adversarial") or {}).items():
            pairs = [_auc(entry.get(pair)) for pair in PAIRS]
            count = entry.get("examples")
            shown = "-" if count is None else f"{count:g}"
            table.add_row(f"{name},\n{evasion}", *pairs, shown, percent(entry.get("success")))
    if table.row_count:
        console.print(table)
        text = "AUC by pair: above 0.5 the kind named second scores higher; - where a kind has too few images."
        console.print(text, style="dim", markup=False, highlight=False)


def _table(first: str, titles: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold", max_width=24)
    for title in titles:
        table.add_column(title, no_wrap=True, vertical="top", justify="right")
    return table


def _auc(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_detectors(path: str | Path, lines: Mapping[str, Line]) -> None:
    """Write a row per detector, the pairs as ``EVASION.PAIR``, to a ``.csv`` or, for any other name, as JSON."""
    columns = {
        f"{evasion}.{name}": None
        for line in lines.values()
        for evasion in line.get("adversarial") or {}
        for name in (*PAIRS, "examples", "success")
    }
    rows = []
    for method, line in lines.items():
        pairs = {
            f"{evasion}.{name}": entry.get(name)
            for evasion, entry in (line.get("adversarial") or {}).items()
            for name in (*PAIRS, "examples", "success")
        }
        reason = (line.get("notes") or {}).get("reason")
        rows.append({"method": method, **{name: line[name] for name in MEASURES}, "reason": reason, **columns, **pairs})
    write_rows(path, rows, empty=["method"])
