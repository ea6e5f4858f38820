"""Where an unfinished run stands, on disk: what ``fedbd resume`` goes on from.

A checkpoint is two files in a run's folder: ``checkpoint/round-R.npz`` with the arrays and ``round-R.json`` with all
else, written in that order, each beside its place, synced and then renamed. The second one names the first by its hash
and is sealed with one of its own. So a kill at any moment leaves the earlier checkpoint or the new one whole, and
damage is found. The last two are kept. No pickle is written or read, and no key is in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbd.config.scenario import Scenario, fingerprint, to_dict
from fedbd.errors import CheckpointError, Problem, RunFailed
from fedbd.records.environment import code_digest
from fedbd.records.record import ROUNDS, json_object, read_rounds
from fedbd.records.saved_state import Arrays, Unsaveable, decode, encode
from fedbd.records.whole_files import whole_file, write_text

FOLDER = "checkpoint"
FORM, VERSION = "fedbd checkpoint", 2
VERSIONS = ("fedbd", "flwr", "torch", "numpy")
"""Packages whose release can change a bit of a record."""

SMALL = 1 << 16
"""Bytes below which arrays of one type lie side by side in one entry: one each for 10,000 clients takes a second."""

_NAME = re.compile(r"round-(\d+)\.(json|npz)")


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What wrote a checkpoint: only the same can go on to the same records.

    Attributes:
        scenario: Hash of what the scenario computes and measures.
        data: Hash of the data set.
        code: Hash of fedbd's sources.
        versions: Releases of ``VERSIONS``.
    """

    scenario: str
    data: str
    code: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run after one of its rounds.

    Attributes:
        round: The last round that is in it.
        stamp: What wrote it.
        state: Values and arrays, see ``fedbd.records.saved_state``.
        damaged: What was wrong with later checkpoints that could not be read.
    """

    round: int
    stamp: Stamp
    state: Any
    damaged: tuple[str, ...] = ()


def stamp_of(scenario: Scenario, data: str, app_dir: Path) -> Stamp:
    """Return what this process would write for a scenario and data of this hash, with the Flower app in ``app_dir``."""
    measured = json.dumps(to_dict(scenario)["evaluation"], sort_keys=True)
    text = "\n".join([fingerprint(scenario), measured, scenario.engine.device])
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    wanted = hashlib.sha256(text.encode()).hexdigest()
    return Stamp(scenario=wanted, data=data, code=code_digest(app_dir), versions=versions)


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint in a run's folder, and remove all but it and the one before.

    Raises:
        RunFailed: If the state holds what cannot be saved, or the files cannot be written.
    """
    arrays: Arrays = {}
    try:
        tree = encode(checkpoint.state, arrays)
    except Unsaveable as error:
        raise RunFailed(
            f"round {checkpoint.round}: no checkpoint can hold this: {error}; set checkpoint: null"
        ) from None
    place = run / FOLDER
    name = f"round-{checkpoint.round}"
    try:
        place.mkdir(exist_ok=True)
        entries, places = _packed(arrays)
        with whole_file(place / f"{name}.npz") as file:
            np.savez(file, **entries)  # type: ignore[arg-type]
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        body = {"form": FORM, "version": VERSION, "round": checkpoint.round, **asdict(checkpoint.stamp)}
        body |= {"arrays": digest, "places": places, "state": tree}
        write_text(place / f"{name}.json", json.dumps({**body, "seal": _seal(body)}))
        _sync_folder(place)
        _tidy(place, checkpoint.round)
    except OSError as error:
        remedy = "make room and go on with `fedbd resume`, or set checkpoint: null"
        raise RunFailed(f"round {checkpoint.round}: the checkpoint cannot be written: {error}; {remedy}") from error


def read_checkpoint(run: Path) -> Checkpoint | None:
    """Return the last whole checkpoint in a run's folder, None where there never was one.

    Raises:
        CheckpointError: If there are some and all are damaged, or one is of another release's form.
    """
    damaged: list[Problem] = []
    for round_ in sorted(_rounds(run / FOLDER), reverse=True):
        try:
            found = _read(run / FOLDER, round_)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            path = run / FOLDER / f"round-{round_}.json"
            damaged.append(Problem(path=str(path), expected="must be a whole checkpoint", got=str(error)))
            continue
        return Checkpoint(
            round=found.round, stamp=found.stamp, state=found.state, damaged=tuple(str(problem) for problem in damaged)
        )
    if damaged:
        remedy = f"remove {run / FOLDER}, and the run starts from its first round again"
        raise CheckpointError([*damaged[:-1], Problem(**{**asdict(damaged[-1]), "remedy": remedy})])
    return None


def can_resume(run: Path, now: Stamp) -> bool:
    """Return whether a run's folder holds a checkpoint that this process can take up."""
    try:
        found = read_checkpoint(run)
    except CheckpointError:
        return False
    return found is not None and not differences(found.stamp, now, str(run)) and not missing_lines(run, found.round)


def remove_checkpoints(run: Path) -> None:
    """Remove a run's checkpoints: it has come to its end."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def differences(found: Stamp, now: Stamp, path: str, *, other_code: bool = False) -> list[Problem]:
    """Return why a checkpoint cannot be taken up.

    Args:
        found: The checkpoint's stamp.
        now: This process's.
        path: The checkpoint's folder.
        other_code: Take up what other code or releases wrote.
    """
    if found.scenario != now.scenario:
        expected = "is of another scenario than the scenario.yaml beside it"
        remedy = "put that file back as it was, or run the scenario anew"
        return [Problem(path=path, expected=expected, remedy=remedy)]
    if found.data != now.data:
        remedy = "put the data back as they were, or run the scenario anew"
        return [Problem(path=path, expected="is of a run on other data than are there now", remedy=remedy)]
    if other_code:
        return []
    changed = [
        f"{name} {found.versions.get(name)} became {version}"
        for name, version in now.versions.items()
        if found.versions.get(name) != version
    ]
    if found.code != now.code:
        changed.append("fedbd's own sources changed")
    if not changed:
        return []
    remedy = "go back to what wrote it, run the scenario anew, or pass --other-code if the change does not matter"
    expected = f"was written by other code, so records might differ ({', '.join(changed)})"
    return [Problem(path=path, expected=expected, remedy=remedy)]


def missing_lines(run: Path, last: int) -> list[Problem]:
    """Return what is wrong with the records of the rounds up to a checkpoint's."""
    there = [line["round"] for line in read_rounds(run) if line["round"] <= last]
    if there == list(range(last + 1)):
        return []
    remedy = f"put the file back, or remove {run / FOLDER}, and the run starts from its first round again"
    expected = f"must hold the rounds 0 to {last}, each once, for its checkpoint to go on"
    return [Problem(path=str(run / ROUNDS), expected=expected, got=f"{len(there)} of them", remedy=remedy)]


def _read(place: Path, round_: int) -> Checkpoint:
    text = json_object((place / f"round-{round_}.json").read_bytes())
    seal = text.pop("seal")
    if seal != _seal(text):
        raise ValueError("its seal is broken")
    if text["form"] != FORM or text["version"] != VERSION:
        found = f"{text['form']} {text['version']}"
        remedy = "go on with the fedbd that wrote it, or run the scenario anew"
        problem = Problem(path=str(place), expected=f"must be of form {FORM} {VERSION}", got=found, remedy=remedy)
        raise CheckpointError([problem])
    file = place / f"round-{round_}.npz"
    with open(file, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != text["arrays"]:
            raise ValueError(f"{file.name} is not the file that belongs to it")
    with np.load(file, allow_pickle=False) as loaded:
        arrays = _unpacked({name: loaded[name] for name in loaded.files}, text["places"])
    stamp = Stamp(**{name: text[name] for name in ("scenario", "data", "code", "versions")})
    return Checkpoint(round=text["round"], stamp=stamp, state=decode(text["state"], arrays))


def _packed(arrays: Arrays) -> tuple[Arrays, dict[str, list[Any]]]:
    """Return the entries of the file, and of each small array the entry, the shape and the first place in it."""
    entries: Arrays = {}
    pools: dict[np.dtype[Any], list[NDArray[Any]]] = {}
    sizes: Counter[np.dtype[Any]] = Counter()
    places: dict[str, list[Any]] = {}
    for name, array in arrays.items():
        if array.nbytes >= SMALL:
            entries[name] = array
            continue
        pools.setdefault(array.dtype, []).append(array.reshape(-1))
        places[name] = [list(pools).index(array.dtype), list(array.shape), sizes[array.dtype]]
        sizes[array.dtype] += array.size
    for i, (dtype, pool) in enumerate(pools.items()):
        entries[f"pool-{i}"] = np.concatenate(pool, dtype=dtype)  # named, or it would turn the order of bytes
    return entries, places


def _unpacked(entries: Arrays, places: dict[str, list[Any]]) -> Arrays:
    """Return what ``_packed`` got."""
    arrays = dict(entries)
    for name, (pool, shape, start) in places.items():
        arrays[name] = entries[f"pool-{pool}"][start : start + math.prod(shape)].reshape(shape)
    return arrays


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _rounds(place: Path) -> set[int]:
    """Return the rounds that have a finished checkpoint's second file."""
    matches = [_NAME.fullmatch(entry.name) for entry in (place.iterdir() if place.is_dir() else ())]
    return {int(match[1]) for match in matches if match is not None and match[2] == "json"}


def _tidy(place: Path, last: int) -> None:
    """Remove all files but those of a round's checkpoint and the one before it."""
    before = max((round_ for round_ in _rounds(place) if round_ < last), default=last)
    for entry in place.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match is None or int(match[1]) not in (last, before):
            entry.unlink()


def _sync_folder(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
