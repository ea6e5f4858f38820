"""The ClientApp: unpack the message, do the round, send the full local weights (Flower's convention)."""

from __future__ import annotations

import time
from typing import Any

import safetensors.numpy
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedbd.flower.arrays import SCENARIO, pack_all, view_all
from fedbd.flower.mods import protocol_mod
from fedbd.flower.observer import observe
from fedbd.params import is_weight, join, layout_of, split
from fedbd.prepared import START_ENTRIES, prepared_from_json

from . import faults
from .step import client_round

MEMORY = "fedbd.memory"
OWN = "fedbd.own"
"""Where a client keeps its own state entries (``batch_norm: local``) between rounds."""

app = ClientApp(mods=[faults.outer, protocol_mod, faults.inner])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's data.

    The message holds the global weights (``arrays``) and in ``config`` the round and the scenario; the reply holds the
    local weights, and ``num-examples`` as its only metric. ``proximal-mu``, which FedProx puts into ``config``, is the
    weight of the proximal term.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)  # more threads, other bits; parallelism comes from workers
    config = message.content["config"]
    prepared = prepared_from_json(str(config[SCENARIO]))
    round_, client = int(config["server-round"]), int(context.node_config["partition-id"])
    mu = float(config.get("proximal-mu", 0.0))
    arrays = view_all(message.content["arrays"])
    layout = layout_of(arrays)
    memory = {name: array.copy() for name, array in view_all(context.state.get(MEMORY, ArrayRecord())).items()}
    buffers = {name: array for name, array in arrays.items() if not is_weight(array)}
    own = own_entries(context, config.get(START_ENTRIES))
    result = client_round(prepared, client, round_, join(arrays, layout), memory, buffers, mu, own)
    for name, kept in ((MEMORY, result.memory), (OWN, result.own)):
        if kept:
            context.state[name] = pack_all(dict(kept))
    observe("train", {**result.notes, "seconds": time.perf_counter() - started}, context, round_)
    content = {
        "arrays": pack_all({**split(result.weights, layout), **buffers}),
        "metrics": MetricRecord({"num-examples": result.examples}),
    }
    return Message(RecordDict(content), reply_to=message)


def own_entries(context: Context, start: object) -> dict[str, NDArray[Any]] | None:
    """Return the state entries that the client kept, at first those of the start; None: those of a fresh model.

    Args:
        context: The client's.
        start: What the message holds of the start, as safetensors; None where the run starts from a fresh model.
    """
    if OWN in context.state:
        return {name: array.copy() for name, array in view_all(context.state.array_records[OWN]).items()}
    return safetensors.numpy.load(start) if isinstance(start, bytes) else None
