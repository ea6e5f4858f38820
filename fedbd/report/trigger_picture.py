"""Every trigger as it looks: the image, the stamped image, and what the stamp changed, made strong enough to see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fedbd.types import Samples, Trigger

STRONGEST = 16
"""A change is shown up to so many times as strong."""

WIDEST = 3
"""Triggers side by side, at most."""


def draw_triggers(
    path: str | Path,
    samples: Samples,
    triggers: Mapping[str, Trigger],
    *,
    images: int = 4,
    names: Mapping[int, str] | None = None,
    dpi: float = 150,
) -> None:
    """Draw what each trigger does to a few images.

    The caption of a trigger tells the share of pixels that it changes and its largest change in gray levels, over the
    images shown. A change is shown around mid-gray: brighter where the stamp made the image brighter.

    Args:
        path: Where the picture goes; its suffix decides the format.
        samples: Images to choose from: the first of each label, then more in their order.
        triggers: By the name to print; at least one.
        images: How many images, at most.
        names: Class names to print in place of labels.
        dpi: Pixels per inch; an image is about an inch wide.
    """
    chosen = samples.subset(_first_of_each_label(samples.labels, images))
    clean = chosen.batch(torch.arange(len(chosen)))[0].cpu()
    columns = len(chosen)
    across = min(WIDEST, math.ceil(math.sqrt(len(triggers)))) if len(triggers) > 2 else 1
    down = math.ceil(len(triggers) / across)
    figure = Figure(figsize=((1.25 * columns + 1.1) * across, 4.3 * down), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state as pyplot keeps
    blocks = figure.subfigures(down, across, squeeze=False).flat
    for block, (name, trigger) in zip(blocks, triggers.items(), strict=False):  # the last row may be short
        stamped = trigger.stamp(clean)
        change = stamped - clean
        gain = gain_of(change)
        block.suptitle(f"{name}\n{caption(change.abs())}", fontsize=9)
        grid = block.subplots(3, columns, squeeze=False)
        titles = ("image", "stamped", f"change x {gain}")
        for row, title, pictures in zip(grid, titles, (clean, stamped, 0.5 + gain * change / 2), strict=True):
            row[0].set_ylabel(title, fontsize=8)
            for axes, picture in zip(row, pictures, strict=True):
                show_image(axes, picture)
        for axes, label in zip(grid[0], chosen.labels.tolist(), strict=True):
            axes.set_title((names or {}).get(label, str(label)), fontsize=8)
    figure.savefig(path, dpi=dpi, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def _first_of_each_label(labels: Tensor, count: int) -> Tensor:
    """Return up to ``count`` indices: the first of each label in order of appearance, then the rest in order."""
    seen: set[int] = set()
    firsts: list[int] = []
    others: list[int] = []
    for index, label in enumerate(labels.tolist()):
        (others if label in seen else firsts).append(index)
        seen.add(label)
        if len(firsts) == count:
            break
    return torch.tensor([*firsts, *others][:count], dtype=torch.int64)


def gain_of(change: Tensor) -> int:
    """Return how many times as strong a change in [-1, 1] can be shown: a power of two, at most ``STRONGEST``."""
    largest = float(change.abs().max())
    return max(gain for gain in (1, 2, 4, 8, STRONGEST) if gain == 1 or gain * largest <= 1)


def caption(change: Tensor) -> str:
    """Return in words how much a stamp changes: (N, C, H, W) absolute changes of images in [0, 1].

    A pixel counts as changed if one of its channels moves by at least half a gray level of 255.
    """
    share = float((change.amax(dim=1) >= 0.5 / 255).to(torch.float32).mean())
    return f"{100 * share:.1f} % of pixels changed, by at most {255 * float(change.max()):.0f} of 255"


def show_image(axes: Axes, picture: Tensor) -> None:
    """Show a (C, H, W) image in [0, 1] without any smoothing: a trigger may be one pixel."""
    pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    gray = pixels.shape[2] != 3
    axes.imshow(
        pixels.mean(axis=2) if gray else pixels, cmap="gray" if gray else None, vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])
