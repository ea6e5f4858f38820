from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbd.attacks.wanet_trigger import WaNetTrigger
from fedbd.seeding import numpy_rng

HEIGHT, WIDTH = 12, 9


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def enlarged(control: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic interpolation of a k x k grid whose corners are the image's corners, edges repeated."""
    k, out = len(control), np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for a in range(int(y) - 1, int(y) + 3):
                for b in range(int(x) - 1, int(x) + 3):
                    out[i, j] += cubic(y - a) * cubic(x - b) * control[min(max(a, 0), k - 1), min(max(b, 0), k - 1)]
    return out


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    y, x = min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1)
    i, j = min(int(y), image.shape[0] - 2), min(int(x), image.shape[1] - 2)
    p, q = y - i, x - j
    rows = (1 - p) * image[i] + p * image[i + 1]
    return float((1 - q) * rows[j] + q * rows[j + 1])


def moved(k: int, s: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel is taken from, in pixels: rows and columns."""
    control = 2 * numpy_rng(seed, "trigger/wanet").random((1, 2, k, k))[0] - 1
    control /= np.abs(control).mean()
    dx, dy = (s * enlarged(c, HEIGHT, WIDTH) / length for c, length in zip(control, (WIDTH, HEIGHT), strict=True))
    rows = np.arange(HEIGHT)[:, None] + dy * (HEIGHT - 1) / 2
    return rows, np.arange(WIDTH)[None] + dx * (WIDTH - 1) / 2


@pytest.mark.parametrize(("k", "s", "seed"), [(4, 0.5, 0), (3, 2.0, 5)])
def test_it_is_the_papers_warp_worked_out_pixel_by_pixel(k: int, s: float, seed: int) -> None:
    image = np.random.default_rng(1).random((HEIGHT, WIDTH))
    rows, columns = moved(k, s, seed)
    expected = [[bilinear(image, rows[i, j], columns[i, j]) for j in range(WIDTH)] for i in range(HEIGHT)]
    stamped = WaNetTrigger(k=k, s=s, seed=seed).stamp(torch.from_numpy(image)[None, None])
    assert np.allclose(stamped[0, 0].numpy(), expected, atol=1e-5)


def test_one_field_for_all_images_and_channels() -> None:
    image = torch.rand(1, 1, 16, 16)
    same = WaNetTrigger().stamp(image.expand(3, 2, 16, 16).contiguous())
    assert torch.equal(same, same[:1, :1].expand_as(same))
    assert torch.equal(same[:1, :1], WaNetTrigger().stamp(image))
    assert not torch.equal(WaNetTrigger(seed=1).stamp(image), WaNetTrigger().stamp(image))


def test_disturbed_copies_move_by_half_a_pixel_more_at_most() -> None:
    """On a picture whose brightness is its column, the change is the offset along the row."""
    ramp = (torch.arange(32.0) / 31)[None, None, None].expand(64, 1, 32, 32).contiguous()
    rng = torch.Generator().manual_seed(4)
    noisy, fixed = (picture * 31 for picture in (WaNetTrigger().disturbed(ramp, rng), WaNetTrigger().stamp(ramp)))
    extra = (noisy - fixed)[..., 2:-2]
    assert float(extra.abs().max()) <= 0.5
    assert float(extra.abs().max()) > 0.45
    assert abs(float(extra.mean())) < 0.01
    assert not torch.equal(noisy[0], noisy[1])
    again = WaNetTrigger().disturbed(ramp, torch.Generator().manual_seed(4))
    assert torch.equal(again * 31, noisy)
