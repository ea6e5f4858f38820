"""The client's side of the protocol: a mod for any ClientApp.

``protocol_mod`` answers the strategy's protocol messages without calling the app, and turns the app's full local
weights into one ciphertext where the strategy asked for an encrypted sum. Keys stay with the key agent; what leaves the
client then is one blob: no metrics and no ``num-examples`` in the clear.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedbd.crypto.agent_client import KeyAgent
from fedbd.errors import ClientFailed, SecureSumFailed
from fedbd.flower.arrays import pack_all, records_of, view_all
from fedbd.flower.observer import observe
from fedbd.flower.proxies import PROTOCOL
from fedbd.params import is_weight, join, layout_of, misfit
from fedbd.sums import Row, to_row
from fedbd.weighing import Weighing

SECURE = "fedbd.secure"
"""Name of the ConfigRecord that asks for an encrypted reply, and says how."""
CIPHERTEXT = "fedbd.ciphertext"
"""Name of the ArrayRecord that holds the encrypted row."""
AGENT = "fedbd-key-agent"
"""Key of the node config that holds the key agent's handle; else the environment variable FEDBD_KEY_AGENT."""


def protocol_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer protocol messages; encrypt the reply to a train message that asks for it.

    Args:
        message: What came from the strategy.
        context: The client's context; its node config holds the partition and the key agent's handle.
        call_next: The app, or the next mod.
    """
    if PROTOCOL in message.content:
        return Message(_answer(message.content, context), reply_to=message)
    if SECURE not in message.content:
        return call_next(message, context)
    secure = dict(message.content[SECURE])
    start = view_all(next(iter(records_of(message.content, ArrayRecord).values())))
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    return Message(_encrypted(start, reply.content, secure, context), reply_to=message)


def _answer(content: RecordDict, context: Context) -> RecordDict:
    kind = str(content[PROTOCOL]["kind"])
    if kind == "identity":
        identity: dict[str, Any] = {"kind": kind, "partition-id": int(context.node_config["partition-id"])}
        return RecordDict({PROTOCOL: ConfigRecord(identity)})
    if kind != "decrypt":
        raise ClientFailed(f"unknown protocol message '{kind}'")
    blobs = view_all(records_of(content, ArrayRecord)[CIPHERTEXT])
    agent = KeyAgent(_handle(context))
    try:
        sums = {name: agent.decrypt(blob.tobytes()) for name, blob in blobs.items()}
    finally:
        agent.close()
    noise = max((error for _, error in sums.values()), default=0.0)
    return RecordDict(
        {
            PROTOCOL: ConfigRecord({"kind": kind}),
            CIPHERTEXT: pack_all({name: total for name, (total, _) in sums.items()}),
            "noise": MetricRecord({"largest": noise}),
        }
    )


def _encrypted(start: dict[str, Any], content: RecordDict, secure: dict[str, Any], context: Context) -> RecordDict:
    end = view_all(next(iter(records_of(content, ArrayRecord).values())))
    layout = layout_of(start)
    weights = {name: array for name, array in end.items() if is_weight(array)}
    problem = misfit(weights, layout)
    if problem:
        raise ClientFailed(problem)
    weighing = Weighing(
        weighting=secure["weighting"], average_examples=secure["average-examples"], largest=secure["largest-weight"]
    )
    claimed: Any = 1
    if weighing.weighting == "examples":
        claimed = next(iter(records_of(content, MetricRecord).values()))["num-examples"]
    weight = weighing.weight(float(claimed))
    delta = join(weights, layout) - join(start, layout)
    row = to_row(delta, weight, float(secure["largest"]), int(secure["grid-bits"]))
    started = time.perf_counter()
    reply = encrypted_row(row, context)
    observe("encrypt", {"seconds": time.perf_counter() - started, "checksum": checksum(row)}, context, secure["round"])
    return reply


def encrypted_row(row: Row, context: Context) -> RecordDict:
    """Return the content of an encrypted reply: one row, (D + 1,) int64 in grid steps, encrypted by the key agent."""
    agent = KeyAgent(_handle(context))
    try:
        blob = agent.encrypt(row)
    finally:
        agent.close()
    return RecordDict({CIPHERTEXT: pack_all({"row": np.frombuffer(blob, np.uint8)})})


def _handle(context: Context) -> str:
    handle = str(context.node_config.get(AGENT) or os.environ.get("FEDBD_KEY_AGENT") or "")
    if not handle:
        raise SecureSumFailed(
            f"this client has no key agent; start one and set '{AGENT}' in the node config or FEDBD_KEY_AGENT"
        )
    return handle


def checksum(row: Row) -> int:
    """Return a linear checksum modulo 2^64: that of a sum is the sum of those of the rows.

    The recorder uses it to check, outside the protocol, that a decrypted sum is the exact sum of what clients sent.
    """
    factors = np.random.Generator(np.random.PCG64(row.size)).integers(1, 2**63, row.size, dtype=np.uint64) | np.uint64(
        1
    )
    with np.errstate(over="ignore"):
        return int(np.sum(row.astype(np.uint64) * factors, dtype=np.uint64))
