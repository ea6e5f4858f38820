"""A ClientApp that does nothing: it sends the global weights back, so that whatever takes time or memory is the engine.

With ``protocol_mod``, so that ``benchmarks/scale.py`` can let it answer under encryption, too.
"""

from __future__ import annotations

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbd.flower.arrays import pack_all, view_all
from fedbd.flower.mods import protocol_mod

app = ClientApp(mods=[protocol_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the weights that came, as new bytes: a trained model is never the one that was sent."""
    arrays = {name: array.copy() for name, array in view_all(message.content["arrays"]).items()}
    content = RecordDict({"arrays": pack_all(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
