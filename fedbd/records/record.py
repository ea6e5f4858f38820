"""What a run leaves on disk: one JSON line per round, a summary, the scenario, the environment. Strict JSON throughout.

The lines themselves are made in ``fedbd.records.round_record``, whose names are here, too. Reading needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedbd.errors import DataError, Problem, UserError
from fedbd.records.round_record import ROUND_NAMES, RoundRecord, plain, round_record
from fedbd.records.whole_files import write_text

__all__ = [
    "FINISHED",
    "ROUND_NAMES",
    "RoundRecord",
    "RunFolder",
    "plain",
    "read_environment",
    "read_rounds",
    "read_summary",
    "resumed_from",
    "round_record",
    "same_records",
]

SCENARIO, ROUNDS, SUMMARY, ENVIRONMENT = "scenario.yaml", "rounds.jsonl", "summary.json", "environment.json"

FINISHED = "finished"
"""``status`` in the summary of a run that came to its end; such a folder is never written again."""

ENCRYPTION = ("server_saw", "clients_saw", "bytes_up", "bytes_down", "cipher_error", "bit_exact")
"""What a line says of the encryption itself, beside ``notes.secure_sum``."""


class RunFolder:
    """A run's folder, for the process that writes it."""

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        """Create the folder, or take up one that exists.

        Args:
            path: The folder; parents are made.
            resume: Go on with the unfinished run in it. A line that a kill cut short is taken away.

        Raises:
            UserError: If the folder holds a finished run, holds an unfinished one and ``resume`` is False, or cannot be
                written.
        """
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _refuse_to_overwrite(self.path, resume)
            if resume and (self.path / ROUNDS).exists():
                _cut_half_line(self.path / ROUNDS)
        except OSError as error:
            reason = Problem(path=str(path), expected="must be a folder that can be written", got=str(error))
            raise UserError([reason]) from error

    def write_scenario(self, text: str) -> None:
        """Write ``scenario.yaml``, the resolved scenario."""
        write_text(self.path / SCENARIO, text)

    def write_environment(self, *, devices: Sequence[str] = (), threads: int | None = None) -> None:
        """Write ``environment.json``: versions, CPU, devices, threads, commit; nothing of the user's environment."""
        from fedbd.records.environment import describe  # noqa: PLC0415 - it imports torch, which readers do without

        write_text(self.path / ENVIRONMENT, _dumps(describe(devices=devices, threads=threads), indent=2) + "\n")

    def cut_back(self, last: int) -> None:
        """Drop the rounds after ``last`` (-1: all) and the summary: a run that was ended goes on from there."""
        self.keep_rounds(last)
        (self.path / SUMMARY).unlink(missing_ok=True)
        for name in (SCENARIO, ROUNDS, SUMMARY, ENVIRONMENT):  # what a kill left half-written
            for draft in self.path.glob(f".{name}.*"):
                draft.unlink()

    def note_resumed(self, last: int, *, damaged: Sequence[str] = (), threads: int | None = None) -> None:
        """Note in ``environment.json`` after which round a run was taken up again, and on what.

        Args:
            last: The last round that was kept.
            damaged: Checkpoints that could not be read.
            threads: Threads per client, where the engine fixed them.
        """
        from fedbd.records.environment import describe  # noqa: PLC0415 - see above

        here = describe(threads=threads)
        first = read_environment(self.path) or here
        part = {"from_round": max(last, 0), "damaged_checkpoints": list(damaged), **here}
        whole = {**first, "resumed": [*first.get("resumed", []), part]}
        write_text(self.path / ENVIRONMENT, _dumps(whole, indent=2) + "\n")

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``rounds.jsonl`` and see it onto the disk.

        The line goes out in one write with its newline last, so a kill leaves at most an unterminated line, which
        readers skip.
        """
        data = (_dumps(plain(record)) + "\n").encode()
        with open(self.path / ROUNDS, "ab", buffering=len(data)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def keep_rounds(self, last: int) -> None:
        """Drop the rounds after ``last``: a run resumed from a checkpoint writes them anew."""
        kept = [record for record in read_rounds(self.path) if record["round"] <= last]
        write_text(self.path / ROUNDS, "".join(_dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` in one step: whoever looks sees the old one, or the new one whole."""
        write_text(self.path / SUMMARY, _dumps(plain(summary), indent=2) + "\n")


def _refuse_to_overwrite(path: Path, resume: bool) -> None:
    found = (read_summary(path) or {}).get("status")
    done = len(read_rounds(path))
    if found == FINISHED:
        remedy = "choose another folder, or remove this one"
    elif done and not resume:
        remedy = f"continue it with `fedbd resume {path}`, choose another folder, or remove this one"
    else:
        return
    got = f"a {'finished' if found == 'finished' else 'started'} run with {done} recorded rounds"
    raise UserError([Problem(path=str(path), expected="must be a new or empty folder", got=got, remedy=remedy)])


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, allow_nan=False, indent=indent)


def read_rounds(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's folder (or of a ``rounds.jsonl``), [] where none are.

    An unterminated last line, which a kill leaves, is skipped.

    Raises:
        DataError: If a whole line is damaged.
    """
    return rounds_from(path, 0)[0]


def rounds_from(path: str | Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the lines from a byte on, and the byte after them: for whoever follows a file that grows.

    Raises:
        DataError: If a whole line is damaged.
    """
    file = Path(path) / ROUNDS if Path(path).is_dir() else Path(path)
    if not file.exists():
        return [], offset
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            *lines, rest = stream.read().split(b"\n")
            end = stream.tell() - len(rest)
    except OSError as error:
        raise _damaged(str(file), error) from error
    records = []
    for number, text in enumerate(lines, start=1):
        try:
            records.append(_line(text))
        except ValueError as error:
            where = f"{file}:{number}" if offset == 0 else f"{file}: line {number} after byte {offset}"
            raise _damaged(where, error) from error
    return records, end


def read_summary(path: str | Path) -> dict[str, Any] | None:
    """Return the summary in a run's folder, or None where none is yet.

    Raises:
        DataError: If the file is damaged.
    """
    file = Path(path) / SUMMARY
    try:
        return json_object(file.read_bytes()) if file.exists() else None
    except (OSError, ValueError) as error:
        raise _damaged(str(file), error) from error


def read_environment(path: str | Path) -> dict[str, Any] | None:
    """Return ``environment.json`` of a run's folder, None where it is not there or damaged: it decides nothing."""
    try:
        found = json_object((Path(path) / ENVIRONMENT).read_bytes())
        _resumptions(found)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found


def resumed_from(path: str | Path) -> list[int]:
    """Return after which rounds a run was taken up again, [] for one that never was."""
    return _resumptions(read_environment(path) or {})


def _resumptions(environment: Mapping[str, Any]) -> list[int]:
    return [int(part["from_round"]) for part in environment.get("resumed", [])]


def json_object(text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        ValueError: If the text is no JSON, something else, or nested too deeply.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def _line(text: bytes) -> dict[str, Any]:
    found = json_object(text)
    if type(found.get("round")) is not int:
        raise ValueError("expected the number of its round")
    return found


def _damaged(path: str, error: ValueError | OSError) -> DataError:
    remedy = "the file was changed or damaged; repeat the run"
    return DataError([Problem(path=path, expected="must be one JSON object", got=str(error), remedy=remedy)])


def same_records(
    a: str | Path | Sequence[Mapping[str, Any]],
    b: str | Path | Sequence[Mapping[str, Any]],
    *,
    across_secure_sum: bool = False,
) -> list[str]:
    """Return the differences between two runs' rounds, [] where the records are the same.

    The same means identical to the last bit of every number, but for seconds and peak memory.

    Args:
        a: A run's folder, its ``rounds.jsonl``, or its records.
        b: The other's.
        across_secure_sum: Leave out what describes the encryption itself (``ENCRYPTION`` and ``notes.secure_sum``), to
            compare a plain run with an encrypted one, or two schemes.

    Returns:
        One ``round 3: cleanup.rnp.after.clean_accuracy: 0.5 against 0.25`` each.
    """
    found: list[str] = []
    pairs = zip_longest(*(read_rounds(x) if isinstance(x, str | Path) else x for x in (a, b)))
    for position, (left, right) in enumerate(pairs):
        if left is None or right is None:
            found.append(f"line {position + 1}: only in the {'second' if left is None else 'first'}")
            continue
        one, two = (_comparable(line, across_secure_sum) for line in (left, right))
        found.extend(f"round {left.get('round')}: {text}" for text in _differences(one, two, ""))
    return found


def _comparable(line: Mapping[str, Any], across_secure_sum: bool) -> dict[str, Any]:
    kept = dict(line)
    if across_secure_sum:
        kept = {name: value for name, value in kept.items() if name not in ENCRYPTION}
        kept["notes"] = {name: value for name, value in (kept.get("notes") or {}).items() if name != "secure_sum"}
    return kept


def _is_volatile(name: str) -> bool:
    return name.startswith("seconds") or name.endswith("_seconds") or "peak_memory" in name


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = [name for name in dict.fromkeys([*a, *b]) if not _is_volatile(name)]
        absent = "(absent)"
        parts = [_differences(a.get(n, absent), b.get(n, absent), f"{path}.{n}" if path else n) for n in names]
        return [text for part in parts for text in part]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = [_differences(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return [text for part in parts for text in part]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} against {b!r}"]
