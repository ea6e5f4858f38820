"""One round's record: its names, their order, and plain JSON values.

Every line has every name of ``RoundRecord``, in that order; shares are fractions of 1, and what was not measured is
null, never 0. A number that is not finite becomes null, and ``notes.non_finite`` lists where it stood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack


class RoundRecord(TypedDict, total=False):
    """One line of ``rounds.jsonl``; the order of the names is the order in the line.

    Attributes:
        round: 0 is the start, before any training.
        participants: Client ids of the cohort, ascending.
        attackers: Which of them attacked (ground truth).
        polluted: Which of them trained on polluted data (ground truth).
        accepted: Client ids that the aggregation rule let count; null for a rule that rejects nobody.
        rejected: Client ids that it left out; null as above.
        clean_accuracy: On the whole clean test set; this and the next are those of the round's final model.
        clean_accuracy_without_target: The same without the (first) target class.
        attack_success: The worst over attacks.
        per_attack: {attack: {attack_success, robust_accuracy, clean_accuracy_without_target, evaluated_samples}}.
        attack_success_floor: The same trigger on the attack-free twin at the same round.
        robust_accuracy: Triggered images given their true label (the worst attack's).
        collapsed: See ``metrics.is_collapsed``.
        evaluated_samples: Number of clean test images.
        weights_sha256: Of the global model's flat float32 weights.
        server_saw: {kind, clients_per_sum [], honest_per_sum_min, contaminated_sums, stable_ids, ciphertext_bytes}.
        clients_saw: Who decrypted what.
        cleanup: {method: {mode, acted, before {}, after {}, twin_after {}, seconds, notes}}.
        detection: {method: {where, auc, tpr_at_fpr_1, tpr_at_fpr_5, positives, negatives, seconds, notes}}.
        seconds: {train, encrypt, aggregate, decrypt, cleanup, detect, evaluate, total}.
        bytes_up: Array payloads and config values from the clients, not a transport's overhead.
        bytes_down: The same to the clients.
        cipher_error: Largest error of the opened sums: 0 where the clients' checksums confirm them, null where nobody
            could compare or nothing was encrypted.
        bit_exact: Whether the opened sums are the exact sums of what clients sent, as those checksums tell.
        notes: What the stages noted, by stage; the secure sum's under ``secure_sum``.
    """

    round: int
    participants: list[int]
    attackers: list[int]
    polluted: list[int]
    accepted: list[int] | None
    rejected: list[int] | None
    clean_accuracy: float | None
    clean_accuracy_without_target: float | None
    attack_success: float | None
    per_attack: Mapping[str, Any] | None
    attack_success_floor: float | None
    robust_accuracy: float | None
    collapsed: bool | None
    evaluated_samples: int | None
    weights_sha256: str | None
    server_saw: Mapping[str, Any] | None
    clients_saw: Any
    cleanup: Mapping[str, Any] | None
    detection: Mapping[str, Any] | None
    seconds: Mapping[str, float | None]
    bytes_up: int | None
    bytes_down: int | None
    cipher_error: float | None
    bit_exact: bool | None
    notes: Mapping[str, Any]


ROUND_NAMES = tuple(RoundRecord.__annotations__)
_SERVER_SAW = ("kind", "clients_per_sum", "honest_per_sum_min", "contaminated_sums", "stable_ids", "ciphertext_bytes")
_CLEANUP = ("mode", "acted", "before", "after", "twin_after", "seconds", "notes")
_DETECTION = ("where", "auc", "tpr_at_fpr_1", "tpr_at_fpr_5", "positives", "negatives", "seconds", "notes")
_SECONDS = ("train", "encrypt", "aggregate", "decrypt", "cleanup", "detect", "evaluate", "total")


def round_record(**measured: Unpack[RoundRecord]) -> dict[str, Any]:
    """Return one round's line: all names in their order, plain JSON values, null where nothing was measured.

    Args:
        measured: At least ``round``; numpy scalars, arrays and tensors are fine.

    Raises:
        TypeError: If a name is unknown, ``round`` is missing or a value has no JSON form.
    """
    unknown = sorted(set(measured) - set(ROUND_NAMES))
    if unknown or "round" not in measured:
        raise TypeError(f"a round's record: unknown {unknown}" if unknown else "a round's record needs its round")
    lost: list[str] = []
    given = {name: plain(value, name, lost) for name, value in measured.items()}
    record = {name: given.get(name) for name in ROUND_NAMES}
    record["server_saw"] = record["server_saw"] and _complete(record["server_saw"], _SERVER_SAW)
    record["seconds"] = _complete(record["seconds"] or {}, _SECONDS)
    for group, names in (("cleanup", _CLEANUP), ("detection", _DETECTION)):
        record[group] = {key: _complete(entry, names) for key, entry in (record[group] or {}).items()}
    record["per_attack"] = record["per_attack"] or {}
    record["notes"] = {**(record["notes"] or {}), **({"non_finite": lost} if lost else {})}
    return record


def _complete(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an entry with the agreed names first, null where absent, and then whatever else it holds."""
    return {**{name: entry.get(name) for name in names}, **entry}


def plain(value: Any, path: str = "", lost: list[str] | None = None) -> Any:
    """Return a value as strict JSON knows it; numbers that are not finite become None.

    Args:
        value: None, bool, number, string, mapping, sequence, set, or anything with ``tolist`` (numpy, torch).
        path: Where it stands, for messages.
        lost: Collects the paths of the numbers that were not finite.

    Raises:
        TypeError: If the value has no JSON form.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value) and lost is not None:
            lost.append(path)
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{path}.{key}", lost) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [plain(entry, f"{path}[{i}]", lost) for i, entry in enumerate(value)]
    raise TypeError(f"{path}: a {type(value).__name__} has no place in a record")
