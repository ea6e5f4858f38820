"""Draw docs/architecture.svg: one round, who does what and who sees what. Run by ``make docs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "architecture.svg"
INK, QUIET = "#1b1f24", "#57606a"
ROUND = "round,pad=0,rounding_size=0.12"
LANES = {
    "client": (0.0, 6.0, "#e8f1fb", "Clients of the round"),
    "server": (7.2, 7.4, "#fdf3e1", "Server"),
    "outside": (15.0, 5.0, "#eeeeee", "Outside the protocol"),
}
INSET = {"client": (0.25, 0.25), "server": (0.25, 0.25), "outside": (0.25, 0.75)}
"""Free space left and right of a lane's boxes."""


@dataclass(frozen=True)
class Box:
    """A step: lane, vertical center, height, title, what it says below."""

    lane: str
    y: float
    height: float
    title: str
    text: str


BOXES = {
    "draw": Box("server", 10.7, 0.9, "draw the cohort", "by partition id, from the seed"),
    "train": Box(
        "client",
        9.15,
        1.45,
        "train",
        "honest: plainly, or by the local defense\npolluted: the same, on poisoned data\nattacker: as its attack says",
    ),
    "mod": Box(
        "client", 7.1, 1.15, "protocol_mod", "in the clear: nothing\nencrypted: local - global, on a grid of 2^-24"
    ),
    "agent": Box(
        "client", 5.2, 1.15, "key agent (encrypted only)", "a process of its own, the only one\nthat holds the key"
    ),
    "fold": Box(
        "server",
        7.1,
        1.15,
        "fold",
        "add each row or ciphertext to its bucket's sum\nas it arrives; the evaluator has no key",
    ),
    "open": Box(
        "server",
        5.2,
        1.15,
        "open (encrypted only)",
        "two clients decrypt every sum;\ntheir answers must agree and lie on the grid",
    ),
    "rule": Box("server", 3.75, 0.9, "aggregation", "on single updates, bucket means or one sum"),
    "inner": Box("server", 2.6, 0.9, "your Flower strategy", "gets one reply: global + server_rate x aggregate"),
    "after": Box("server", 1.45, 0.9, "cleanup, detection, evaluation", "on the global model, with the trusted data"),
    "roles": Box(
        "outside", 8.95, 1.45, "ground truth", "roles, a pure function\nof the scenario;\nno defense reads it"
    ),
    "notes": Box(
        "outside",
        6.35,
        1.85,
        "observer",
        "losses, isolation precision,\nencryption time, checksums:\nfiles that only the\nrecorder reads",
    ),
    "twin": Box("outside", 3.9, 1.15, "attack-free twin", "same draws, nobody attacks:\nthe floor of the ASR"),
    "line": Box("outside", 1.45, 1.15, "record", "one JSON line, on the disk\nbefore the next round"),
}


def span(lane: str) -> tuple[float, float]:
    """Return left and right end of a lane's boxes."""
    left, width, _, _ = LANES[lane]
    return left + INSET[lane][0], left + width - INSET[lane][1]


def middle(lane: str) -> float:
    """Return the horizontal center of a lane's boxes."""
    return sum(span(lane)) / 2


def edge(name: str, side: str) -> tuple[float, float]:
    """Return the middle of a box's side."""
    box = BOXES[name]
    left, right = span(box.lane)
    half = box.height / 2
    points = {
        "top": (middle(box.lane), box.y + half),
        "bottom": (middle(box.lane), box.y - half),
        "left": (left, box.y),
        "right": (right, box.y),
    }
    return points[side]


def draw_box(ax: Axes, box: Box) -> None:
    """Draw one step."""
    left, right = span(box.lane)
    top = box.y + box.height / 2
    shape = FancyBboxPatch((left, box.y - box.height / 2), right - left, box.height, boxstyle=ROUND)
    shape.set(facecolor="white", edgecolor=INK, linewidth=0.9)
    ax.add_patch(shape)
    ax.text(middle(box.lane), top - 0.1, box.title, ha="center", va="top", weight="bold", size=9)
    ax.text(middle(box.lane), top - 0.42, box.text, ha="center", va="top", size=7.8, color=QUIET, linespacing=1.15)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    line = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=1, shrinkB=1)
    line.set(color=INK, linewidth=1.0)
    ax.add_patch(line)


def note(ax: Axes, x: float, y: float, text: str) -> None:
    """Write beside an arrow."""
    ax.text(x, y, text, ha="center", va="center", size=7.5, linespacing=1.1)


def observe(ax: Axes, names: tuple[str, ...]) -> None:
    """Lead boxes of the outside lane to the record, round the right of each other."""
    rail = span("outside")[1] + 0.4
    style = {"color": QUIET, "linewidth": 1.0, "linestyle": "--"}
    for name in names:
        ax.plot([edge(name, "right")[0], rail], [BOXES[name].y] * 2, **style)
    ax.plot([rail, rail], [BOXES[names[0]].y, BOXES["line"].y], **style)
    line = FancyArrowPatch(
        (rail, BOXES["line"].y), edge("line", "right"), arrowstyle="-|>", mutation_scale=11, shrinkA=0
    )
    line.set(color=QUIET, linewidth=1.0)
    ax.add_patch(line)


def main() -> None:
    """Draw the picture."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "svg.hashsalt": "fedbd"})
    fig, ax = plt.subplots(figsize=(12, 7.0))
    for left, width, color, title in LANES.values():
        ax.add_patch(FancyBboxPatch((left, 0.6), width, 10.9, boxstyle=ROUND, fc=color, ec="none"))
        ax.text(left + width / 2, 11.85, title, ha="center", va="center", size=11, weight="bold")
    for box in BOXES.values():
        draw_box(ax, box)
    arrow(ax, edge("draw", "left"), edge("train", "top"))
    note(ax, 6.6, 10.95, "global\nweights")
    for upper, lower in (("train", "mod"), ("mod", "agent"), ("fold", "open"), ("open", "rule"), ("rule", "inner")):
        arrow(ax, edge(upper, "bottom"), edge(lower, "top"))
    arrow(ax, edge("inner", "bottom"), edge("after", "top"))
    note(ax, middle("client") + 0.85, 8.05, "local weights")
    note(ax, middle("client") + 0.9, 6.15, "row, ciphertext")
    arrow(ax, edge("mod", "right"), edge("fold", "left"))
    note(ax, 6.6, 7.55, "weights or\nciphertext")
    arrow(ax, edge("open", "left"), edge("agent", "right"))
    note(ax, 6.6, 5.5, "sums")
    arrow(ax, edge("after", "right"), edge("line", "left"))
    observe(ax, ("roles", "notes", "twin"))
    ax.text(middle("client"), 2.6, _SEEN, ha="center", va="center", size=8.3, linespacing=1.35)
    ax.set(xlim=(-0.1, 20.1), ylim=(0.4, 12.2))
    ax.axis("off")
    fig.savefig(OUT, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    print(OUT)


_SEEN = (
    "The server sees: single updates\n(in the clear), or sums of bucket_size\nclients (encrypted), and who took part.\n"
    "Two clients see the sums they open.\nNobody sees a key but the key agent."
)

if __name__ == "__main__":
    main()
