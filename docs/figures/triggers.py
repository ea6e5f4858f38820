"""Draw docs/triggers.png: every registered trigger with its defaults on CIFAR-10 images.

Reads cifar10-train.parquet and cifar10-test.parquet in the folder that FEDBD_DATA names.
"""

from __future__ import annotations

from pathlib import Path

from fedbd.attacks.object_overlay_trigger import ObjectOverlayTrigger
from fedbd.data.image_parquet import ImageParquet
from fedbd.registry import METHODS, resolve
from fedbd.report.trigger_picture import draw_triggers
from fedbd.types import Samples, Trigger

OUT = Path(__file__).resolve().parents[1] / "triggers.png"
NAMES = dict(enumerate(("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")))


def triggers() -> dict[str, Trigger]:
    """Return every registered trigger by its name, the object overlay with both of its objects."""
    found: dict[str, Trigger] = {name: resolve("trigger", name, "trigger")() for name in METHODS["trigger"]}
    return found | {"object_overlay, object: sticker": ObjectOverlayTrigger(object="sticker")}


def main(samples: Samples) -> None:
    """Draw the picture on a few samples."""
    draw_triggers(OUT, samples, triggers(), images=3, names=NAMES, dpi=90)
    print(OUT)


if __name__ == "__main__":
    main(ImageParquet(train="cifar10-train.parquet", test="cifar10-test.parquet").load(None).test)
