"""What a round came to, as the strategy knows it: all that the recorder gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedbd.types import Notes, Vector


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One round as the strategy knows it, for the ``after_round`` hook.

    Attributes:
        round: The round, from 1.
        participants: The cohort, ascending.
        accepted: Clients whose updates count.
        rejected: Clients whose updates the rule left out; None for a rule that rejects nobody.
        faults: Client -> reason, of updates, and answers of those that were asked to decrypt, that did not come or were
            refused. Its first line is the same on every engine.
        buckets: Clients per sum (per update, in the clear), rejected replies left out.
        decryptors: Clients that decrypted.
        asked: Clients that were asked to; each of them got the sums and holds the key.
        start: (D,) float32, the global weights that the round started from.
        weights: (D,) float32, the global weights after the inner strategy.
        seconds: Wall seconds by phase.
        bytes_up: Payload bytes from clients to server.
        bytes_down: Payload bytes from server to clients.
        ciphertext_bytes: Bytes of ciphertexts among ``bytes_up``.
        noise: Largest distance of a decrypted value from the grid; None in the clear.
        totals: The sums over buckets on the grid, as the server came to know them.
        notes: The aggregation rule's notes.
    """

    round: int
    participants: tuple[int, ...]
    accepted: tuple[int, ...]
    rejected: tuple[int, ...] | None
    faults: dict[int, str]
    buckets: tuple[tuple[int, ...], ...]
    decryptors: tuple[int, ...]
    asked: tuple[int, ...]
    start: Vector
    weights: Vector
    seconds: dict[str, float]
    bytes_up: int
    bytes_down: int
    ciphertext_bytes: int
    noise: float | None
    totals: dict[int, Any]
    notes: Notes


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """Other weights for the next round to start from: a cleanup in the loop was kept.

    Attributes:
        weights: (D,) float32.
        reset_optimizer: Whether the inner strategy forgets its momentum and moments.
    """

    weights: Vector
    reset_optimizer: bool = False
