"""A ClientApp that really trains, on the libraries' global random state and threads as a naive app would."""

import random

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional

from .model import batch, build

app = ClientApp()


@app.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    seed = 1000 * int(message.content["config"]["server-round"]) + partition
    torch.manual_seed(seed)
    random.seed(seed)  # must not reach the server's sampling
    model = build()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = batch(partition)
    for _ in range(3):
        for index in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            functional.cross_entropy(functional.dropout(model(x[index]), 0.1), y[index]).backward()
            optimizer.step()
    metrics = MetricRecord({"num-examples": len(x), "threads": torch.get_num_threads()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    model = build()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = batch(context.node_config["partition-id"])
    with torch.no_grad():
        loss = float(functional.cross_entropy(model.eval()(x), y))
    metrics = MetricRecord({"num-examples": len(x), "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
