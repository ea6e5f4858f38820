"""Every way in which a data file can be broken that we know of, with the exact message."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedbd.data.image_parquet import ImageParquet
from fedbd.data.npz import Npz
from fedbd.errors import DataError

FORMS = "fedbd reads .npz (arrays in the Keras layout) and .parquet (Hugging Face image sets)"
NPZ = Npz(file="a.npz")
PARQUET = ImageParquet(train="train.parquet", test="test.parquet")
GOOD = {
    "x_train": np.zeros((6, 4, 5), np.uint8),
    "y_train": np.arange(6) % 3,
    "x_test": np.zeros((3, 4, 5), np.uint8),
    "y_test": np.arange(3),
}


def npz(**changes):
    """Write the good arrays with some replaced, or left out where None."""

    def write(folder: Path) -> None:
        arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
        np.savez(folder / "a.npz", **arrays)

    return write


def rewritten(change, name="a.npz"):
    """Write the good archive, then change its bytes."""

    def write(folder: Path) -> None:
        npz()(folder)
        (folder / name).write_bytes(change((folder / "a.npz").read_bytes()))

    return write


def flip_inside_x_train(data: bytes) -> bytes:
    at = data.index(b"x_train.npy") + 200
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def picture(size=(5, 4), mode="RGB", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def table(pictures, labels, image="img", label="label", label_type=None):
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({image: pa.array(cells, kind), label: pa.array(labels, label_type or pa.int64())})


GOOD_TABLE = table([picture()] * 4, [0, 1, 0, 1])


def parquet(train=GOOD_TABLE, test=GOOD_TABLE):
    def write(folder: Path) -> None:
        pq.write_table(train, folder / "train.parquet")
        pq.write_table(test, folder / "test.parquet")

    return write


def cut_parquet(folder: Path) -> None:
    parquet()(folder)
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def damaged_page(folder: Path) -> None:
    noise = np.random.default_rng(0).bytes(4000)
    pq.write_table(table([picture()] * 3 + [noise], [0, 1, 0, 1]), folder / "train.parquet", compression="gzip")
    pq.write_table(GOOD_TABLE, folder / "test.parquet")
    path = folder / "train.parquet"
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)
    path.write_bytes(bytes(data))


def nothing(folder: Path) -> None:
    (folder / "b.npz").touch()
    (folder / "c.parquet").touch()


CASES = {
    "missing file": (
        NPZ,
        nothing,
        f"a.npz: must lie in data, got nothing of that name; that folder holds b.npz, c.parquet; {FORMS}",
    ),
    "missing file in an empty folder": (
        NPZ,
        lambda folder: None,
        f"a.npz: must lie in data, got nothing of that name; that folder holds no such file; {FORMS}",
    ),
    "missing folder": (
        NPZ,
        lambda folder: folder.rmdir(),
        "a.npz: must lie in data, got no such folder; name the folder of data files in data.root or in the environment "
        "variable FEDBD_DATA",
    ),
    "two files for one": (
        Npz(file="*.npz"),
        lambda folder: [(folder / name).touch() for name in ("a.npz", "b.npz")],
        "*.npz: must name one file, got a.npz, b.npz",
    ),
    "text": (
        NPZ,
        lambda folder: (folder / "a.npz").write_text("x,y\n1,2\n"),
        "a.npz: must be a .npz archive, got a file of another form; save the arrays with np.savez_compressed",
    ),
    "pickle": (
        NPZ,
        lambda folder: (folder / "a.npz").write_bytes(b"\x80\x04N."),
        "a.npz: must be a .npz archive, got a file of another form; save the arrays with np.savez_compressed",
    ),
    "npy for npz": (
        NPZ,
        lambda folder: np.save(folder / "a", GOOD["x_train"]) or (folder / "a.npy").rename(folder / "a.npz"),
        "a.npz: must be a .npz archive, got a single .npy array; save images and labels together with "
        "np.savez_compressed",
    ),
    "archive cut short": (
        NPZ,
        rewritten(lambda data: data[:-100]),
        "a.npz: must be a .npz archive, got a damaged one; copy the file again",
    ),
    "flipped byte": (
        NPZ,
        rewritten(flip_inside_x_train),
        "a.npz:x_train: must be readable, got Bad CRC-32 for file 'x_train.npy'; the file is damaged: copy it again",
    ),
    "missing arrays": (
        NPZ,
        npz(x_test=None, y_test=None),
        "a.npz:x_test: must be there, got no such array; the file holds x_train, y_train; name the right one in "
        "data.test_images\n"
        "a.npz:y_test: must be there, got no such array; the file holds x_train, y_train; name the right one in "
        "data.test_labels",
    ),
    "floats": (
        NPZ,
        npz(x_train=np.zeros((6, 4, 5), np.float32)),
        "a.npz:x_train: must be uint8, got float32; images in [0, 1]: save np.rint(255 * x).astype(np.uint8)",
    ),
    "wide integers": (
        NPZ,
        npz(x_test=np.zeros((3, 4, 5), np.int16)),
        "a.npz:x_test: must be uint8, got int16; save it as uint8",
    ),
    "pickled arrays": (
        NPZ,
        npz(x_train=np.array([None] * 6), y_train=np.array([None] * 6)),
        "a.npz:x_train: must be uint8, got Python objects; fedbd opens no pickles: save a plain array\n"
        "a.npz:x_train: must have shape (N, H, W) or (N, H, W, C), got (6,)\n"
        "a.npz:y_train: must be integers, got Python objects; fedbd opens no pickles: save a plain array",
    ),
    "flat images": (
        NPZ,
        npz(x_train=np.zeros((6, 20), np.uint8)),
        "a.npz:x_train: must have shape (N, H, W) or (N, H, W, C), got (6, 20)",
    ),
    "channels first": (
        NPZ,
        npz(x_train=np.zeros((6, 3, 4, 5), np.uint8)),
        "a.npz:x_train: must have shape (N, H, W) or (N, H, W, C) with 1 or 3 channels, got (6, 3, 4, 5); set "
        "data.layout to nchw if the channels stand elsewhere",
    ),
    "channels last": (
        Npz(file="a.npz", layout="nchw"),
        npz(x_train=np.zeros((6, 4, 5, 3), np.uint8)),
        "a.npz:x_train: must have shape (N, H, W) or (N, C, H, W) with 1 or 3 channels, got (6, 4, 5, 3); set "
        "data.layout to nhwc if the channels stand elsewhere",
    ),
    "empty": (
        NPZ,
        npz(x_test=np.zeros((0, 4, 5), np.uint8), y_test=np.zeros(0, int)),
        "a.npz:x_test: must not be empty, got shape (0, 4, 5)\na.npz:y_test: must not be empty, got shape (0,)",
    ),
    "label missing": (
        NPZ,
        npz(y_train=np.arange(5)),
        "a.npz:y_train: must hold one label per image, 6, got 5",
    ),
    "float labels": (
        NPZ,
        npz(y_test=np.zeros(3)),
        "a.npz:y_test: must be integers, got float64",
    ),
    "one-hot labels": (
        NPZ,
        npz(y_train=np.eye(3, dtype=int)[np.arange(6) % 3]),
        "a.npz:y_train: must have shape (N,), got (6, 3); class numbers, not one-hot rows: save y.argmax(axis=1)",
    ),
    "single label": (
        NPZ,
        npz(y_train=np.array(3)),
        "a.npz:y_train: must have shape (N,), got ()",
    ),
    "negative labels": (
        NPZ,
        npz(y_train=np.arange(6) - 1, y_test=-np.arange(3)),
        "a.npz:y_train: must be class numbers from 0, got -1",
    ),
    "negative test labels": (
        NPZ,
        npz(y_test=-np.arange(3)),
        "a.npz:y_test: must be class numbers from 0, got -2",
    ),
    "labels from 1": (
        NPZ,
        npz(y_train=np.arange(6) + 1),
        "a.npz:y_train: must hold every class from 0 to 6, got no sample of class 0; number the classes from 0 without "
        "gaps",
    ),
    "labels far apart": (
        NPZ,
        npz(y_train=np.array([0, 2, 10**15, 0, 2, 2])),
        "a.npz:y_train: must hold every class from 0 to 1000000000000000, got no sample of class 1, 3, 4, 5, 6 and "
        "999999999999993 more; number the classes from 0 without gaps",
    ),
    "one class": (
        NPZ,
        npz(y_train=np.zeros(6, int), y_test=np.zeros(3, int)),
        "a.npz:y_train: must hold at least 2 classes, got only class 0",
    ),
    "unknown test class": (
        NPZ,
        npz(y_test=np.array([0, 1, 3])),
        "a.npz:y_test: must be classes of the training set, 0 to 2, got 3",
    ),
    "two sizes, unknown test class": (
        NPZ,
        npz(x_test=np.zeros((3, 5, 5, 3), np.uint8), y_test=np.array([0, 1, 3])),
        "a.npz:y_test: must be classes of the training set, 0 to 2, got 3\n"
        "a.npz:x_test: must hold pictures like the training set's, 4x5 with 1 channel, got 5x5 with 3 channels",
    ),
    "both parquet files missing": (
        PARQUET,
        lambda folder: None,
        f"train.parquet: must lie in data, got nothing of that name; that folder holds no such file; {FORMS}\n"
        f"test.parquet: must lie in data, got nothing of that name; that folder holds no such file; {FORMS}",
    ),
    "parquet cut short": (
        PARQUET,
        cut_parquet,
        "test.parquet: must be a parquet file, got a damaged or other file; copy the file again",
    ),
    "other columns": (
        PARQUET,
        parquet(train=table([picture()], [0], image="image", label="fine_label")),
        "train.parquet:img: must be there, got no such column; the file has image, fine_label; name the right one in "
        "data.image\n"
        "train.parquet:label: must be there, got no such column; the file has image, fine_label; name the right one in "
        "data.label",
    ),
    "other types": (
        PARQUET,
        parquet(test=pa.table({"img": ["a.png"], "label": [0.5]})),
        "test.parquet:img: must be a struct with encoded pictures in a field named bytes, got string\n"
        "test.parquet:label: must be integers, got double",
    ),
    "no rows": (
        PARQUET,
        parquet(train=GOOD_TABLE.slice(0, 0)),
        "train.parquet: must not be empty, got 0 rows",
    ),
    "bad rows": (
        PARQUET,
        parquet(train=table([picture(), b"no picture", None, picture()[:48]], [0, 1, None, 1])),
        "train.parquet:img, row 1: must be a picture of 4x5 with 3 channels, got bytes that are no picture\n"
        "train.parquet:img, row 2: must be a picture of 4x5 with 3 channels, got no bytes\n"
        "train.parquet:img, row 3: must be a picture of 4x5 with 3 channels, got a damaged one\n"
        "train.parquet: must hold no such rows, got 1 more",
    ),
    "null labels": (
        PARQUET,
        parquet(test=table([picture()] * 3, [0, None, 1])),
        "test.parquet:label, row 1: must be a class number, got null",
    ),
    "no picture at all": (
        PARQUET,
        parquet(train=table([b"x", b"y"], [0, 1])),
        "train.parquet:img, row 0: must be a picture, got bytes that are no picture\n"
        "train.parquet:img, row 1: must be a picture, got bytes that are no picture",
    ),
    "pictures of several kinds": (
        PARQUET,
        parquet(
            train=table([picture(mode="L"), picture(), picture((6, 4), "L"), picture(mode="RGBA")], [0, 1, 0, 1]),
            test=table([picture(mode="L")], [0]),
        ),
        "train.parquet:img, row 1: must be a picture of 4x5 with 1 channel, got 4x5 with 3 channels\n"
        "train.parquet:img, row 2: must be a picture of 4x5 with 1 channel, got 4x6 with 1 channel\n"
        "train.parquet:img, row 3: must be a picture of 4x5 with 1 channel, got one of mode RGBA",
    ),
    "parts differ": (
        PARQUET,
        parquet(test=table([picture((5, 5), "L")], [7])),
        "test.parquet:label: must be classes of the training set, 0 to 1, got 7\n"
        "test.parquet:img: must hold pictures like the training set's, 4x5 with 3 channels, got 5x5 with 1 channel",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_is_exact(case, tmp_path, monkeypatch):
    source, write, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    folder = Path("data")
    folder.mkdir()
    write(folder)
    with pytest.raises(DataError) as caught:
        source.load(folder)
    assert str(caught.value) == expected
    assert str(tmp_path) not in str(caught.value)


def test_damage_deep_inside_an_array(tmp_path):
    npz(x_train=np.random.default_rng(0).integers(0, 256, (6, 100, 100)).astype(np.uint8))(tmp_path)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(b"x_train.npy") + 50_000] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError) as caught:
        NPZ.load(tmp_path)
    assert str(caught.value) == (
        "a.npz:x_train: must be readable, got Bad CRC-32 for file 'x_train.npy'; the file is damaged: copy it again"
    )


def test_a_damaged_page_is_told_with_its_file(tmp_path):
    damaged_page(tmp_path)  # Arrow's words for it change with its version
    with pytest.raises(DataError, match=r"^train\.parquet: must be readable, got .*; copy the file again$"):
        PARQUET.load(tmp_path)


def test_without_any_folder():
    with pytest.raises(DataError) as caught:
        NPZ.load(None)
    assert str(caught.value) == (
        "a.npz: needs a folder of data files; name it in data.root or in the environment variable FEDBD_DATA"
    )


def test_an_absolute_path_is_not_sought_elsewhere():
    with pytest.raises(DataError) as caught:
        Npz(file="/no/such/a.npz").load(None)
    assert str(caught.value) == f"/no/such/a.npz: must be a file, got nothing of that name; {FORMS}"


def test_the_good_files_load(tmp_path):
    npz()(tmp_path)
    parquet()(tmp_path)
    assert NPZ.load(tmp_path).classes == 3
    assert PARQUET.load(tmp_path).classes == 2
