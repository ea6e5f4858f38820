"""What the three sources read, against other ways of reading the same."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from fedbd.data.digits import Digits
from fedbd.data.image_parquet import CHUNK, ImageParquet
from fedbd.data.npz import Npz
from fedbd.errors import DataError
from fedbd.types import Dataset, DataSource


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, pictures, labels):
    cells = pa.array([{"bytes": data, "path": None} for data in pictures], pa.struct({"bytes": pa.binary()}))
    pq.write_table(pa.table({"img": cells, "label": pa.array(labels)}), path)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def check_form(data: Dataset) -> None:
    for part in (data.train, data.test):
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.images.is_contiguous()
        assert part.images.shape == (len(part), *data.shape)


@pytest.mark.parametrize("source", [Digits(), Npz(file="a"), ImageParquet(train="a", test="b")])
def test_the_sources_obey_the_protocol(source):
    assert isinstance(source, DataSource)


def test_digits_are_scikit_learns():
    data = Digits().load(None)
    check_form(data)
    assert (data.shape, data.classes, len(data.test)) == ((1, 8, 8), 10, 449)
    raw, labels = load_digits(return_X_y=True)
    theirs = sorted(zip(labels, (raw * 255 / 16 + 0.5).astype(int).tolist(), strict=True))
    images = torch.cat([data.train.images, data.test.images]).flatten(1).tolist()
    ours = sorted(zip(torch.cat([data.train.labels, data.test.labels]).tolist(), images, strict=True))
    assert ours == theirs


def test_digits_split_keeps_the_classes_shares():
    data = Digits(test_share=0.4).load(None)
    counts = np.bincount(np.concatenate([data.train.labels, data.test.labels]))
    assert np.abs(np.bincount(data.test.labels) - counts * round(0.4 * 1797) / 1797).max() < 1


def test_larger_digits_repeat_pixels():
    small, large = Digits().load(None), Digits(pixels=16).load(None)
    assert large.shape == (1, 16, 16)
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert torch.equal(large.train.images[:, :, row::2, column::2], small.train.images)


@pytest.mark.parametrize(("layout", "order"), [("nhwc", (0, 2, 3, 1)), ("nchw", (0, 1, 2, 3))])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_layouts(layout, order, channels, tmp_path):
    train, test = noise(6, channels, 4, 5), noise(2, channels, 4, 5)
    np.savez_compressed(
        tmp_path / "a.npz",
        x_train=np.asfortranarray(train.transpose(order)),
        y_train=np.array([[0], [1], [2]] * 2, dtype=np.int8),
        x_test=test.transpose(order),
        y_test=np.array([2, 0], dtype=np.uint64),
        track_train=np.arange(6),
    )
    data = Npz(file="a.npz", layout=layout).load(tmp_path)
    check_form(data)
    assert np.array_equal(data.train.images, train)
    assert np.array_equal(data.test.images, test)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (data.test.labels.tolist(), data.classes) == ([2, 0], 3)


def test_npz_gray_images_and_other_names(tmp_path):
    images = noise(4, 6, 7)
    np.savez(tmp_path / "a.npz", a=images, b=[0, 1, 0, 1], c=images[:1], d=[1])
    names = {"train_images": "a", "train_labels": "b", "test_images": "c", "test_labels": "d"}
    data = Npz(file="a.npz", **names).load(tmp_path)
    check_form(data)
    assert np.array_equal(data.train.images[:, 0], images)


def test_the_folder_of_the_scenario_comes_before_the_environments(tmp_path, monkeypatch):
    for folder, label in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        y = np.arange(label + 1)
        np.savez(tmp_path / folder / "x.npz", x_train=noise(len(y), 4, 4), y_train=y, x_test=noise(1, 4, 4), y_test=[0])
    monkeypatch.setenv("FEDBD_DATA", str(tmp_path / "b"))
    source = Npz(file="x.npz")
    assert source.load(tmp_path / "a").classes == 2
    assert source.load(None).classes == 3
    assert Npz(file=str(tmp_path / "a/x.npz")).load(tmp_path / "b").classes == 2


def test_parquet_reads_the_pixels_in_order(tmp_path):
    count = 2 * CHUNK + 3
    images, labels = noise(count, 4, 5, 3), np.arange(count) % 7
    pictures = [encoded(image) for image in images]
    write_parquet(tmp_path / "train-0.parquet", pictures[:100], labels[:100])
    write_parquet(tmp_path / "train-1.parquet", pictures[100:], labels[100:])
    write_parquet(tmp_path / "test.parquet", pictures[:2], labels[:2])
    data = ImageParquet(train="train-*.parquet", test="test.parquet").load(tmp_path)
    check_form(data)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1), images)
    assert np.array_equal(data.train.labels, labels)
    assert data.classes == 7


def test_parquet_decodes_jpeg_as_pillow_does(tmp_path):
    pictures = [encoded(image, "JPEG") for image in noise(3, 16, 16, 3)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures, [0, 1, 1])
    data = ImageParquet(train="train.parquet", test="test.parquet").load(tmp_path)
    theirs = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1), theirs)


def test_parquet_gray_pictures(tmp_path):
    gray, color = noise(2, 4, 5), noise(2, 4, 5, 3)
    write_parquet(tmp_path / "gray.parquet", map(encoded, gray), [0, 1])
    write_parquet(tmp_path / "mixed.parquet", [encoded(color[0]), encoded(gray[1])], [0, 1])
    data = ImageParquet(train="gray.parquet", test="gray.parquet").load(tmp_path)
    check_form(data)
    assert np.array_equal(data.train.images[:, 0], gray)
    data = ImageParquet(train="mixed.parquet", test="mixed.parquet").load(tmp_path)
    check_form(data)
    assert np.array_equal(data.train.images[1], np.stack([gray[1]] * 3))


def test_mapped_images_give_no_warning_and_a_write_stays_here(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Digits().load(None)
        data.train.images[0] = 7
    assert (data.train.images[0] == 7).all()
    assert not (Digits().load(None).train.images[0] == 7).all()


@pytest.fixture(scope="module")
def archive():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_train=noise(4, 4, 4), y_train=[0, 1, 0, 1], x_test=noise(1, 4, 4), y_test=[1])
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    spots=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), cut=st.floats(0, 1)
)
def test_damage_is_refused_or_harmless(archive, tmp_path_factory, spots, cut):
    damaged = bytearray(archive)
    for place, value in spots:
        damaged[int(place * len(archive))] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(damaged[: round(cut * len(archive))] if cut < 0.5 else damaged)
    try:
        data = Npz(file="fuzzed.npz").load(path.parent)
    except DataError:
        return
    assert np.array_equal(data.train.images[:, 0], noise(4, 4, 4))
