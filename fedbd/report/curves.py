"""Accuracy and attack success over the rounds, as a picture: every seed its own line, the attacked rounds shaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedbd.report.run_view import RunView

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B7300")
"""Okabe and Ito's, told apart by color-blind readers (yellow darkened); arms beyond them repeat with dashes."""

DASHES: tuple[Literal["-", "--", "-."], ...] = ("-", "--", "-.")


def draw_curves(path: str | Path, runs: Sequence[RunView]) -> None:
    """Draw CA and ASR of several runs over their rounds.

    Runs of one arm share a color. Dotted lines are floors (the attack-free twin), triangles what a cleanup left
    (filled: in the loop, open: if stopped now), crosses collapsed rounds, gray the attacked rounds. The attack success
    of a collapsed model is nobody's: its line breaks there, and no triangle stands for it.

    Args:
        path: Where the picture goes; its suffix decides the format (png, svg, pdf).
        runs: At least one.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state as pyplot keeps
    above, below = figure.subplots(2, 1, sharex=True)
    for run in runs:
        place = arms.index(run.arm)
        style = {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place // len(COLORS) % len(DASHES)]}
        _lines(above, run, "clean_accuracy", style)
        _lines(below, run, "attack_success", style)
    windows = {tuple(run.summary["attack_window"]) for run in runs if run.summary["attack_window"]}
    for axes, title in ((above, "clean accuracy, %"), (below, "attack success, %")):
        for first, last in windows:  # half a round each side, so that a single attacked round is seen, too
            axes.axvspan(first - 0.5, last + 0.5, color="0.5", alpha=0.12, linewidth=0)
        axes.set_ylabel(title)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlabel("round")
    below.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, arms, runs)
    # Without matplotlib's version in it, a png of the same runs has the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def _lines(axes: Axes, run: RunView, measure: str, style: Mapping[str, Any]) -> None:
    """Draw one run in one panel."""
    axes.plot(*_points(run, measure), linewidth=1.6, alpha=0.85, marker=".", markersize=3, **style)
    if measure == "attack_success":
        floor = _points(run, "attack_success_floor")
        axes.plot(*floor, linewidth=1.2, alpha=0.7, color=style["color"], linestyle=":")
    bad = [line for line in run.rounds if line.get("collapsed") and line.get(measure) is not None]
    axes.plot([line["round"] for line in bad], [100 * line[measure] for line in bad], "x", color=style["color"], ms=7)
    for mode, fill in (("in_loop", style["color"]), ("if_stopped_now", "white")):
        x, y = _cleaned(run, measure, mode)
        axes.plot(x, y, "v", color=style["color"], markerfacecolor=fill, markersize=5.5, alpha=0.9)


def _points(run: RunView, measure: str) -> tuple[list[int], list[float]]:
    """Return rounds and percent; a round without the measure, or one in which it says nothing, breaks the line.

    Rounds in which nothing was measured (``evaluation.every``) are passed over.
    """
    lines = [line for line in run.rounds if line.get("clean_accuracy") is not None]
    values = [None if _says_nothing(measure, line) else line.get(measure) for line in lines]
    return [line["round"] for line in lines], [float("nan") if v is None else 100 * v for v in values]


def _says_nothing(measure: str, found: Mapping[str, Any]) -> bool:
    return measure == "attack_success" and found.get("collapsed") is True


def _cleaned(run: RunView, measure: str, mode: str) -> tuple[list[int], list[float]]:
    found = [
        (line["round"], 100 * value)
        for line in run.rounds
        for entry in (line.get("cleanup") or {}).values()
        if entry.get("mode") == mode and not _says_nothing(measure, after := entry.get("after") or {})
        if (value := after.get(measure)) is not None
    ]
    return [x for x, _ in found], [y for _, y in found]


def _legend(figure: Figure, arms: Sequence[str], runs: Sequence[RunView]) -> None:
    """Name every arm, and every mark that is in the picture."""
    handles: list[Line2D | Patch] = []
    for place, arm in enumerate(arms):
        own = [run for run in runs if run.arm == arm]
        label = f"{arm}{' †' if any(run.oracle for run in own) else ''}, {len(own)} seed{'s' if len(own) > 1 else ''}"
        dashes = DASHES[place // len(COLORS) % len(DASHES)]
        handles.append(Line2D([], [], color=COLORS[place % len(COLORS)], linestyle=dashes, label=label))
    gray: dict[str, Any] = {"color": "0.35", "linestyle": "none"}
    if any(line.get("attack_success_floor") is not None for run in runs for line in run.rounds):
        handles.append(Line2D([], [], color="0.35", linestyle=":", label="floor (attack-free twin)"))
    if any(_cleaned(run, "attack_success", "in_loop")[0] for run in runs):
        handles.append(Line2D([], [], marker="v", label="cleaned, in the loop", **gray))
    if any(_cleaned(run, "attack_success", "if_stopped_now")[0] for run in runs):
        handles.append(Line2D([], [], marker="v", markerfacecolor="white", label="cleaned, if stopped now", **gray))
    if any(line.get("collapsed") for run in runs for line in run.rounds):
        handles.append(Line2D([], [], marker="x", label="collapsed", **gray))
    if any(run.summary["attack_window"] for run in runs):
        handles.append(Patch(color="0.5", alpha=0.2, label="attacked rounds"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
