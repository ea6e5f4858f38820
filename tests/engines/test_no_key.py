"""No key in reach of the server: not of its objects, not in its processes, not in a file of the run."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord

from fedbd.config.scenario import Scenario
from fedbd.crypto.agent import write_key_file
from fedbd.crypto.ckks import Ckks
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.proxies import OrderedGrid
from fedbd.flower.strategy import DefendedStrategy
from fedbd.records.record import read_rounds
from fedbd.running import engines

Make = Callable[..., Scenario]
CKKS = {"secure_sum": {"name": "ckks"}}


def _key_hunt() -> Any:
    path = Path(__file__).parent.parent / "crypto" / "key_hunt.py"
    spec = importlib.util.spec_from_file_location("key_hunt_for_engines", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.KeyHunt


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A key that the test knows, and agents that use it."""
    path = tmp_path / "key"
    write_key_file(path, Ckks())
    monkeypatch.setattr(engines, "start_agent", functools.partial(engines.start_agent, key_file=path))
    yield path
    gc.collect()


@pytest.mark.parametrize("engine", [{"executor": "serial"}, {"workers": 2}])
def test_nothing_reachable_from_the_strategy_holds_a_key(
    engine: dict[str, Any], make: Make, key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunt = _key_hunt().for_secret(key_file.read_bytes())
    received: list[Any] = []
    pulled = OrderedGrid.pull_messages
    hits: list[str] = []
    searches = []
    checkpointed = []

    def keep(self: Any, ids: Any) -> Any:
        messages = list(pulled(self, ids))
        received.extend((message.metadata, dict(message.content)) for message in messages)
        return messages

    aggregate = DefendedStrategy.aggregate_train

    def search(self: DefendedStrategy, round_: int, replies: Any) -> Any:
        held = self._round
        result = aggregate(self, round_, replies)
        grid = held.grid.inner
        assert isinstance(grid, LocalGrid)
        roots = [self, held, grid, received]
        hits.extend(hunt.search_object(roots))
        planted = ConfigRecord({"key": key_file.read_bytes()})
        assert hunt.search_object([*roots, planted]), "the hunt does not find a planted key"
        hits.extend(hunt.search_files(tmp_path / "run"))
        checkpointed.append((tmp_path / "run" / "checkpoint" / "round-1.npz").exists())
        searches.append(round_)
        return result

    monkeypatch.setattr(LocalGrid, "pull_messages", _watching(LocalGrid.pull_messages, received))
    monkeypatch.setattr(DefendedStrategy, "aggregate_train", search)
    monkeypatch.setattr(OrderedGrid, "pull_messages", keep)
    engines.execute(make(engine, **CKKS), tmp_path / "run", None)
    assert searches == [1, 2]
    assert checkpointed == [False, True]
    assert len(received) >= 8  # two clients train and two decrypt, in each of two rounds
    assert hits == []
    assert hunt.search_files(tmp_path / "run") == []


def _watching(pull: Callable[..., Any], received: list[Any]) -> Callable[..., Any]:
    def watched(self: Any, ids: Any, *rest: Any) -> Any:
        messages = list(pull(self, ids, *rest))
        received.extend((message.metadata, dict(message.content)) for message in messages)
        return messages

    return watched


def _family() -> list[int]:
    """Every process that descends from this one, but for key agents and what they forked."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [os.getpid()]
    while queue:
        for pid in children.get(queue.pop(), []):
            if "fedbd.crypto.agent" not in _command(pid):
                found.append(pid)
                queue.append(pid)
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.flower
@pytest.mark.parametrize("name", ["ray", "deployment"])
def test_no_process_of_the_engine_holds_a_key(name: str, make: Make, key_file: Path, tmp_path: Path) -> None:
    hunt = _key_hunt().for_secret(key_file.read_bytes())
    folder = tmp_path / "run"
    searched: dict[int, str] = {}
    hits: list[str] = []

    def look() -> None:
        family = sorted(_family(), key=lambda pid: not _is_server(name, _command(pid)))  # the server before it ends
        if len(read_rounds(folder)) < 2 or searched or not _is_server(name, _command(family[0])):
            return
        for pid in family:  # after a round with its decryption, while the next one runs
            command = _command(pid)
            try:
                hits.extend(f"{command}: {hit}" for hit in hunt.search_process(pid))
            except (FileNotFoundError, ProcessLookupError, ValueError):
                continue  # it ended meanwhile
            searched[pid] = command

    engines.execute(make({"name": name, "workers": 2}, **CKKS), folder, None, poll=look)
    servers = [command for command in searched.values() if _is_server(name, command)]
    assert servers, f"the server process was not among {sorted(searched.values())}"
    assert hits == []
    assert hunt.search_files(folder) == []


def _is_server(name: str, command: str) -> bool:
    return ("simulation" if name == "ray" else "serverapp") in command
