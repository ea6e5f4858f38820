"""A client that answers with a number and says where it runs."""

import json
import os
import sys

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .answer import answer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    if context.run_config["fail"] == "client":
        raise ValueError(f"client {partition} fails as told")
    if context.run_config["fail"] == "client dies":
        os.kill(os.getpid(), 9)
    where = {
        "file": __file__,
        "pid": os.getpid(),
        "python": sys.prefix,
        "cwd": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("TOY_")},
        "node_config": dict(context.node_config),
        "message": context.run_config["message"],
    }
    records = RecordDict(
        {
            "answer": MetricRecord({"value": answer(int(message.content["task"]["round"]), partition)}),
            "where": ConfigRecord({"json": json.dumps(where)}),
        }
    )
    return Message(records, reply_to=message)
