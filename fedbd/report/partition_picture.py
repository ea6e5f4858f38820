"""Who holds what, as a picture: sizes above, clients by classes below; attackers marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedbd.report.partition_view import PartitionView

STACKED, BUBBLES, NUMBERED = 12, 60, 40
"""Most classes that are told apart by color; most clients drawn as bubbles; most clients with a number each."""

MARKS = {"attacker": "#C1121F", "polluted": "#E08E00"}
SERVER = "0.55"
UPPER, TOP, GAP, BOTTOM, LEFT = 1.9, 0.6, 0.35, 1.05, 0.75
"""Inches: the upper panel, the margins and what lies between the panels."""


def draw_partition(path: str | Path, view: PartitionView) -> None:
    """Draw what each client holds.

    Above, the clients' sizes, stacked by class where there are few classes. Below, classes by clients: bubbles whose
    area is the number of samples, or, for many clients, a map of the class's share in the client's samples. Attackers
    and polluted clients are marked; the server's trusted set stands at the right, in gray.

    Args:
        path: Where the picture goes; its suffix decides the format (png, svg, pdf).
        view: Who holds what.
    """
    clients, classes = view.counts.shape
    width, lower = min(13.0, max(6.5, 2.5 + 0.22 * clients)), min(7.0, max(2.4, 0.22 * classes))
    figure = Figure(figsize=(width, UPPER + lower + TOP + GAP + BOTTOM))
    FigureCanvasAgg(figure)  # no window system, and no global state as pyplot keeps
    right = 0.2 if clients <= BUBBLES else 1.1
    below = _panel(figure, BOTTOM, lower, right)
    above = _panel(figure, BOTTOM + lower + GAP, UPPER, right)
    _sizes(above, view)
    if clients <= BUBBLES:
        _bubbles(below, view, 72 * min((width - LEFT) / (clients + 3), lower / classes))
    else:
        _map(figure, below, view)
    above.set_xlim(below.get_xlim())
    above.tick_params(labelbottom=False)
    for axes in (above, below):
        _mark(axes, view)
        axes.spines[["top", "right"]].set_visible(False)
    _ticks(above, below, view)
    figure.suptitle(view.title, fontsize=10, y=1 - 0.12 / figure.get_figheight(), va="top")
    handles = _legend(view)
    if handles:
        style: dict[str, Any] = {"frameon": False, "fontsize": 8, "columnspacing": 1.2, "handlelength": 1.2}
        columns = max(1, int(width / 0.8))
        by_row = [handles[i] for first in range(columns) for i in range(first, len(handles), columns)]
        figure.legend(handles=by_row, loc="lower center", ncols=columns, **style)
    figure.savefig(path, dpi=150, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def _panel(figure: Figure, bottom: float, height: float, right: float) -> Axes:
    """Return axes at a place in inches: as many classes as there may be, the layout stays."""
    width, whole = figure.get_size_inches()
    axes: Axes = figure.add_axes((LEFT / width, bottom / whole, 1 - (LEFT + right) / width, height / whole))
    return axes


def _server(view: PartitionView) -> float:
    """Return where the trusted set stands: beside the last client, with a gap that can be seen."""
    return len(view.counts) - 1 + max(2.0, 0.03 * len(view.counts))


def _colors(classes: int) -> list[Any]:
    return [colormaps["tab20"](i / 20) for i in (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 1, 3)][:classes]


def _sizes(axes: Axes, view: PartitionView) -> None:
    clients, classes = view.counts.shape
    edges = np.arange(clients + 1) - 0.5
    stacked = classes <= STACKED
    parts = view.counts.T if stacked else view.sizes[None]
    colors = _colors(classes) if stacked else ["0.35"]
    floor = np.zeros(clients)
    for part, color in zip(parts, colors, strict=True):
        axes.stairs(floor + part, edges, baseline=floor, fill=True, color=color, linewidth=0)
        floor = floor + part
    if clients <= BUBBLES:  # a line of paper between neighbors
        axes.vlines(edges[1:-1], 0, floor.max(), color="white", linewidth=1.2)
    if view.trusted is not None:  # not to scale: it may hold many times what a client does
        axes.text(_server(view), 0, f"{int(view.trusted.sum()):,}\n", ha="center", va="bottom", color="0.4", fontsize=8)
    axes.set_ylim(0, 1.04 * floor.max())
    axes.set_ylabel("samples")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _bubbles(axes: Axes, view: PartitionView, side: float) -> None:
    """Draw one bubble for each class of each client, the largest as wide as a cell of so many points."""
    clients, classes = view.counts.shape
    held = view.counts if view.trusted is None else np.vstack([view.counts, view.trusted])
    x = [*range(clients), *([] if view.trusted is None else [_server(view)])]
    largest = max(1, int(held.max()))
    room = 0.6 * min(side, 18.0) ** 2
    for place, row in zip(x, held, strict=True):
        some = np.flatnonzero(row)
        color = SERVER if place >= clients else MARKS.get(view.roles.get(int(place), ""), "#2F6690")
        axes.scatter(np.full(len(some), place), some, s=room * row[some] / largest, color=color, linewidths=0)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.set_ylim(classes - 0.3, -0.7)
    axes.set_ylabel("class")
    axes.set_xlim(-0.8, x[-1] + 0.8)
    axes.set_xlabel(f"client (area of a bubble: samples, the largest is {largest:,})", fontsize=9)


def _map(figure: Figure, axes: Axes, view: PartitionView) -> None:
    clients, classes = view.counts.shape
    shares = 100 * view.counts / view.sizes[:, None]
    style: dict[str, Any] = {"aspect": "auto", "vmin": 0, "vmax": shares.max(), "interpolation": "nearest"}
    image = axes.imshow(shares.T, cmap="Blues", extent=(-0.5, clients - 0.5, classes - 0.5, -0.5), **style)
    if view.trusted is not None:
        wide = max(0.5, 0.008 * clients)
        share = 100 * view.trusted[:, None] / max(1, int(view.trusted.sum()))
        extent = (_server(view) - wide, _server(view) + wide, classes - 0.5, -0.5)
        axes.imshow(share, cmap="Greys", extent=extent, **style)
        axes.set_xlim(-0.5, _server(view) + 2 * wide)
    axes.set_ylim(classes - 0.5, -0.5)
    axes.set_ylabel("class")
    axes.set_xlabel("client", fontsize=9)
    place = axes.get_position()
    beside = figure.add_axes(
        (place.x1 + 0.15 / figure.get_figwidth(), place.y0, 0.15 / figure.get_figwidth(), place.height)
    )
    figure.colorbar(image, cax=beside, label="share in the client's samples, %")


def _mark(axes: Axes, view: PartitionView) -> None:
    """Put a triangle above each client that an attack has."""
    for role, color in MARKS.items():
        clients = [client for client, is_ in view.roles.items() if is_ == role]
        axes.plot(
            clients,
            [1.03] * len(clients),
            linestyle="none",
            marker="v",
            markersize=5 if len(view.counts) <= 200 else 3.5,
            color=color,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _ticks(above: Axes, below: Axes, view: PartitionView) -> None:
    clients, classes = view.counts.shape
    places: list[float] = [float(client) for client in range(clients)]
    names = [str(client) for client in range(clients)]
    if clients > NUMBERED:
        step = next(step for step in (5, 10, 20, 50, 100, 200, 500, 10**3, 10**4, 10**6) if clients / step <= 20)
        places, names = places[::step], names[::step]
    if view.trusted is not None:
        places, names = [*places, _server(view)], [*names, "trusted"]
    above.set_xticks(places)
    below.set_xticks(places, names, fontsize=8, rotation=0 if clients <= 25 or clients > NUMBERED else 90)
    step = 1 if classes <= 20 else 5 if classes <= 60 else 10
    below.set_yticks(range(0, classes, step), [str(label) for label in range(0, classes, step)], fontsize=8)


def _legend(view: PartitionView) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    classes = view.counts.shape[1]
    if classes <= STACKED:
        handles += [Patch(color=color, label=str(label)) for label, color in enumerate(_colors(classes))]
    present = [role for role in MARKS if role in view.roles.values()]
    style: dict[str, Any] = {"linestyle": "none", "marker": "v", "markersize": 5}
    return handles + [Line2D([], [], color=MARKS[role], label=role, **style) for role in present]
