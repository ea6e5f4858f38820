"""One round's replies, folded into sums the moment they arrive.

Plain rows are added as integers, ciphertexts are added by an evaluator that holds no key; both are exact in any order,
so memory does not grow with the number of clients (a rule that compares single updates keeps one row per update).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from fedbd.crypto.grid import GRID_BITS
from fedbd.errors import SecureSumFailed
from fedbd.flower.arrays import payload_bytes, records_of, view, view_all
from fedbd.flower.failures import reason_in
from fedbd.flower.mods import CIPHERTEXT
from fedbd.params import Layout, is_weight, join, misfit
from fedbd.sums import Row, to_row
from fedbd.types import Vector
from fedbd.weighing import Weighing


@dataclass
class Fold:
    """The state of one round's sums; not a method, it lives for one round.

    Attributes:
        layout: Names and shapes of the float weights.
        start: (D,) float32 global weights of the round.
        bucket: Bucket of each client of the cohort.
        weighing: See ``Weighing``.
        evaluator: Adds ciphertexts; None for plain updates.
        bits: The grid's step is 2^-bits.
    """

    layout: Layout
    start: Vector
    bucket: Mapping[int, int]
    weighing: Weighing
    evaluator: Any = None
    bits: int = GRID_BITS
    totals: dict[int, Any] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    ciphertext_bytes: int = 0
    seconds: float = 0.0
    _answered: set[int] = field(default_factory=set)

    def add(self, client: int, reply: Message) -> None:
        """Add one client's reply, or note why it is rejected; a client answers once."""
        if client not in self.bucket or client in self._answered:
            return
        self._answered.add(client)
        if reply.has_error():
            self.rejected[client] = reason_in(reply)
            return
        self.bytes_up += payload_bytes(reply.content)
        try:
            self._plain(client, reply) if self.evaluator is None else self._encrypted(client, reply)
        except Exception as error:  # whatever a client sends is its own failure, not the server's
            known = isinstance(error, ValueError | SecureSumFailed)
            what = f"the reply lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            self.rejected[client] = str(error) if known else what
            return
        self.accepted.append(client)

    def leave_singles_closed(self) -> None:
        """Drop sums that drop-outs left with one client: opening one would show a single update."""
        left = Counter(self.bucket[client] for client in self.accepted)
        for client in [client for client in self.accepted if left[self.bucket[client]] == 1]:
            del self.totals[self.bucket[client]]
            self.accepted.remove(client)
            self.rejected[client] = (
                "left alone in its sum, which stays closed: opening it would show one client's update"
            )

    def _plain(self, client: int, reply: Message) -> None:
        row = self._row(reply)
        bucket = self.bucket[client]
        if bucket in self.totals:
            self.totals[bucket] += row
        else:
            self.totals[bucket] = row

    def _row(self, reply: Message) -> Row:
        records = list(records_of(reply.content, ArrayRecord).values())
        if len(records) != 1:
            raise ValueError(f"the reply must hold one ArrayRecord, got {len(records)}")
        arrays = view_all(records[0])
        weights = {name: array for name, array in arrays.items() if is_weight(array)}
        problem = misfit(weights, self.layout)
        if problem:
            raise ValueError(problem)
        claimed = 1.0
        if self.weighing.weighting == "examples":
            metrics = next(iter(records_of(reply.content, MetricRecord).values()), None)
            claimed = float(metrics["num-examples"]) if metrics is not None else float("nan")  # type: ignore[arg-type]
        delta = join(weights, self.layout) - self.start
        return to_row(delta, self.weighing.weight(claimed), bits=self.bits)

    def _encrypted(self, client: int, reply: Message) -> None:
        blob = view(records_of(reply.content, ArrayRecord)[CIPHERTEXT]["row"]).tobytes()
        bucket = self.bucket[client]
        total = self.evaluator.add(self.totals.get(bucket), blob)
        if total.size != len(self.start) + 1:  # the first one in a bucket: later ones are compared with it
            raise ValueError(f"the ciphertext must hold {len(self.start) + 1} values, got {total.size}")
        self.totals[bucket] = total
        self.ciphertext_bytes += len(blob)
