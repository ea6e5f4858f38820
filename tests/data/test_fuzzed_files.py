"""Files that nobody would write: whatever lies in the data folder, a source loads it or says what is wrong with it."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedbd.data.cifar import Cifar10
from fedbd.data.gtsrb import Gtsrb
from fedbd.data.idx_sets import Mnist
from fedbd.data.image_folder import ImageFolder
from fedbd.data.image_parquet import ImageParquet
from fedbd.data.npz import Npz
from fedbd.errors import DataError
from fedbd.types import Dataset

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5)
CUT = st.one_of(st.just(1.0), st.floats(0, 1))
"""Bytes to overwrite, by their place in the file; the share of the file that is left."""


def damaged(content: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    changed = bytearray(content)
    for place, value in changes:
        if changed:
            changed[int(place * len(changed))] = value
    return bytes(changed[: round(cut * len(changed))])


def survives(source, root: Path) -> None:
    """Load: either a data set that keeps the contract, or an error with at least one problem in words."""
    try:
        data = source.load(root)
    except DataError as error:
        assert error.problems
        assert all(problem.path and problem.expected for problem in error.problems)
        return
    assert isinstance(data, Dataset)
    for part in (data.train, data.test):
        assert len(part.images) == len(part.labels) > 0
        assert 0 <= int(part.labels.min()) <= int(part.labels.max()) < data.classes
    assert data.groups is None or len(data.groups) == len(data.train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
KINDS = st.sampled_from(["u1", "i1", "i8", "u8", "f4", "?", "U3", "S2", "O", "M8[s]", "c8", "V3"])
ARRAYS = st.one_of(
    st.tuples(SHAPES, KINDS).map(lambda made: np.zeros(made[0], made[1])),
    st.sampled_from([np.zeros((4, 4, 4), np.uint8), np.arange(4) % 2, np.arange(4)]),
)
NAMES = ("x_train", "y_train", "x_test", "y_test", "who")


@QUICK
@given(st.dictionaries(st.sampled_from(NAMES), ARRAYS, min_size=2), CHANGES, CUT, st.booleans())
def test_npz(folder, arrays, changes, cut, packed):
    whole = {"x_train": np.zeros((4, 4, 4), np.uint8), "y_train": np.arange(4) % 2, "who": np.arange(4)}
    whole |= {"x_test": np.zeros((2, 4, 4), np.uint8), "y_test": np.arange(2)}
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **(whole | arrays))
    (folder / "a.npz").write_bytes(damaged(buffer.getvalue(), changes, cut))
    survives(Npz(file="a.npz", groups="who", groups_per_class=packed), folder)


def test_an_array_that_claims_to_be_huge(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros((4, 4, 4), np.uint8))
    claim = content.getvalue().replace(b"(4, 4, 4), }            ", b"(4000000, 400, 400), }  ")
    assert len(claim) == len(content.getvalue())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in NAMES[:4]:
            archive.writestr(f"{name}.npy", claim)
    with pytest.raises(DataError, match=r"a\.npz:x_train: must be readable, got fewer bytes than its shape takes"):
        Npz(file="a.npz").load(tmp_path)


def png(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


PICTURES = st.one_of(
    st.binary(max_size=60),
    st.none(),
    st.builds(
        damaged,
        st.sampled_from(
            [
                png("RGB", (4, 4)),
                png("L", (4, 4)),
                png("RGB", (4, 4), "JPEG"),
                png("RGB", (4, 4), "PPM"),
                png("P", (4, 4), "GIF"),
            ]
            + [png("RGB", (4, 4), kind) for kind in ("BMP", "TIFF", "WEBP")]
        ),
        CHANGES,
        CUT,
    ),
)
GOOD = st.just(png("RGB", (4, 4)))
LABELS = st.one_of(st.integers(-1, 3), st.none(), st.integers(-(2**63), 2**63 - 1))


@QUICK
@given(
    st.lists(st.tuples(st.one_of(GOOD, PICTURES), LABELS, st.one_of(st.none(), st.text(max_size=3))), max_size=6),
    CHANGES,
    CUT,
    st.sampled_from(["NONE", "snappy", "gzip"]),
)
def test_parquet(folder, rows, changes, cut, compression):
    cells = [None if data is None else {"bytes": data, "path": "p"} for data, _, _ in rows]
    columns = {
        "img": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([label for _, label, _ in rows], pa.int64()),
        "who": pa.array([who for _, _, who in rows], pa.string()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression=compression)
    (folder / "a.parquet").write_bytes(damaged(buffer.getvalue(), changes, cut))
    survives(ImageParquet(train="a.parquet", test="a.parquet", groups="who"), folder)


def test_groups_that_are_no_utf8_are_refused(tmp_path):
    who = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xc2\x00")]
    )
    image = pa.array(
        [{"bytes": png("RGB", (4, 4)), "path": "p"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"img": image, "label": pa.array([0], pa.int64()), "who": who}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must be readable, got 'utf-8' codec"):
        ImageParquet(train="a.parquet", test="a.parquet", groups="who").load(tmp_path)


@QUICK
@given(
    st.dictionaries(
        st.sampled_from(
            ["train/a/1.png", "train/a/2.jpg", "train/b/1.gif", "test/a/1.png", "test/b/deep/1.tif", "test/c/1.png"]
        ),
        st.one_of(GOOD, PICTURES),
        min_size=1,
    ),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([None, 1, 3]),
)
def test_image_folder(folder, files, size, channels):
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    for name, content in files.items():
        place = folder / "pictures" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content or b"")
    survives(ImageFolder(size=size, channels=channels), folder / "pictures")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@QUICK
@given(st.sampled_from(["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]), CHANGES, CUT, st.binary(max_size=20))
def test_idx(folder, name, changes, cut, head):
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((4, 5, 5))))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(4) % 2))
    content = damaged((raw / name).read_bytes(), changes, cut)
    (raw / name).write_bytes(head + content[len(head) :])
    survives(Mnist(), folder)


BATCH = pickle.dumps({b"labels": [0, 1], b"data": np.zeros((2, 3072), np.uint8), b"x": [{}, (1, None)]}, 3)
OPCODES = [
    b"}",
    b"]",
    b"(",
    b"K\x01",
    b"U\x01a",
    b"q\x00",
    b"h\x00",
    b"e",
    b"a",
    b"u",
    b"s",
    b"\x86",
    b"t",
    b"R",
    b"b",
    b"N",
]
OPCODES += [
    b"cnumpy\nndarray\n",
    b"cos\nsystem\n",
    b"0",
    b"2",
    b"\x81",
    b"i",
    b"Q",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
]


@QUICK
@given(
    st.one_of(
        st.builds(damaged, st.just(BATCH), CHANGES, CUT),
        st.lists(st.sampled_from(OPCODES), max_size=12).map(lambda parts: b"\x80\x02" + b"".join(parts) + b"."),
        st.binary(max_size=40),
    )
)
def test_cifar(folder, content):
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(exist_ok=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (batches / name).write_bytes(BATCH)
    (batches / "data_batch_4").write_bytes(content)
    survives(Cifar10(), folder)


@QUICK
@given(
    st.binary(max_size=80), st.one_of(GOOD, PICTURES), st.sampled_from(["00000_00000.ppm", "x.ppm", "00001_00001.ppm"])
)
def test_gtsrb(folder, truth, picture, name):
    shutil.rmtree(folder / "gtsrb", ignore_errors=True)
    for label in range(2):
        place = folder / f"gtsrb/GTSRB/Training/{label:05}"
        place.mkdir(parents=True)
        (place / "00000_00000.ppm").write_bytes(png("RGB", (9, 9), "PPM"))
    (place / name).write_bytes(picture or b"")
    tests = folder / "gtsrb/GTSRB/Final_Test/Images"
    tests.mkdir(parents=True)
    (tests / "00000.ppm").write_bytes(png("RGB", (9, 9), "PPM"))
    (folder / "gtsrb/GT-final_test.csv").write_bytes(b"Filename;ClassId\n00000.ppm;1\n" + truth)
    survives(Gtsrb(), folder)
