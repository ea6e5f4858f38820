"""Draw docs/tuning.png from the results of ``benchmarks/cleanup_tuning.py``: a dot per trial, the mean of its seeds.

A dot is hollow where the method gave the target class up on a seed.
Run it with the results' folder: ``python docs/figures/tuning.py OUT``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from fedbd.summary import gave_up_target

ROOT = Path(__file__).resolve().parents[2]
MARKS = "os^DvP*"
KEY = "target_class_accuracy"


def main(folder: Path) -> None:
    """Draw the trials in a folder."""
    mpl.use("Agg")
    trials: dict[str, dict[str, list[tuple[float, float, bool]]]] = {}
    starts: list[tuple[float, float]] = []
    for file in sorted(folder.glob("*.json")):
        method, _, number = file.stem.rpartition("-")[0].rpartition("_")
        steps = json.loads(file.read_text())["steps"]
        first, line = steps[0], steps[-1]
        label = method.replace("_", " ") + (", real trigger (oracle)" if line["oracle"] else "")
        lost = gave_up_target(*({KEY: each[f"{KEY}_{when}"]} for each, when in ((first, "before"), (line, "after"))))
        after = (100 * line["attack_success_after"], 100 * line["clean_accuracy_after"], lost)
        trials.setdefault(label, {}).setdefault(number, []).append(after)
        starts.append((100 * first["attack_success_before"], 100 * first["clean_accuracy_before"]))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for place, (label, found) in enumerate(sorted(trials.items())):
        seeds = [list(zip(*each, strict=True)) for each in found.values()]
        dots = sorted((statistics.mean(asr), statistics.mean(ca), any(lost)) for asr, ca, lost in seeds)
        color, mark = plt.get_cmap("tab10")(place), MARKS[place % len(MARKS)]
        style = {"color": color, "marker": mark, "ms": 7, "mew": 1.2, "alpha": 0.85}
        axes.plot([dot[0] for dot in dots], [dot[1] for dot in dots], color=color, lw=0.8, alpha=0.85)
        axes.plot([], [], ls="", label=label, **style)
        for asr, ca, lost in dots:
            axes.plot([asr], [ca], ls="", fillstyle="none" if lost else "full", **style)
    axes.scatter(*map(statistics.mean, zip(*starts, strict=True)), label="backdoored model", color="black", zorder=3)
    axes.plot([], [], "o", fillstyle="none", color="gray", label="hollow: gave the target class up")
    axes.set(xlabel="attack success rate, %", ylabel="clean accuracy, %", xlim=(-3, 103), ylim=(55, 82))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "tuning.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
