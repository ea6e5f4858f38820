"""Draw docs/in-loop.png from the runs of ``benchmarks/in_loop.py``, seed 1: ASR over the rounds, a panel a method.

Run it with the results' folder: ``python docs/figures/in_loop.py OUT``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fedbd.records.record import read_rounds

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "in-loop-"


def main(folder: Path) -> None:
    """Draw the runs in a folder."""
    mpl.use("Agg")
    runs = {run.parent.name.removeprefix(PREFIX): read_rounds(run) for run in sorted(folder.glob(f"{PREFIX}*/seed-1"))}
    bare = runs.pop("none")
    figure, panels = plt.subplots(2, 5, figsize=(13, 5), sharex=True, sharey=True, layout="constrained")
    for axes, (name, lines) in zip(panels.flat, runs.items(), strict=True):
        _curve(axes, bare, color="0.75")
        _curve(axes, lines, color="tab:red")
        _repairs(axes, lines)
        axes.set_title(name.replace("-", " "), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1, 2].set_xlabel("round")
    figure.supylabel("attack success rate, %", fontsize=10)
    marks = [
        ("gray: no defense", "0.75", "-"),
        ("red: this method", "tab:red", "-"),
        ("dot: after a repair", "tab:blue", "o"),
    ]
    for label, color, mark in marks:
        panels[0, 0].plot([], [], mark, color=color, label=label)
    figure.legend(loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)
    figure.savefig(ROOT / "docs" / "in-loop.png", dpi=110)


def _curve(axes: Axes, lines: list[dict[str, Any]], color: str) -> None:
    axes.plot([line["round"] for line in lines], [100 * line["attack_success"] for line in lines], color=color, lw=1.2)


def _repairs(axes: Axes, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        for entry in (line["cleanup"] or {}).values():
            if entry["acted"]:
                axes.plot([line["round"]], [100 * entry["after"]["attack_success"]], "o", color="tab:blue", ms=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
