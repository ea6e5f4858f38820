"""Asking clients to open a sum: two key-holding clients of the cohort decrypt, and their answers are compared.

One client could send anything for a sum that only it sees; two that agree must collude to lie. Both see the sum: the
record's ``clients_saw`` says who.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedbd.errors import SecureSumFailed
from fedbd.flower.arrays import pack_all, payload_bytes, view_all
from fedbd.flower.folding import Fold
from fedbd.flower.mods import CIPHERTEXT
from fedbd.flower.proxies import PROTOCOL, OrderedGrid
from fedbd.seeding import numpy_rng
from fedbd.sums import Row

DECRYPTORS = 2
SLACK = 1.25
"""6 sigma are exceeded once in a billion values; a sum under a wrong key lies anywhere between grid points."""


class Opened(NamedTuple):
    """Sums in the clear.

    Attributes:
        totals: Bucket -> row on the grid.
        asked: Clients that decrypted; nobody where updates came in the clear.
        noise: The largest distance of a decrypted value from the grid, in value units; None in the clear.
        sizes: Payload bytes up and down.
    """

    totals: dict[int, Row]
    asked: tuple[int, ...]
    noise: float | None
    sizes: tuple[int, int]


def decrypted(grid: OrderedGrid, fold: Fold, round_: int, seed: int, timeout: float, noise_bound: float) -> Opened:
    """Return the opened sums.

    Args:
        grid: The engine's grid.
        fold: The round's encrypted totals.
        round_: The round.
        seed: Draws who is asked.
        timeout: Seconds for the exchange.
        noise_bound: What the noise of the largest sum does not exceed (6 sigma), in value units.

    Raises:
        SecureSumFailed: If a decryptor fails, the two disagree, or what they found is no sum under their key.
    """
    accepted = sorted(fold.accepted)
    if len(accepted) < DECRYPTORS:
        raise SecureSumFailed(f"round {round_}: two clients must decrypt, and only {len(accepted)} answered")
    drawn = numpy_rng(seed, "decryptors", round_).choice(accepted, DECRYPTORS, replace=False)
    asked = tuple(sorted(int(client) for client in drawn))
    blobs = {
        str(bucket): np.frombuffer(fold.evaluator.serialize(total), np.uint8)
        for bucket, total in sorted(fold.totals.items())
    }
    content = RecordDict({PROTOCOL: ConfigRecord({"kind": "decrypt"}), CIPHERTEXT: pack_all(blobs)})
    nodes = grid.nodes()
    requests = [Message(content, dst_node_id=nodes[client], message_type="train") for client in asked]
    replies = grid.send_and_receive(requests, timeout=timeout)
    answers = [_answer(reply, round_, len(fold.start) + 1) for reply in replies]
    if len(answers) < DECRYPTORS:
        raise SecureSumFailed(
            f"round {round_}: {len(answers)} of {DECRYPTORS} decryptors answered within {timeout:g} s"
        )
    _compare(answers, asked, round_)
    noise = max(float(cast(float, reply.content["noise"]["largest"])) for reply in replies)
    if noise > SLACK * noise_bound:
        raise SecureSumFailed(
            f"round {round_}: decrypted values lie up to {noise:.1e} off the grid, where the noise is at most "
            f"{noise_bound:.1e}: a client encrypted under another key, or sent no ciphertext of its update"
        )
    sizes = (sum(payload_bytes(r.content) for r in replies), sum(payload_bytes(r.content) for r in requests))
    return Opened({int(bucket): row for bucket, row in answers[0].items()}, asked, noise, sizes)


def _answer(reply: Message, round_: int, length: int) -> dict[str, Any]:
    if reply.has_error():
        raise SecureSumFailed(f"round {round_}: a decryptor failed: {reply.error.reason}")
    rows = view_all(reply.content.array_records[CIPHERTEXT])
    for bucket, row in rows.items():
        if row.shape != (length,) or row.dtype != np.int64:
            raise SecureSumFailed(
                f"round {round_}: sum {bucket} came back as {row.dtype}{row.shape}, not int64({length},)"
            )
    return rows


def _compare(answers: list[dict[str, Any]], asked: tuple[int, ...], round_: int) -> None:
    first, second = answers
    different = [
        bucket for bucket in first if bucket not in second or not np.array_equal(first[bucket], second[bucket])
    ]
    if different or set(first) != set(second):
        raise SecureSumFailed(
            f"round {round_}: clients {asked[0]} and {asked[1]} decrypt sum {', '.join(different)} differently: one of "
            "them lies or holds another key"
        )
