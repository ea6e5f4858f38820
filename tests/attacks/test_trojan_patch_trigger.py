from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedbd.attacks.trojan_patch_trigger import TrojanPatchTrigger
from fedbd.errors import UserError


def test_the_random_patch_is_added_at_rows_and_columns_25_to_27_of_a_cifar_image() -> None:
    black = torch.zeros(2, 3, 32, 32)
    patch = TrojanPatchTrigger().stamp(black)
    assert {(row, column) for *_, row, column in patch.nonzero().tolist()} == {
        (row, column) for row in (25, 26, 27) for column in (25, 26, 27)
    }
    assert torch.equal(patch[0], patch[1])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(TrojanPatchTrigger().stamp(images), (images + patch).clamp(max=1))


def test_it_saturates_where_the_codes_wrap_around() -> None:
    white = torch.ones(1, 1, 8, 8)
    assert torch.equal(TrojanPatchTrigger(margin=0).stamp(white), white)


def test_seed_strength_size_and_margin() -> None:
    black = torch.zeros(1, 1, 12, 12)
    whole = TrojanPatchTrigger(size=5, margin=2).stamp(black)
    assert {(row, column) for *_, row, column in whole.nonzero().tolist()} == {
        (row, column) for row in range(5, 10) for column in range(5, 10)
    }
    assert torch.allclose(TrojanPatchTrigger(size=5, margin=2, strength=0.5).stamp(black), whole / 2)
    assert not torch.equal(TrojanPatchTrigger(size=5, margin=2, seed=1).stamp(black), whole)


def test_a_patch_of_gray_levels_from_an_archive_as_large_as_the_image(tmp_path: Path) -> None:
    levels = np.zeros((3, 8, 8), np.float64)
    levels[0, 5, 6], levels[2, 7, 7] = 127.5, -51
    np.savez(tmp_path / "t.npz", x=levels, other=np.zeros(3))
    stamped = TrojanPatchTrigger(file=str(tmp_path / "t.npz")).stamp(torch.full((1, 3, 8, 8), 0.6))
    expected = torch.full((1, 3, 8, 8), 0.6)
    expected[0, 0, 5, 6], expected[0, 2, 7, 7] = 1.0, 0.4
    assert torch.allclose(stamped, expected, atol=1e-6)


def test_a_small_patch_of_units_from_an_array_goes_into_every_channel(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[0.5, 0.25]], np.float32))
    stamped = TrojanPatchTrigger(file=str(tmp_path / "t.npy"), levels=1, margin=1).stamp(torch.zeros(1, 2, 4, 4))
    expected = torch.zeros(1, 2, 4, 4)
    expected[:, :, 2, 1:3] = torch.tensor([0.5, 0.25])
    assert torch.equal(stamped, expected)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('opened')",))


def test_files_that_cannot_be_a_patch_are_refused(tmp_path: Path) -> None:
    def said(name: str, **fields: Any) -> str:
        with pytest.raises(UserError) as refused:
            TrojanPatchTrigger(file=str(tmp_path / name), **fields).stamp(torch.zeros(1, 3, 8, 8))
        return str(refused.value)

    np.save(tmp_path / "pickled.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    assert "must be a readable .npy or .npz file" in said("pickled.npy")
    np.savez(tmp_path / "pickled.npz", x=np.array([Payload()], dtype=object))
    assert "pickled objects are not opened" in said("pickled.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "pickled.npz").read_bytes()[:40])
    assert "must be a readable .npy or .npz file" in said("cut.npz")
    np.savez(tmp_path / "a.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    assert "must hold an array 'x', got arrays a, b; name the right one in array" in said("a.npz")
    assert "must be a file" in said("gone.npy")
    np.save(tmp_path / "flat.npy", np.ones(3))
    assert "must hold (H, W) or (C, H, W) numbers, got shape (3,) of float64 in flat.npy" in said("flat.npy")
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    assert "must hold (H, W) or (C, H, W) numbers" in said("words.npy")
    np.save(tmp_path / "two.npy", np.full((2, 4, 4), 255.0))
    assert "must hold a patch of 1 channel or of the images' 3, got 2 channels" in said("two.npy")
    np.save(tmp_path / "large.npy", np.full((3, 9, 8), 255.0))
    assert "needs images of at least 9x8 pixels (9x8 patch, margin 0), got 8x8" in said("large.npy")
    assert "must add at most 1 after the division by levels, got 255; set levels to 255" in said("large.npy", levels=1)
    np.save(tmp_path / "units.npy", np.ones((3, 3)) / 4)
    assert "must add at least half a gray level, got 0.000980392 after the division by levels; set levels to 1" in said(
        "units.npy"
    )
    np.save(tmp_path / "nan.npy", np.full((3, 3), np.nan))
    assert "must add at most 1 after the division by levels, got nan" in said("nan.npy")


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 7x7 pixels \(3x3 patch, margin 4\), got 6x9; lower the margin"):
        TrojanPatchTrigger().stamp(torch.zeros(1, 1, 6, 9))
