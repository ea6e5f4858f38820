"""What a model looks at: clean and triggered images side by side, each with its Grad-CAM map over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fedbd.report.trigger_picture import show_image

ALPHA = 0.6
"""How far a map covers its image."""

COLORMAP = "RdYlBu_r"
"""Light in the middle and not dark at the ends, so that the image shows through."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Some images, what a model says of them and where it looks for it.

    Attributes:
        name: What the images are: ``clean``, ``triggered``.
        images: (N, C, H, W) float in [0, 1].
        maps: (N, H, W) float in [0, 1] (``defenses.gradcam.gradcam``).
        predicted: (N,) labels, the classes that the maps explain.
    """

    name: str
    images: Tensor
    maps: Tensor
    predicted: Sequence[int]


def draw_gradcam(path: str | Path, looks: Sequence[Looks], labels: Sequence[int]) -> None:
    """Draw a column per image, and per kind of input a row of images and a row of images with their maps.

    Args:
        path: Where the picture goes; its suffix decides the format.
        looks: Clean and triggered, or clean alone; of the same images in the same order.
        labels: (N,) true labels.
    """
    columns, rows = len(labels), 2 * len(looks)
    figure = Figure(figsize=(1.25 * columns + 0.9, 1.36 * rows + 0.75), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state as pyplot keeps
    figure.suptitle("Grad-CAM of the predicted class: blue 0, red the largest value of each map", fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, kind in enumerate(looks):
        above, below = grid[2 * number], grid[2 * number + 1]
        above[0].set_ylabel(kind.name, fontsize=9)
        below[0].set_ylabel("looks at", fontsize=9)
        for column in range(columns):
            show_image(above[column], kind.images[column])
            show_image(
                below[column], 0.4 + 0.6 * kind.images[column].mean(0, keepdim=True)
            )  # pale: colors keep their meaning
            heat = kind.maps[column].numpy()
            below[column].imshow(heat, cmap=COLORMAP, vmin=0, vmax=1, alpha=ALPHA, interpolation="nearest")
            right = kind.predicted[column] == labels[column]
            title = f"says {kind.predicted[column]}" if number else f"{labels[column]}, says {kind.predicted[column]}"
            above[column].set_title(title, fontsize=8, color="black" if right else "#D55E00")
    figure.savefig(path, dpi=150, metadata={"Software": None} if Path(path).suffix == ".png" else None)
