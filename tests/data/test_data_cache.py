from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fedbd.data import cache
from fedbd.data.cache import cached
from fedbd.errors import DataError

ARRAYS = {"a": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "b": np.arange(3)}


@pytest.fixture
def decode():
    """A decoder that counts its calls."""

    def call():
        call.calls += 1
        return {name: array.copy() for name, array in ARRAYS.items()}

    call.calls = 0
    return call


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(b"contents")
    return path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def same(arrays) -> bool:
    return arrays.keys() == ARRAYS.keys() and all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)


def test_decoded_once_then_mapped(decode, source):
    for _ in range(3):
        arrays = cached("reader", {"x": 1}, [source], decode)
        assert same(arrays)
        assert all(isinstance(array, np.memmap) and array.flags.writeable for array in arrays.values())
    assert decode.calls == 1


def test_the_key_is_the_contents_the_reader_and_its_fields(decode, source, tmp_path):
    cached("reader", {"x": 1}, [source], decode)
    source.rename(tmp_path / "moved.bin")
    moved = tmp_path / "moved.bin"
    os.utime(moved, (0, 0))
    cached("reader", {"x": 1}, [moved], decode)
    assert decode.calls == 1  # neither name nor time count
    cached("reader", {"x": 2}, [moved], decode)
    cached("other", {"x": 1}, [moved], decode)
    cached("reader", {"x": 1}, [moved, moved], decode)
    moved.write_bytes(b"CONTENTS")
    cached("reader", {"x": 1}, [moved], decode)
    assert decode.calls == 5


DAMAGES = {
    "flipped": lambda place: (place / "a.npy").write_bytes((place / "a.npy").read_bytes()[:-1] + b"!"),
    "cut": lambda place: (place / "a.npy").write_bytes((place / "a.npy").read_bytes()[:-5]),
    "gone": lambda place: (place / "b.npy").unlink(),
    "no list": lambda place: (place / "entry.json").unlink(),
    "no json": lambda place: (place / "entry.json").write_text("{"),
    "other json": lambda place: (place / "entry.json").write_text("[]"),
    "list of nothing": lambda place: (place / "entry.json").write_text(json.dumps({"sha256": None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(damage, decode, source, caplog):
    cached("reader", {}, [source], decode)
    (place,) = entries(cache.folder())
    DAMAGES[damage](place)
    with caplog.at_level(logging.WARNING):
        assert same(cached("reader", {}, [source], decode))
    assert decode.calls == 2
    assert "it is built again" in caplog.text
    caplog.clear()
    assert same(cached("reader", {}, [source], decode))
    assert (decode.calls, caplog.text) == (2, "")
    assert entries(cache.folder()) == [place]  # nothing is left over


def test_whoever_mapped_a_replaced_entry_keeps_it(decode, source):
    before = cached("reader", {}, [source], decode)
    (place,) = entries(cache.folder())
    (place / "entry.json").unlink()
    cached("reader", {}, [source], decode)
    assert same(before)


def test_without_a_folder_to_write_in(decode, source, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.delenv("FEDBD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for calls in (1, 2):
        assert same(cached("reader", {}, [source], decode))
        assert decode.calls == calls
    assert "every process decodes the data set for itself" in caplog.text


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_that_is_no_folder_is_the_users_mistake(below, decode, source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDBD_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(
        DataError, match=r"^FEDBD_CACHE: must be a folder, got .*file.*; name a folder for decoded data"
    ):
        cached("reader", {}, [source], decode)
    assert decode.calls == 0


def test_a_source_that_cannot_be_read(decode, tmp_path):
    with pytest.raises(DataError) as caught:
        cached("reader", {}, [tmp_path / "gone.npz", tmp_path], decode)
    assert str(caught.value) == (
        f"gone.npz: must be readable: No such file or directory\n{tmp_path.name}: must be readable: Is a directory"
    )


def test_a_failing_decoder_leaves_nothing(source):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached("reader", {}, [source], fail)
    assert not cache.folder().exists()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FEDBD_CACHE", "~/own")
    assert cache.folder() == tmp_path / "own"
    monkeypatch.delenv("FEDBD_CACHE")
    assert cache.folder() == tmp_path / "xdg/fedbd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: such a path is to be ignored
    assert cache.folder() == tmp_path / ".cache/fedbd"


def _write(start, results):
    start.wait()

    def decode():
        time.sleep(0.05)  # so that all of them decode before the first has written
        return ARRAYS

    results.put(same(cached("reader", {}, [], decode)))


def test_processes_may_write_at_once():
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_write, args=(start, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    start.set()
    assert [results.get(timeout=20) for _ in workers] == [True] * len(workers)
    for worker in workers:
        worker.join()
    assert len(entries(cache.folder())) == 1
