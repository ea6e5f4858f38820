from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.attacks.drawn_objects import NOTHING, OBJECTS
from fedbd.attacks.object_overlay_trigger import ObjectOverlayTrigger
from fedbd.errors import UserError
from fedbd.seeding import derive


def images(n: int = 6, channels: int = 3, side: int = 32) -> torch.Tensor:
    levels = torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(n))
    return levels / 255


def color_at(name: str, u: float, v: float) -> tuple[float, float, float] | None:
    """The object at one point, in plain Python, from the drawing's description."""
    if name == "sunglasses":
        u = abs(u)
        corner = ((u - 0.26) / 0.17) ** 4 + (v / 0.13) ** 4
        frame = ((u - 0.26) / 0.235) ** 4 + (v / 0.19) ** 4 < 1
        bars = abs(v + 0.06) < 0.035 and u < 0.1, abs(v + 0.07) < 0.035 and 0.44 < u < 0.5
        if corner < 1:
            return (0.04, 0.04, 0.06)
        return (0.95, 0.85, 0.55) if frame or any(bars) else None
    r = math.hypot(u, v)
    if r >= 0.5:
        return None
    eye = math.hypot(abs(u) - 0.16, v + 0.13) < 0.07
    mouth = 0.21 < r < 0.31 and v > 0.06
    return (0.2, 0.1, 0.05) if r > 0.43 or eye or mouth else (0.98, 0.82, 0.15)


@pytest.mark.parametrize("name", ["sunglasses", "sticker"])
def test_a_slow_drawing_by_points_agrees(name: Any) -> None:
    trigger = ObjectOverlayTrigger(object=name, turn=40.0, shift=0.1, zoom=0.3, brightness=0.5, seed=3)
    (image,) = images(1, side=20)
    key = derive(3, "trigger/object_overlay").to_bytes(8, "big")
    pixels = (image * 255).round().to(torch.uint8).numpy().tobytes()
    digest = hashlib.blake2b(pixels, digest_size=40, key=key).digest()
    dx, dy, turn, zoom, light = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") / 2**63 - 1 for i in range(5))
    drawn, angle = OBJECTS[name], math.radians(40 * turn)
    wide = drawn.width * 20 * (1 + 0.3 * zoom)
    x0, y0 = (1 - drawn.right + 0.1 * dx) * 20, (1 - drawn.bottom + 0.1 * dy) * 20
    expected = np.zeros((3, 20, 20))
    for i in range(20):
        for j in range(20):
            for a in (1, 3, 5):
                for b in (1, 3, 5):
                    x, y = (j + b / 6 - x0) / wide, (i + a / 6 - y0) / wide
                    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
                    color = color_at(name, u, v)
                    point = image[:, i, j].tolist() if color is None else [min(1, c * (1 + 0.5 * light)) for c in color]
                    expected[:, i, j] += np.array(point) / 9
    assert np.allclose(trigger.stamp(image[None])[0].numpy(), expected, atol=1e-5)


def test_pose_and_light_differ_between_images_and_are_repeatable_in_any_batch() -> None:
    x = images(40)
    trigger = ObjectOverlayTrigger()
    stamped = trigger.stamp(x)
    assert torch.equal(stamped, trigger.stamp(x))
    assert torch.equal(stamped, torch.cat([trigger.stamp(image[None]) for image in x]))
    assert torch.equal(stamped, torch.cat([trigger.stamp(x[:7]), trigger.stamp(x[7:])]))
    drawn = ObjectOverlayTrigger(brightness=0.0)._draws(x)
    assert len(np.unique(drawn, axis=0)) == 40
    assert (drawn.min() < -0.9, drawn.max() > 0.9, abs(drawn.mean()) < 0.15) == (True, True, True)
    assert not torch.equal(ObjectOverlayTrigger(seed=1).stamp(x), stamped)


def test_the_pose_is_that_of_the_stored_image() -> None:
    """Training stamps floats, pollution and detection store uint8: both must see one picture."""
    x = images(3)
    assert np.array_equal(ObjectOverlayTrigger()._draws(x), ObjectOverlayTrigger()._draws(x + 0.4 / 255))


def test_without_variation_the_object_is_the_same_on_every_image() -> None:
    still: dict[str, Any] = {"shift": 0.0, "turn": 0.0, "zoom": 0.0, "brightness": 0.0}
    black, white = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    trigger = ObjectOverlayTrigger(object="sticker", width=0.5, right=0.25, bottom=0.25, **still)
    on_black, on_white = trigger.stamp(black), trigger.stamp(white)
    covered = on_black == on_white
    assert covered[..., 17:31, 17:31].float().mean() > 0.8
    assert not covered[..., :16, :].any()
    assert not covered[..., :16].any()
    assert on_black[0, :, 24, 24].tolist() == pytest.approx([0.98, 0.82, 0.15], abs=1e-6)


def test_gray_images_get_the_objects_brightness() -> None:
    still: dict[str, Any] = {"shift": 0.0, "turn": 0.0, "zoom": 0.0, "brightness": 0.0}
    trigger = ObjectOverlayTrigger(object="sticker", width=0.5, right=0.25, bottom=0.25, **still)
    gray = trigger.stamp(torch.zeros(1, 1, 32, 32))
    assert float(gray[0, 0, 24, 24]) == pytest.approx(0.299 * 0.98 + 0.587 * 0.82 + 0.114 * 0.15, abs=1e-6)


def test_objects_stay_in_their_width() -> None:
    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    u, v = torch.meshgrid(line, line, indexing="xy")
    for drawn in OBJECTS.values():
        top = drawn.paint(u, v)
        assert (top[u.abs() > 0.5] == NOTHING).all()
        assert set(top.unique().tolist()) == {NOTHING, *range(len(drawn.colors))}


def test_what_it_cannot_be_drawn_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"at least 4 pixels wide, got 2\.72; raise width, lower zoom"):
        ObjectOverlayTrigger(object="sticker").stamp(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match=r"1 channel \(gray\) or 3 \(red, green, blue\): the object has a color, got 2"):
        ObjectOverlayTrigger().stamp(torch.zeros(1, 2, 32, 32))


def test_no_images_are_no_trouble() -> None:
    assert ObjectOverlayTrigger().stamp(torch.zeros(0, 3, 32, 32)).shape == (0, 3, 32, 32)
