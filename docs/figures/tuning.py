"""Draw docs/tuning.png from the results of ``benchmarks/cleanup_tuning.py``: a dot per trial, the mean of its seeds.

Run it with the results' folder: ``python docs/figures/tuning.py OUT``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
MARKS = "os^DvP*"


def main(folder: Path) -> None:
    """Draw the trials in a folder."""
    mpl.use("Agg")
    trials: dict[str, dict[str, list[tuple[float, float]]]] = {}
    starts: list[tuple[float, float]] = []
    for file in sorted(folder.glob("*.json")):
        method, _, number = file.stem.rpartition("-")[0].rpartition("_")
        line = json.loads(file.read_text())[-1]
        label = method.replace("_", " ") + (", real trigger (oracle)" if line["oracle"] else "")
        after = (100 * line["attack_success_after"], 100 * line["clean_accuracy_after"])
        trials.setdefault(label, {}).setdefault(number, []).append(after)
        starts.append((100 * line["chain_start"]["attack_success"], 100 * line["chain_start"]["clean_accuracy"]))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for place, (label, found) in enumerate(sorted(trials.items())):
        dots = sorted(tuple(map(statistics.mean, zip(*seeds, strict=True))) for seeds in found.values())
        color = plt.get_cmap("tab10")(place)
        mark = MARKS[place % len(MARKS)]
        axes.plot(*zip(*dots, strict=True), label=label, color=color, marker=mark, ms=6, lw=0.8, alpha=0.85)
    axes.scatter(*map(statistics.mean, zip(*starts, strict=True)), label="backdoored model", color="black", zorder=3)
    axes.set(xlabel="attack success rate, %", ylabel="clean accuracy, %", xlim=(-3, 103), ylim=(55, 82))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "tuning.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
