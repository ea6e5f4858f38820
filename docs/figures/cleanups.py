"""Draw docs/cleanups.png from the results of ``benchmarks/central_table.py``: every seed of every arm is a dot.

A dot is hollow where the method gave the target class up.
Run it with the results' folder: ``python docs/figures/cleanups.py OUT``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from fedbd.summary import gave_up_target

ROOT = Path(__file__).resolve().parents[2]
MARKS = "os^DvP*X<>hdp8"
KEY = "target_class_accuracy"


def main(folder: Path) -> None:
    """Draw the results in a folder."""
    mpl.use("Agg")
    found: dict[str, list[tuple[float, float, bool]]] = {}
    for file in sorted(folder.glob("*.json")):
        name, _, _ = file.stem.rpartition("-")
        steps = json.loads(file.read_text())["steps"]
        first, line = steps[0], steps[-1]
        label = name.replace("_then_", " > ").replace("_", " ") + (" (oracle)" if line["oracle"] else "")
        label += "" if line["acted"] else " (did not act)"
        lost = gave_up_target(*({KEY: each[f"{KEY}_{when}"]} for each, when in ((first, "before"), (line, "after"))))
        found.setdefault(label, []).append(
            (100 * line["attack_success_after"], 100 * line["clean_accuracy_after"], lost)
        )
        found.setdefault("backdoored model", []).append(
            (100 * first["attack_success_before"], 100 * first["clean_accuracy_before"], False)
        )
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colors = plt.get_cmap("tab20")
    for place, (label, dots) in enumerate(sorted(found.items())):
        color = "black" if label == "backdoored model" else colors(place % 20)
        style = {"color": color, "marker": MARKS[place % len(MARKS)], "ms": 6, "alpha": 0.85, "ls": ""}
        axes.plot([], [], label=label, **style)
        for asr, ca, lost in sorted(set(dots)):
            axes.plot([asr], [ca], fillstyle="none" if lost else "full", **style)
    axes.plot([], [], "o", fillstyle="none", color="gray", label="hollow: gave the target class up")
    axes.set(xlabel="attack success rate, %", ylabel="clean accuracy, %", xlim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "cleanups.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
