"""The hunt itself is tested: each place is shown to be searched by planting a key there, and clean things are clean."""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenseal as ts
import torch

import fedbd
from fedbd.crypto.agent import KeyAgent, start_agent, write_key_file
from fedbd.crypto.ckks import Ckks, Evaluator, encrypt, new_secret_context

_spec = importlib.util.spec_from_file_location("key_hunt", Path(__file__).with_name("key_hunt.py"))
assert _spec is not None and _spec.loader is not None
key_hunt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(key_hunt)

CKKS = Ckks()
ROOT = str(Path(fedbd.__file__).parent.parent)


@dataclass(frozen=True, slots=True)
class Slotted:
    held: Any


class Private:
    __slots__ = ("__held",)

    def __init__(self, held: Any) -> None:
        self.__held = held

    def method(self) -> None: ...


@pytest.fixture(scope="module")
def secret() -> bytes:
    return new_secret_context(CKKS)


@pytest.fixture(scope="module")
def hunt(secret: bytes) -> Any:
    return key_hunt.KeyHunt.for_secret(secret)


def closure(key: bytes) -> Callable[[], int]:
    return lambda: len(key)


def generator(key: bytes) -> Iterator[int]:
    held = bytes(key)
    yield 0
    yield len(held)


def started(key: bytes) -> Iterator[int]:
    running = generator(key)
    next(running)
    return running


def flower_record(raw: bytes) -> Any:
    from flwr.app import ArrayRecord, RecordDict

    return RecordDict({"state": ArrayRecord([np.zeros(3), np.frombuffer(raw, dtype=np.uint8)])})


def flower_config(raw: bytes) -> Any:
    from flwr.app import ConfigRecord, Context, RecordDict

    return Context(1, 2, {}, RecordDict({"state": ConfigRecord({"numbers": [1, 2], "key": raw})}), {})


def cyclic(raw: bytes) -> list[Any]:
    first: list[Any] = []
    first.append([first, {"held": raw}])
    return first


PLACES: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda raw: raw,
    "bytearray": bytearray,
    "memoryview": lambda raw: memoryview(raw)[:10],
    "list": lambda raw: [1, [2, (raw,)]],
    "dict value": lambda raw: OrderedDict(a={"b": raw}),
    "dict key": lambda raw: {raw: 1},
    "set": lambda raw: {1, frozenset([raw])},
    "deque": lambda raw: deque([0, raw]),
    "attribute": lambda raw: SimpleNamespace(a=SimpleNamespace(b=raw)),
    "slot": Slotted,
    "private slot": Private,
    "bound method": lambda raw: Private(raw).method,
    "closure": closure,
    "default argument": lambda raw: eval("lambda x=None: x").__class__((lambda x: x).__code__, {}, "f", (raw,)),
    "partial": lambda raw: functools.partial(print, raw),
    "generator": started,
    "iterator": lambda raw: iter([raw]),
    "exception": lambda raw: ValueError("wrong", raw),
    "pickle": lambda raw: pickle.dumps([1, raw]),
    "pickle in a file object": lambda raw: io.BytesIO(pickle.dumps(raw)),
    "hex text": lambda raw: {"key": raw.hex()},
    "base64 text": lambda raw: base64.b64encode(raw).decode(),
    "base64 text, shifted": lambda raw: base64.b64encode(b"x" + raw).decode(),
    "latin-1 text": lambda raw: raw.decode("latin-1"),
    "integer": lambda raw: int.from_bytes(b"\x01" + raw, "little"),
    "array": lambda raw: np.frombuffer(raw, dtype=np.uint8),
    "words": lambda raw: (
        np.frombuffer(raw[: len(raw) // 8 * 8], dtype=np.uint64).reshape(2, -1)
        if len(raw) % 16 < 8
        else np.frombuffer(raw[: len(raw) // 16 * 16], dtype=np.uint64).reshape(2, -1)
    ),
    "view of an array": lambda raw: np.frombuffer(raw, dtype=np.uint8)[:3][::2],
    "object array": lambda raw: np.array([None, [raw]], dtype=object),
    "tensor": lambda raw: torch.frombuffer(bytearray(raw), dtype=torch.uint8),
    "view of a tensor": lambda raw: {"w": torch.frombuffer(bytearray(raw), dtype=torch.uint8)[:2]},
    "module buffer": lambda raw: torch.nn.Sequential(torch.nn.BatchNorm1d(1), buffered(raw)),
    "Flower array": flower_record,
    "Flower context": flower_config,
    "cycle": cyclic,
}


def buffered(raw: bytes) -> torch.nn.Module:
    holder = torch.nn.Identity()
    holder.register_buffer("held", torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return holder


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_key_is_found_and_an_equal_amount_of_other_bytes_is_not(secret: bytes, hunt: Any, place: str) -> None:
    assert hunt.search_object(PLACES[place](secret[12:]))
    assert hunt.search_object(PLACES[place](os.urandom(len(secret)))) == []
    assert hunt.search_object(PLACES[place](new_secret_context(CKKS))) == []  # nothing that all keys share


def test_paths_lead_to_the_hit(secret: bytes, hunt: Any) -> None:
    (first, *_) = hunt.search_object({"round": [SimpleNamespace(state={"a": secret})]})
    assert first.startswith("root[")
    assert "'round'" in first
    assert "serialized[" in first


def test_a_part_of_the_key_is_enough(secret: bytes, hunt: Any) -> None:
    assert hunt.search_bytes(secret[20_000:30_000])


def test_words_in_memory_are_a_form_of_the_key(secret: bytes, hunt: Any) -> None:
    context = ts.context_from(secret[12:], 1)
    key = context.secret_key()
    native = key.data
    plain = native.data()
    words = np.array([plain[i] for i in range(plain.coeff_count())], dtype=np.uint64)
    assert len(words) == 2 * 4096
    assert any(name.startswith("words") for name in hunt.search_bytes(words.tobytes()))


def test_a_context_with_a_key_is_found_whatever_its_key(secret: bytes, hunt: Any) -> None:
    other = ts.context_from(new_secret_context(CKKS)[12:], 1)
    assert hunt.search_object([other]) != []
    assert hunt.search_object([ts.ckks_vector(other, [1.0])]) != []


def test_a_servers_things_are_clean(secret: bytes, hunt: Any) -> None:
    evaluator = Evaluator(CKKS)
    total = evaluator.add(None, encrypt(np.arange(9, dtype=np.int64), secret))
    total = evaluator.add(total, encrypt(np.arange(9, dtype=np.int64), secret))
    assert hunt.search_object([evaluator, total, evaluator.serialize(total), pickle.dumps(evaluator)]) == []
    evaluator.ckks.__dict__["planted"] = secret
    assert hunt.search_object(evaluator)


def test_a_key_agents_client_is_clean(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_file(path, CKKS)
    with start_agent(CKKS, key_file=path) as process, KeyAgent(process.handle, CKKS) as client:
        client.decrypt(client.encrypt(np.arange(9, dtype=np.int64)))
        hunt = key_hunt.KeyHunt.for_secret(path.read_bytes())
        assert hunt.search_object([client, process, pickle.dumps(client)]) == []
        assert hunt.search_process(process.pid)  # and there it is


HOLDER = """
import sys, numpy as np
from fedbd.crypto import ckks
data = sys.stdin.buffer.read(int(sys.argv[2]))
if sys.argv[1] == "key":
    held = ckks._open(data)
    del data
else:
    evaluator = ckks.Evaluator(ckks.Ckks())
    total = evaluator.add(None, data)
    total = evaluator.add(total, data)
    evaluator.serialize(total)
print("ready", flush=True)
sys.stdin.read()
"""


def process_with(kind: str, data: bytes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLDER, kind, str(len(data))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(data)
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    return process


def test_memory_of_a_process_with_the_key_and_of_one_with_an_evaluator(secret: bytes, hunt: Any) -> None:
    blob = encrypt(np.arange(4096, dtype=np.int64), secret)
    for kind, data in (("key", secret), ("evaluator", blob)):
        process = process_with(kind, data)
        with process:
            hits = hunt.search_process(process.pid)
            process.stdin.close()  # type: ignore[union-attr]
        assert bool(hits) == (kind == "key")
        if kind == "key":
            assert any("words" in hit for hit in hits)  # SEAL's own copy, not only the bytes that were read


def test_a_process_that_cannot_be_read_is_an_error(hunt: Any) -> None:
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        hunt.search_process(2**22 + 1)


def test_files(tmp_path: Path, secret: bytes, hunt: Any) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "clean.bin").write_bytes(os.urandom(70_000))
    np.savez_compressed(tmp_path / "clean.npz", x=np.zeros(9))
    assert hunt.search_files(tmp_path) == []
    (tmp_path / "a" / "b" / "raw").write_bytes(b"head" + secret)
    (tmp_path / "a" / "hex.json").write_text('{"k": "' + secret.hex() + '"}')
    (tmp_path / "base64.json").write_text(base64.b64encode(secret).decode())
    np.savez_compressed(tmp_path / "deep.npz", x=np.frombuffer(secret, dtype=np.uint8))
    found = {Path(hit.partition(":")[0].partition("!")[0]).name for hit in hunt.search_files(tmp_path)}
    assert found == {"raw", "hex.json", "base64.json", "deep.npz"}
