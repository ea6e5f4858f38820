"""Folders of pictures, against torchvision's ImageFolder; and what is said of broken ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fedbd.data.image_folder import ImageFolder
from fedbd.errors import DataError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(root: Path, parts=("train", "test"), shape=(6, 5, 3), kinds=("png", "PPM")) -> None:
    for part in parts:
        for number, label in enumerate(["cat", "ant", "bee"]):
            folder = root / part / label / "more"
            folder.mkdir(parents=True)
            for i, kind in enumerate(kinds):
                picture = Image.fromarray(noise(*shape, seed=10 * number + i))
                picture.save((folder if i else folder.parent) / f"{i}.{kind}")


def test_it_reads_what_torchvision_reads(tmp_path):
    write(tmp_path)
    (tmp_path / "train/ant/notes.txt").write_text("no picture")
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/ant/.thumb.png").write_bytes(b"x")
    data = ImageFolder().load(tmp_path)
    (tmp_path / "train/ant/.thumb.png").unlink()
    (tmp_path / "train/.hidden").rmdir()
    for part, name in ((data.train, "train"), (data.test, "test")):
        known = datasets.ImageFolder(tmp_path / name)
        assert part.labels.tolist() == [label for _, label in known]
        assert np.array_equal(part.images.permute(0, 2, 3, 1), np.stack([np.asarray(image) for image, _ in known]))
    assert (data.classes, data.shape) == (3, (3, 6, 5))


def test_pictures_are_brought_to_one_size_and_color(tmp_path):
    write(tmp_path)
    odd = noise(9, 7, seed=3)
    Image.fromarray(odd).save(tmp_path / "train/ant/a.png")
    data = ImageFolder(size=4, channels=3).load(tmp_path)
    theirs = np.asarray(Image.fromarray(odd).convert("RGB").resize((4, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(data.train.images[1].permute(1, 2, 0), theirs)
    gray = ImageFolder(size=4, channels=1).load(tmp_path)
    assert gray.shape == (1, 4, 4)


def test_a_changed_picture_is_read_anew(tmp_path):
    write(tmp_path)
    before = ImageFolder().load(tmp_path).train.images.clone()
    assert torch.equal(ImageFolder().load(tmp_path).train.images, before)
    picture = tmp_path / "train/bee/0.png"
    Image.fromarray(noise(6, 5, 3, seed=99)).save(picture)
    os.utime(picture, (5, 5))
    assert not torch.equal(ImageFolder().load(tmp_path).train.images, before)


def test_folders_anywhere(tmp_path):
    write(tmp_path, parts=("a/left", "b"))
    source = ImageFolder(train=str(tmp_path / "a/left"), test=str(tmp_path / "b"))
    assert source.load(None).classes == 3
    assert torch.equal(ImageFolder(train="a/left", test="b").load(tmp_path).test.images, source.load(None).test.images)


def put(name, content):
    def change(folder: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            Image.fromarray(content).save(place)

    return change


def empty_folder(folder: Path) -> None:
    (folder / "train/dog").mkdir()
    (folder / "test/.png").mkdir()


def without(part):
    def change(folder: Path) -> None:
        (folder / part).rename(folder / "elsewhere")

    return change


def cut(folder: Path) -> None:
    place = folder / "test/cat/0.png"
    place.write_bytes(place.read_bytes()[:60])


def four_bad(folder: Path) -> None:
    for name in "wxyz":
        (folder / f"train/cat/{name}.png").write_bytes(b"no picture")


def transparent(folder: Path) -> None:
    Image.new("RGBA", (5, 6)).save(folder / "train/cat/a.png")


SIZED = "must be a picture of 6x5 with 3 channels"
CASES = {
    "no training part": (
        without("train"),
        "train: must be a folder in data, got nothing of that name; pictures lie in train/CLASS/; name the folder of "
        "data files in data.root or in FEDBD_DATA",
    ),
    "no part at all": (
        lambda folder: [without("train")(folder), (folder / "test").rename(folder / "other")],
        "train: must be a folder in data, got nothing of that name; pictures lie in train/CLASS/; name the folder of "
        "data files in data.root or in FEDBD_DATA\n"
        "test: must be a folder in data, got nothing of that name; pictures lie in test/CLASS/; name the folder of "
        "data files in data.root or in FEDBD_DATA",
    ),
    "an empty class": (
        empty_folder,
        "train: must hold pictures in every class, got none in dog; pictures end in .bmp, .gif, .jpeg, .jpg, .pgm, "
        ".png, .ppm, .tif, .tiff, .webp",
    ),
    "a class of the test part only": (
        put("test/dog/0.png", noise(6, 5, 3)),
        "test: must hold classes of train only, got dog",
    ),
    "a damaged picture": (cut, f"test/cat/0.png: {SIZED}, got a damaged one"),
    "text": (put("train/bee/a.jpg", b"hello"), f"train/bee/a.jpg: {SIZED}, got bytes that are no picture"),
    "nothing": (put("train/bee/a.jpg", b""), f"train/bee/a.jpg: {SIZED}, got no bytes"),
    "another size": (
        put("train/bee/a.png", noise(6, 7, 3)),
        f"train/bee/a.png: {SIZED}, got 6x7 with 3 channels; set data.size to bring all pictures to one size",
    ),
    "transparency": (transparent, f"train/cat/a.png: {SIZED}, got one of mode RGBA"),
    "many bad pictures": (
        four_bad,
        "".join(f"train/cat/{name}.png: {SIZED}, got bytes that are no picture\n" for name in "wxy")
        + "train: must hold no such pictures, got 1 more",
    ),
    "parts of two kinds": (
        lambda folder: (
            [path.unlink() for path in (folder / "test").rglob("*.*")]
            + [put(f"test/{label}/0.png", noise(6, 5))(folder) for label in ("ant", "bee", "cat")]
        ),
        "test: must hold pictures like the training set's, 6x5 with 3 channels, got 6x5 with 1 channel",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_is_exact(case, tmp_path, monkeypatch):
    change, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    write(Path("data"))
    change(Path("data"))
    with pytest.raises(DataError) as caught:
        ImageFolder().load(Path("data"))
    assert str(caught.value) == message


def test_a_file_for_a_folder_and_no_folder_at_all(tmp_path):
    (tmp_path / "train").write_text("")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"train: must be a folder in .*\n.*test: must hold a folder for each class"):
        ImageFolder().load(tmp_path)
    with pytest.raises(DataError, match="train: needs a folder of data files"):
        ImageFolder().load(None)


def test_one_class_is_none(tmp_path):
    for part in ("train", "test"):
        put(f"{part}/cat/0.png", noise(4, 4))(tmp_path)
    with pytest.raises(DataError, match="train: must hold at least 2 classes, got only class 0"):
        ImageFolder().load(tmp_path)


def test_a_picture_that_cannot_be_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "train/ant/x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError) as caught:
        ImageFolder().load(tmp_path)
    assert str(caught.value) == (
        "train/ant/x.png: must be a picture of 6x5 with 3 channels, got No such file or directory"
    )
