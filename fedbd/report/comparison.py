"""A comparison on the terminal and as plain data: one row per arm, marks for what must not be misread, notes for marks.

The arms themselves are made in ``fedbd.report.arms``; ``compare`` and ``load_run`` have their names here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.report.arms import MODES, Arm, Statistic, compare
from fedbd.report.console import percent, success_style
from fedbd.report.course import course_columns
from fedbd.report.rows import write_rows
from fedbd.report.run_view import RunView, load_run
from fedbd.report.seed_text import FEW_SEEDS, difference_text, spread_text

__all__ = [
    "Arm",
    "RunView",
    "Statistic",
    "compare",
    "comparison_rows",
    "load_run",
    "notes",
    "render_comparison",
    "write_comparison",
]

Cell = Callable[[Arm], Text]


def render_comparison(console: Console, arms: Sequence[Arm]) -> None:
    """Print a comparison, in as many tables as the console's width asks for; the course of the attack has its own.

    Columns in which no arm has a value are left out, but for CA.
    Means over seeds in percent, below them the spread (standard deviation from five seeds on, else the range), then the
    paired difference to the first arm with its interval, ``-`` where the two are not paired.
    """
    columns: list[tuple[str, Cell]] = [
        ("CA %", lambda arm: _measure(arm, "clean_accuracy")),
        ("ASR %", lambda arm: _measure(arm, "attack_success")),
        ("floor %", lambda arm: _measure(arm, "attack_success_floor", paired=False)),
        ("net ASR %", lambda arm: _measure(arm, "net_attack_success")),
        ("RA %", lambda arm: _measure(arm, "robust_accuracy")),
        ("cleaned CA/ASR %\nif stopped now", lambda arm: _cleaned(arm, MODES[0])),
        ("cleaned CA/ASR %\nin the loop", lambda arm: _cleaned(arm, MODES[1])),
        ("sample AUC", _detected),
        ("server saw", lambda arm: Text("\n".join(arm.server_saw).replace(", ", "\n") or "-")),
        ("s/round", lambda arm: _seconds(arm.statistics.get("seconds_per_round"))),
    ]
    _print(console, arms, [columns[0], *_told(arms, columns[1:])])
    _print(console, arms, _told(arms, course_columns(arms)))
    for note in notes(arms):
        console.print(note, style="dim", markup=False, highlight=False)


def _told(arms: Sequence[Arm], columns: Sequence[tuple[str, Cell]]) -> list[tuple[str, Cell]]:
    """Return the columns that are not empty."""
    return [(title, cell) for title, cell in columns if any(set(cell(arm).plain.split()) - {"-"} for arm in arms)]


def _print(console: Console, arms: Sequence[Arm], columns: Sequence[tuple[str, Cell]]) -> None:
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and _fits(console, _table(arms, columns[start : end + 1])):
            end += 1
        console.print(_table(arms, columns[start:end]))
        start = end


def _fits(console: Console, table: Table) -> bool:
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def _table(arms: Sequence[Arm], columns: Sequence[tuple[str, Cell]]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, leading=1, pad_edge=False)
    table.add_column("arm", overflow="fold", max_width=28)  # long names give way, numbers never do
    for title in ("runs", *(title for title, _ in columns)):
        table.add_column(title, no_wrap=True, vertical="top")
    for arm in arms:
        name = Text(arm.name).append(" †" if arm.oracle else "", "bold yellow")
        table.add_row(name, _runs(arm), *(cell(arm) for _, cell in columns))
    return table


def _runs(arm: Arm) -> Text:
    text = Text("1 seed" if len(arm.seeds) == 1 else f"{len(arm.seeds)} seeds")
    if arm.collapsed:
        text.append(f"\n{len(arm.collapsed)} collapsed", "bold magenta")
    return text.append(f"\n{arm.unfinished} unfinished", "yellow") if arm.unfinished else text


def _measure(arm: Arm, key: str, *, paired: bool = True) -> Text:
    found = arm.statistics.get(key)
    attack = key not in ("clean_accuracy", "attack_success_floor")
    if attack and arm.collapsed and not (found and found.n):
        return Text("collapsed", "bold magenta")
    style = success_style(found.mean if found else None) if key == "attack_success" else ""
    text = Text(_mean(found), style)
    if attack and arm.collapsed and found:
        text.append(f" (of {found.n})", "magenta")
    difference = "-" if arm.unpaired else difference_text(found)
    below = [spread_text(found), *(difference.split(" ", 1) if paired else ())]
    return text.append("".join(f"\n{line}" for line in below if line), "dim")


def _mean(found: Statistic | None) -> str:
    return percent(found.mean if found else None)


def _cleaned(arm: Arm, mode: str) -> Text:
    lines = []
    for name, own in arm.cleaned_collapsed:
        if own != mode:
            continue
        clean, success = (
            arm.statistics.get(f"cleanup.{name}.{mode}.{m}") for m in ("clean_accuracy", "attack_success")
        )
        if not (clean and clean.n) and (name, own) not in arm.cleaned_acted:
            continue  # it repairs nothing, it finds clues
        gone = len(set(arm.cleaned_collapsed[name, own]) | set(arm.collapsed))
        line = Text(f"{name} {_mean(clean)} / ")
        if gone and not (success and success.n):
            line.append("collapsed", "bold magenta")
        else:
            line.append(_mean(success), success_style(success.mean if success else None))
            line.append(f" (of {success.n})" if gone and success else "", "magenta")
        lines.append(line)
        if (name, own) in arm.cleaned_acted:
            lines.append(Text(f"  {arm.cleaned_acted[name, own]}", "yellow"))
        if spread_text(clean):
            lines.append(Text(f"  {spread_text(clean)} / {spread_text(success) or '-'}", "dim"))
    return Text("\n").join(lines) if lines else Text("-")


def _detected(arm: Arm) -> Text:
    lines = []
    for key, found in arm.statistics.items():
        if key.startswith("detection."):
            value = "-" if found.mean is None else f"{found.mean:.3f}"
            lines.append(f"{key.removeprefix('detection.').removesuffix('.auc')} {value}")
    return Text("\n".join(lines) or "-")


def _seconds(found: Statistic | None) -> Text:
    return Text("-" if found is None or found.mean is None else f"{found.mean:.1f}")


def notes(arms: Sequence[Arm]) -> list[str]:
    """Return the notes that the marks in a table need, one sentence each."""
    found = []
    if any(len(arm.seeds) > 1 for arm in arms):
        found.append(f"Means over seeds; below them ± the standard deviation, or the range of fewer than {FEW_SEEDS}.")
    if any(statistic.difference is not None for arm in arms for statistic in arm.statistics.values()):
        found.append(f"Then the difference to {arms[0].name}, paired by seed, with its 95 % bootstrap interval.")
    found += [f"No difference of {arm.name} to {arms[0].name}: {arm.unpaired}." for arm in arms if arm.unpaired]
    if len({text for arm in arms for text in arm.counted}) > 1:
        listed = "; ".join(f"{arm.name} {', '.join(arm.counted)}" for arm in arms if arm.counted)
        found.append(f"The figures are means over different rounds: {listed}.")
    found += [
        f"{arm.name}, rounds of the means: {text}; so net ASR is not ASR less floor."
        for arm in arms
        for text in arm.net
    ]
    found += [f"{arm.name} was measured {', '.join(arm.measured)}." for arm in arms if arm.measured]
    if any(len(arm.seeds) < FEW_SEEDS for arm in arms):
        found.append(f"Fewer than {FEW_SEEDS} seeds: an impression, not a finding.")
    if any(arm.oracle for arm in arms):
        found.append("† uses knowledge that no defender has (oracle).")
    if any(arm.collapsed or any(arm.cleaned_collapsed.values()) for arm in arms):
        found.append("Collapsed runs count in CA only: their ASR is nobody's success. (of n) counts the others.")
    if any(arm.statistics["collapsed_rounds"].mean for arm in arms if arm.seeds):
        found.append(
            "Collapsed rounds, counted without round 0, the start, are in no ASR, net ASR, RA or AUC; they are in CA."
        )
    for arm in arms:
        failed = arm.statistics.get("client_failures")
        if failed and failed.mean:
            each = " a run" if failed.n > 1 else ""
            found.append(f"{arm.name}: {failed.mean:g} failures of clients{each}, see `fedbd show` on a run's folder.")
    if any(arm.unfinished for arm in arms):
        found.append("Unfinished runs are left out.")
    return found


def comparison_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return one flat row per arm, all with the same names: per measure ``_mean``, ``_sd``, ``_min``, ``_max``, ``_n``.

    ``_difference``, ``_low`` and ``_high`` are the paired difference to the first arm and its interval. Shares are
    fractions of 1; what was not measured is None.
    """
    keys = dict.fromkeys(key for arm in arms for key in arm.statistics)
    return [_row(arm, list(keys)) for arm in arms]


def _row(arm: Arm, keys: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": arm.name,
        "oracle": arm.oracle,
        "seeds": len(arm.seeds),
        "unfinished": arm.unfinished,
        "unpaired": arm.unpaired,
        "counted_rounds": "; ".join(arm.counted),
        "collapsed": len(arm.collapsed),
        "server_saw": "; ".join(arm.server_saw),
    }
    for key in keys:
        found = arm.statistics.get(key, Statistic(values={}))
        low, high = found.interval or (None, None)
        row |= {
            f"{key}_mean": found.mean,
            f"{key}_sd": found.sd,
            f"{key}_min": min(found.values.values(), default=None),
            f"{key}_max": max(found.values.values(), default=None),
            f"{key}_n": found.n,
            f"{key}_difference": found.difference,
            f"{key}_low": low,
            f"{key}_high": high,
        }
    return row


def write_comparison(path: str | Path, arms: Sequence[Arm]) -> None:
    """Write ``comparison_rows`` to a ``.csv`` (an absent value is empty) or, for any other name, as JSON."""
    write_rows(path, comparison_rows(arms), empty=["arm"])
