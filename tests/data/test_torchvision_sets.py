"""The sets of torchvision, read from files written as torchvision leaves them, against torchvision's own classes."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fedbd.data import download
from fedbd.data.cifar import Cifar10, Cifar100
from fedbd.data.gtsrb import Gtsrb
from fedbd.data.idx_sets import Emnist, FashionMnist, Mnist
from fedbd.data.plain_pickle import NotPlainError, read_plain
from fedbd.errors import DataError
from fedbd.types import DataSource

SOURCES = [Cifar10(), Cifar100(), Mnist(), FashionMnist(), Emnist(), Gtsrb()]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, name: str = "MNIST") -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 5)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(noise(count, 28, 28, seed=count)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 4))


def write_emnist(root: Path, split: str, first: int = 0) -> None:
    raw = root / "EMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("test", 4)):
        (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(idx(noise(count, 28, 28, seed=count)))
        (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 4 + first))


def python_2(entries: dict[str, object]) -> bytes:
    """Return a pickle as Python 2 wrote it: strings of bytes, arrays by NumPy 1's names."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def value_of(value: object) -> bytes:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(whole(v) if isinstance(v, int) else text(v) for v in value) + b"e"
        rows, columns = value.shape
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        content = value.tobytes()
        shape = whole(rows) + whole(columns) + b"\x86"
        return made + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"

    pairs = b"".join(text(key) + value_of(value) for key, value in entries.items())
    return b"\x80\x02}q\x01(" + pairs + b"u."


def batch(count: int, seed: int, **labels: list[int]) -> bytes:
    names = [f"{i}.png" for i in range(count)]
    return python_2({"batch_label": "one", **labels, "data": noise(count, 3072, seed=seed), "filenames": names})


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(batch(4, number, labels=[0, 1, 2, (number + 1) % 3]))
    (folder / "test_batch").write_bytes(batch(3, 9, labels=[2, 1, 0]))


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(batch(6, 1, fine_labels=[0, 1, 2, 3, 0, 1], coarse_labels=[0, 1, 0, 1, 0, 1]))
    (folder / "test").write_bytes(batch(2, 2, fine_labels=[3, 0], coarse_labels=[1, 0]))


def write_gtsrb(root: Path) -> None:
    for label, track, frame in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (2, 5, 0)]:
        folder = root / f"gtsrb/GTSRB/Training/{label:05}"
        folder.mkdir(parents=True, exist_ok=True)
        size = 20 + 3 * frame
        Image.fromarray(noise(size, size + 4, 3, seed=10 * label + track)).save(folder / f"{track:05}_{frame:05}.ppm")
        (folder / f"GT-{label:05}.csv").write_text("Filename;Width\n")
    tests = root / "gtsrb/GTSRB/Final_Test/Images"
    tests.mkdir(parents=True)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate([2, 0, 1]):
        Image.fromarray(noise(32, 32, 3, seed=90 + number)).save(tests / f"{number:05}.ppm")
        lines.append(f"{number:05}.ppm;32;32;5;5;25;25;{label}")
    (root / "gtsrb/GT-final_test.csv").write_text("\r\n".join(lines) + "\r\n")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_they_obey_the_protocol(source):
    assert isinstance(source, DataSource)
    assert source.has_groups is (type(source) is Gtsrb)


@pytest.mark.parametrize(("source", "theirs"), [(Mnist(), datasets.MNIST), (FashionMnist(), datasets.FashionMNIST)])
def test_mnist_is_torchvisions(source, theirs, tmp_path):
    write_mnist(tmp_path, theirs.__name__)
    for _ in range(2):
        data = source.load(tmp_path)
        for part, train in ((data.train, True), (data.test, False)):
            known = theirs(tmp_path, train=train)
            assert torch.equal(part.images[:, 0], known.data)
            assert torch.equal(part.labels, known.targets)
            assert part.images.is_contiguous()
    assert (data.shape, data.classes) == ((1, 28, 28), 4)


@pytest.mark.parametrize(("split", "first"), [("digits", 0), ("letters", 1), ("balanced", 0)])
def test_emnist_is_torchvisions_turned_upright(split, first, tmp_path):
    write_emnist(tmp_path, split, first)
    data = Emnist(split=split).load(tmp_path)
    known = datasets.EMNIST(tmp_path, split=split, train=True)
    assert torch.equal(data.train.images[:, 0], known.data.transpose(1, 2))
    assert torch.equal(data.train.labels, known.targets - first)
    assert data.train.images.is_contiguous()


@pytest.fixture
def trusting(monkeypatch):
    """Let torchvision unpickle small files of ours: their checksums are not CIFAR's."""
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)


def test_cifar10_is_torchvisions(tmp_path, trusting):
    write_cifar10(tmp_path)
    data = Cifar10().load(tmp_path)
    for part, train in ((data.train, True), (data.test, False)):
        known = datasets.CIFAR10(tmp_path, train=train)
        assert np.array_equal(part.images.permute(0, 2, 3, 1), known.data)
        assert part.labels.tolist() == known.targets
    assert (len(data.train), data.classes) == (20, 3)


def test_cifar100_is_torchvisions(tmp_path, trusting):
    write_cifar100(tmp_path)
    data, known = Cifar100().load(tmp_path), datasets.CIFAR100(tmp_path, train=True)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1), known.data)
    assert data.train.labels.tolist() == known.targets
    coarse = Cifar100(labels="coarse").load(tmp_path)
    assert (coarse.classes, coarse.test.labels.tolist()) == (2, [1, 0])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_python_3_are_read_too(protocol, tmp_path):
    value = {"a": [1, 2, -3, 70000, 2**40, None, True], "b": ("x", 0.5, [], {}, ()), "c": [{"d": "é"}] * 2}
    (tmp_path / "a").write_bytes(pickle.dumps(value, protocol))
    assert read_plain(tmp_path / "a") == value


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_pickle_is_ever_called(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(pickle.dumps({"labels": [0], "data": Evil()}, protocol))
    with pytest.raises(DataError, match=r"^data_batch_2: must be a batch of CIFAR as torchvision leaves it"):
        Cifar10().load(tmp_path)
    assert not Path("made-by-a-pickle").exists()
    pickle.loads(path.read_bytes())  # it would have been
    assert Path("made-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is damaged"),
        (b"\x80\x02}", "it is damaged"),
        (b"\x80\x02e.", "it is damaged"),
        (b"\x80\x02}K\x01e.", "it is damaged"),
        (b"\x80\x02}(K\x01u.", "it is damaged"),
        (b"\x80\x02h\x05.", "it is damaged"),
        (b"\x80\x02R.", "it is damaged"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "it is damaged"),
        (b"cposix\nsystem\n(S'true'\ntR.", "it would do more than build plain values (STRING)"),
        (b"\x80\x02c__main__\nA\n)\x81.", "it would do more than build plain values (NEWOBJ)"),
        (b"\x80\x02U\x01aQ.", "it would do more than build plain values (BINPERSID)"),
        (b"\x80\x02\x82\x01.", "it would do more than build plain values (EXT1)"),
    ],
)
def test_other_pickles_are_refused(content, reason, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(NotPlainError) as caught:
        read_plain(tmp_path / "a")
    assert str(caught.value) == reason


def array(content: bytes) -> bytes:
    return python_2({"labels": [0, 1], "data": noise(2, 3072)}).replace(b"\x00b\x87R", content, 1)


BROKEN_BATCHES = {
    "a list": (pickle.dumps([1], 2), "it holds no mapping"),
    "no data": (python_2({"labels": [0, 1]}), "it lacks data or labels"),
    "no labels": (python_2({"data": noise(2, 3072)}), "it lacks data or labels"),
    "text for an array": (python_2({"labels": [0], "data": "none"}), "it holds no array where one has to be"),
    "narrow rows": (
        python_2({"labels": [0, 1], "data": noise(2, 1024)}),
        "its data have shape (2, 1024), not (N, 3072)",
    ),
    "a label less": (python_2({"labels": [0], "data": noise(2, 3072)}), "labels is not a list of 2 integers"),
    "words for labels": (
        python_2({"labels": ["a", "b"], "data": noise(2, 3072)}),
        "labels is not a list of 2 integers",
    ),
    "floats": (
        python_2({"labels": [0, 1], "data": noise(2, 3072)}).replace(b"U\x02u1", b"U\x02f8"),
        "its array is not one of unsigned bytes, row by row",
    ),
    "cut short": (python_2({"labels": [0, 1], "data": noise(2, 3072)})[:-900], "it is damaged"),
    "another shape than its bytes": (
        python_2({"labels": [0, 1], "data": noise(2, 3072)}).replace(struct.pack("<i", 2) + b"J", b"\3\0\0\0J"),
        "it is damaged",
    ),
}


@pytest.mark.parametrize("case", BROKEN_BATCHES)
def test_broken_batches_are_told_by_their_names(case, tmp_path):
    content, reason = BROKEN_BATCHES[case]
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Cifar10().load(tmp_path)
    assert str(caught.value) == (
        f"data_batch_3: must be a batch of CIFAR as torchvision leaves it ({reason}); copy the file again"
    )


def test_gtsrb_is_torchvisions_brought_to_one_size(tmp_path):
    write_gtsrb(tmp_path)
    data = Gtsrb(size=24).load(tmp_path)
    for part, split in ((data.train, "train"), (data.test, "test")):
        known = datasets.GTSRB(tmp_path, split=split)
        assert [label for _, label in known] == part.labels.tolist()
        resized = [np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)) for image, _ in known]
        assert np.array_equal(part.images.permute(0, 2, 3, 1), np.stack(resized))
    assert data.groups.tolist() == [0, 0, 1, 2, 2, 3]  # tracks are counted anew in each class
    assert data.classes == 3
    first = Gtsrb(size=24).load(tmp_path).train.images[0].clone()
    picture = tmp_path / "gtsrb/GTSRB/Training/00000/00000_00000.ppm"
    Image.fromarray(noise(20, 24, 3, seed=77)).save(picture)
    os.utime(picture, (1, 1))
    assert not torch.equal(Gtsrb(size=24).load(tmp_path).train.images[0], first)  # no stale copy from the cache


def damage(name: str, content: bytes | None):
    def change(root: Path) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(content)

    return change


TRUTH = "gtsrb/GT-final_test.csv"
GTSRB_CASES = {
    "damaged picture": (
        damage("gtsrb/GTSRB/Training/00001/00000_00001.ppm", b"P6 30 30 255\n12"),
        "gtsrb/GTSRB/Training/00001/00000_00001.ppm: must be a picture of 32x32 with 3 channels, got a damaged one",
    ),
    "another name": (
        damage("gtsrb/GTSRB/Training/00001/odd.ppm", b""),
        "gtsrb/GTSRB/Training/00001/odd.ppm: must be named CLASS/TRACK_FRAME.ppm, five digits each",
    ),
    "a test picture less": (
        damage("gtsrb/GTSRB/Final_Test/Images/00001.ppm", None),
        f"{TRUTH}, line 3: must name a picture in gtsrb/GTSRB/Final_Test/Images, got 00001.ppm",
    ),
    "another list": (damage(TRUTH, b"a,b\n1,2\n"), f"{TRUTH}, line 2: must name a .ppm file and its ClassId"),
    "a list that leads elsewhere": (
        damage(TRUTH, b"Filename;ClassId\n../x.ppm;0\n"),
        f"{TRUTH}, line 2: must name a .ppm file and its ClassId",
    ),
    "an empty list": (damage(TRUTH, b"Filename;ClassId\n"), f"{TRUTH}: must list the test pictures, got none"),
    "a class that nobody trains on": (
        damage(TRUTH, b"Filename;ClassId\n00000.ppm;7\n"),
        f"{TRUTH}: must be classes of the training set, 0 to 2, got 7",
    ),
}


@pytest.mark.parametrize("case", GTSRB_CASES)
def test_broken_gtsrb(case, tmp_path):
    change, message = GTSRB_CASES[case]
    write_gtsrb(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError) as caught:
        Gtsrb().load(tmp_path)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", None),
        ("train-images-idx3-ubyte", idx(noise(12, 28, 28))[:-5], None),
        ("t10k-labels-idx1-ubyte", idx(noise(5, 1)), None),
        ("t10k-labels-idx1-ubyte", b"\x1f\x8b" + bytes(30), None),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.arange(4)),
            "t10k-labels-idx1-ubyte: must hold one label per image, 5, and at least one, got 4",
        ),
        (
            "train-labels-idx1-ubyte",
            idx(np.arange(12) % 4 + 1),
            "train-labels-idx1-ubyte: must hold every class from 0 to 4, got no sample of class 0; number the classes "
            "from 0 without gaps",
        ),
    ],
)
def test_broken_idx_files(name, content, message, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw" / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Mnist().load(tmp_path)
    if message is None:  # the reason in it is torchvision's
        assert str(caught.value).startswith(f"{name}: must be a whole idx file, got ")
        assert str(caught.value).endswith("; copy the file again, unpacked")
    else:
        assert str(caught.value) == message


def test_without_files_the_message_names_the_folder_and_the_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in SOURCES:
        with pytest.raises(
            DataError, match=r"needs a folder of data files; name it in data.root or in the environment"
        ):
            source.load(None)
    with pytest.raises(DataError) as caught:
        Cifar10().load(Path("nowhere"))
    assert str(caught.value) == (
        "data 'cifar10': must lie in nowhere, got no such folder; copy there what torchvision.datasets.CIFAR10 leaves, "
        "or set data.download to true where there is a network"
    )
    Path("here").mkdir()
    monkeypatch.setenv("FEDBD_DATA", "here")
    with pytest.raises(DataError) as caught:
        Emnist(split="digits").load(None)
    assert str(caught.value) == (
        "data 'emnist': must lie in here, got no EMNIST/raw/emnist-digits-train-images-idx3-ubyte, "
        "EMNIST/raw/emnist-digits-train-labels-idx1-ubyte, EMNIST/raw/emnist-digits-test-images-idx3-ubyte and 1 more; "
        "copy there what torchvision.datasets.EMNIST leaves, or set data.download to true where there is a network"
    )


def no_network(*args, **kwargs):
    raise urllib.error.URLError(OSError("Name or service not known"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_a_download_without_a_network_fails_at_once_and_says_what_to_do(source, tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        type(source)(download=True).load(tmp_path / "new")
    assert time.monotonic() - started < 20
    (problem,) = caught.value.problems
    assert "cannot be downloaded to" in problem.expected
    assert "(Name or service not known)" in problem.expected
    assert problem.remedy.startswith("copy there what torchvision.datasets.")
    assert "on a machine with a network: " in problem.remedy
    assert not (tmp_path / "new").exists()


def test_a_host_that_does_not_answer_ends_the_wait(tmp_path, monkeypatch):
    """A server that takes connections and stays silent, as a firewall's tar pit does."""
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr(download, "ANSWER", 0.3)
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = time.monotonic()
    with pytest.raises(OSError, match=r"timed out|does not answer"):
        download._answers(address)
    assert time.monotonic() - started < 10
    silent.close()


def test_what_is_there_is_not_downloaded_and_a_download_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    write_mnist(tmp_path)
    assert Mnist(download=True).load(tmp_path).classes == 4  # no network needed
    monkeypatch.setattr(download, "_answers", lambda address: None)
    monkeypatch.setattr(datasets.FashionMNIST, "download", lambda self: write_mnist(tmp_path, "FashionMNIST"))
    assert FashionMnist(download=True).load(tmp_path).classes == 4
    assert socket.getdefaulttimeout() is None


def test_a_download_of_another_content_is_refused(tmp_path, monkeypatch):
    """torchvision compares checksums; what it says of one that differs reaches the user as his error."""
    monkeypatch.setattr(download, "_answers", lambda address: None)

    class Answer(io.BytesIO):
        url, length = None, 3

    import torchvision.datasets.utils as theirs

    monkeypatch.setattr(theirs.urllib.request, "urlopen", lambda *args, **kwargs: Answer(b"abc"))
    with pytest.raises(DataError, match=r"cannot be downloaded to .* \(File not found or corrupted"):
        Cifar10(download=True).load(tmp_path)
