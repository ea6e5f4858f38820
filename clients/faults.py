"""Simulated faults, acted out where real ones happen: around the app, so that they cross the real protocol.

Two mods: ``outer`` stands around encryption and decryption, ``inner`` between them and the app. A client knows its own
faults from the scenario (``fedbd.faults``); what the server gets tells it no more than a real failure would.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedbd.faults import fault_of
from fedbd.flower.arrays import SCENARIO, pack, pack_all, view, view_all
from fedbd.flower.client_call import reason_of
from fedbd.flower.cloning import clone
from fedbd.flower.compat import ErrorCode
from fedbd.flower.mods import CIPHERTEXT, SECURE, encrypted_row
from fedbd.flower.proxies import LOST, PROTOCOL
from fedbd.params import is_weight, layout_of
from fedbd.prepared import prepared_from_json
from fedbd.seeding import numpy_rng

AT_DECRYPTION = "fedbd.fault"
"""Name of the record in a client's state: the fault that it has if it is asked to decrypt in this round."""
HUGE = 10**9


def outer(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let a client fail before it trains, at its encrypted reply or at an opened sum; report what it raises.

    Flower's runtimes word a client's error differently; a reply that carries it reads the same on all of them. The
    client's state is rolled back, as they do.
    """
    before = clone(context.state)
    try:
        if PROTOCOL in message.content:
            return _answered(message, context, call_next)
        return _trained(message, context, call_next)
    except (Exception, SystemExit) as error:
        context.state = before
        return Message(Error(int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reason_of(error)), reply_to=message)


def inner(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Spoil the app's reply: full local weights and metrics, before any encryption."""
    reply = call_next(message, context)
    kind = _fault(message, context, "train")
    if kind is not None and reply.has_content():
        _spoil_weights(kind, reply.content)
    return reply


def _fault(message: Message, context: Context, stage: str) -> str | None:
    config = message.content["config"]
    text = str(config[SCENARIO])
    if '"faults"' not in text:  # most runs have none, and nothing to be loaded before the app does
        return None
    scenario = prepared_from_json(text).scenario
    client = int(context.node_config["partition-id"])
    return fault_of(scenario, int(config["server-round"]), client, stage)


def _trained(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    context.state.pop(AT_DECRYPTION, None)
    kind = _fault(message, context, "train")
    if kind in STOPS:
        return STOPS[kind](message)
    reply = call_next(message, context)
    if SECURE not in message.content or reply.has_error():
        return reply
    kind = _fault(message, context, "encrypt")
    if kind in STOPS:
        return STOPS[kind](message)
    if kind is not None:
        values = layout_of(view_all(message.content["arrays"])).size + 1
        _spoil_ciphertext(kind, reply.content, values, context)
    later = _fault(message, context, "decrypt")
    if later is not None:  # the request to decrypt names neither round nor scenario
        context.state[AT_DECRYPTION] = pack_all({later: np.zeros(0, np.uint8)})
    return reply


def _answered(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    asked = str(message.content[PROTOCOL]["kind"]) == "decrypt"
    kind = next(iter(context.state.get(AT_DECRYPTION, ArrayRecord())), None) if asked else None
    if kind in STOPS:
        return STOPS[kind](message)
    reply = call_next(message, context)
    if kind is not None and reply.has_content():
        _spoil_sums(kind, reply.content)
    return reply


def _vanish(message: Message) -> Message:
    return Message(RecordDict({LOST: ConfigRecord({})}), reply_to=message)


def _hang(message: Message) -> NoReturn:
    del message
    while True:
        time.sleep(3600)


def _die(message: Message) -> NoReturn:
    del message
    os._exit(1)


def _raise(message: Message) -> NoReturn:
    del message
    raise RuntimeError("a simulated fault")


STOPS: dict[str | None, Callable[[Message], Message]] = {
    "vanish": _vanish,
    "hang": _hang,
    "die": _die,
    "raise": _raise,
}
"""Kinds after which there is no reply of the client's own."""


def _spoil_weights(kind: str, content: RecordDict) -> None:
    record = content.array_records["arrays"]
    name, array = next(
        (name, array) for name, array in view_all(record).items() if is_weight(array) and array.ndim and array.size > 1
    )
    if kind == "nan":
        spoiled = array.copy()
        spoiled.flat[0], spoiled.flat[-1] = np.nan, np.inf
        record[name] = pack(spoiled)
    elif kind == "wrong_shape":
        record[name] = pack(array[0])  # broadcasts silently where nobody looks
    elif kind == "renamed":
        record[f"{name}.renamed"] = record.pop(name)
    elif kind == "garbage":
        record[name] = _rubbish(record[name])
    else:
        _spoil_metrics(kind, content)


def _spoil_metrics(kind: str, content: RecordDict) -> None:
    if kind == "huge_count":
        content.metric_records["metrics"]["num-examples"] = HUGE
    elif "metrics" in content:
        content.metric_records["metrics"]["surprise"] = 1.0
    else:
        content["surprise"] = MetricRecord({"surprise": 1.0})


def _spoil_ciphertext(kind: str, content: RecordDict, values: int, context: Context) -> None:
    record = content.array_records[CIPHERTEXT]
    if kind == "wrong_shape":
        content[CIPHERTEXT] = encrypted_row(np.zeros(values + 3, np.int64), context)[CIPHERTEXT]
    elif kind == "renamed":
        record["renamed"] = record.pop("row")
    elif kind == "garbage":
        size = view(record["row"]).size
        record["row"] = pack(np.frombuffer(_random(size), np.uint8))
    else:
        _spoil_metrics(kind, content)


def _spoil_sums(kind: str, content: RecordDict) -> None:
    record = content.array_records[CIPHERTEXT]
    for name in list(record):
        if kind == "wrong_shape":
            record[name] = pack(view(record[name])[:-1])
        elif kind == "renamed":
            record[f"{name}.renamed"] = record.pop(name)
        elif kind == "garbage":
            record[name] = _rubbish(record[name])
    if kind == "extra_metric":
        _spoil_metrics(kind, content)


def _rubbish(array: Array) -> Array:
    """Return an array that says what it was, with random bytes for its data."""
    return Array(array.dtype, tuple(array.shape), array.stype, _random(len(array.data)))


def _random(size: int) -> bytes:
    return numpy_rng(0, "garbage", size).bytes(size)
