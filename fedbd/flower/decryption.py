"""Asking clients to open a sum: two key-holding clients of the cohort decrypt, and their answers are compared.

One client could send anything for a sum that only it sees; two that agree must collude to lie. Both see the sum: the
record's ``clients_saw`` says who.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedbd.errors import SecureSumFailed
from fedbd.flower.arrays import pack_all, payload_bytes, records_of, view_all
from fedbd.flower.failures import NO_REPLY, named, reason_in
from fedbd.flower.folding import Fold
from fedbd.flower.mods import CIPHERTEXT
from fedbd.flower.proxies import PROTOCOL, OrderedGrid
from fedbd.seeding import numpy_rng
from fedbd.sums import Row

DECRYPTORS = 2
SLACK = 1.25
"""6 sigma are exceeded once in a billion values; a sum under a wrong key lies anywhere between grid points."""


Answer = tuple[dict[int, Row], float]


class Opened(NamedTuple):
    """Sums in the clear.

    Attributes:
        totals: Bucket -> row on the grid.
        answered: Clients that decrypted; nobody where updates came in the clear.
        failed: Client -> reason, of those that were asked in vain.
        noise: The largest distance of a decrypted value from the grid, in value units; None in the clear.
        sizes: Payload bytes up and down.
    """

    totals: dict[int, Row]
    answered: tuple[int, ...]
    failed: dict[int, str]
    noise: float | None
    sizes: tuple[int, int]


def decrypted(
    grid: OrderedGrid,
    fold: Fold,
    round_: int,
    seed: int,
    timeout: float,
    noise_bound: float,
    *,
    others: bool = False,
) -> Opened:
    """Return the opened sums.

    Args:
        grid: The engine's grid.
        fold: The round's encrypted totals.
        round_: The round.
        seed: Draws who is asked.
        timeout: Seconds for the exchange.
        noise_bound: What the noise of the largest sum does not exceed (6 sigma), in value units.
        others: Ask other clients in place of those that fail.

    Raises:
        SecureSumFailed: If too few decrypt, the two disagree, or what they found is no sum under their key.
    """
    order = [int(client) for client in numpy_rng(seed, "decryptors", round_).permutation(sorted(fold.accepted))]
    if len(order) < DECRYPTORS:
        raise SecureSumFailed(f"round {round_}: two clients must decrypt, and only {len(order)} answered")
    content = _request(fold)
    answers: dict[int, Answer] = {}
    failed: dict[int, str] = {}
    sizes = [0, 0]
    while len(answers) < DECRYPTORS:
        asked, order = order[: DECRYPTORS - len(answers)], order[DECRYPTORS - len(answers) :]
        if not asked:
            few = f"only {len(answers)} of {DECRYPTORS} decryptors answered"
            raise SecureSumFailed(f"round {round_}: {few}{named(failed)}")
        sizes[1] += len(asked) * payload_bytes(content)
        replies = _ask(grid, asked, content, timeout)
        for client in sorted(asked):
            reply = replies.get(client)
            sizes[0] += payload_bytes(reply.content) if reply is not None and reply.has_content() else 0
            try:
                answers[client] = _answer(reply, fold)
            except SecureSumFailed as error:
                failed[client] = str(error)
                if not others:
                    raise SecureSumFailed(f"round {round_}: client {client}, {error}") from None
    noise = _compare(answers, round_, noise_bound)
    rows, _ = next(iter(answers.values()))
    return Opened(rows, tuple(sorted(answers)), failed, noise, (sizes[0], sizes[1]))


def _request(fold: Fold) -> RecordDict:
    blobs = {
        str(bucket): np.frombuffer(fold.evaluator.serialize(total), np.uint8)
        for bucket, total in sorted(fold.totals.items())
    }
    return RecordDict({PROTOCOL: ConfigRecord({"kind": "decrypt"}), CIPHERTEXT: pack_all(blobs)})


def _ask(grid: OrderedGrid, asked: list[int], content: RecordDict, timeout: float) -> dict[int, Message]:
    nodes = grid.nodes()
    requests = [Message(content, dst_node_id=nodes[client], message_type="train") for client in sorted(asked)]
    return {grid.partition_of_reply(reply): reply for reply in grid.send_and_receive(requests, timeout=timeout)}


def _answer(reply: Message | None, fold: Fold) -> Answer:
    """Return a decryptor's rows in the order of the buckets, and its noise; nothing in a reply is trusted."""
    if reply is None:
        raise SecureSumFailed(f"asked to decrypt, failed: {NO_REPLY}")
    if reply.has_error():
        raise SecureSumFailed(f"asked to decrypt, failed: {reason_in(reply)}")
    shape = (len(fold.start) + 1,)
    try:
        rows = {
            int(bucket): row for bucket, row in view_all(records_of(reply.content, ArrayRecord)[CIPHERTEXT]).items()
        }
        noise = float(cast(float, records_of(reply.content, MetricRecord)["noise"]["largest"]))
        wrong = [bucket for bucket, row in rows.items() if row.shape != shape or row.dtype != np.int64]
        if set(rows) != set(fold.totals) or wrong or not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"rows for {sorted(rows)} with noise {noise}")
    except Exception as error:  # whatever it sent
        raise SecureSumFailed(f"asked to decrypt, sent no sums: {error}") from None
    return {bucket: rows[bucket] for bucket in sorted(rows)}, noise


def _compare(answers: dict[int, Answer], round_: int, noise_bound: float) -> float:
    """Return the larger noise of two answers that agree and are sums under the decryptors' key."""
    (one, (first, noise)), (two, (second, other)) = answers.items()
    different = [str(bucket) for bucket in first if not np.array_equal(first[bucket], second[bucket])]
    if different:
        raise SecureSumFailed(
            f"round {round_}: clients {one} and {two} decrypt sum {', '.join(different)} differently: one of them lies "
            "or holds another key"
        )
    largest = max(noise, other)
    if largest > SLACK * noise_bound:
        raise SecureSumFailed(
            f"round {round_}: decrypted values lie up to {largest:.1e} off the grid, where the noise is at most "
            f"{noise_bound:.1e}: a client encrypted under another key, or sent no ciphertext of its update"
        )
    return largest
