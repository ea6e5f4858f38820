"""A ClientApp that does what the message says: what an engine must cope with."""

import contextlib
import os
import random
import signal
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbd.errors import MethodRefused


def _mark(message, context, call_next):
    reply = call_next(message, context)
    reply.content["mod"] = ConfigRecord({"ran": True})
    return reply


app = ClientApp()
_visits_of_this_process = []
_hoard = []


@app.train()
def train(message, context):
    orders = message.content["orders"]
    state = context.state.setdefault("visits", MetricRecord({"count": 0}))
    state["count"] += 1
    _visits_of_this_process.append(1)
    return DEEDS[orders["do"]](message, context, orders)


def answer(message, context, orders):
    answer = {
        "visits": context.state["visits"]["count"],
        "partition": context.node_config["partition-id"],
        "process": os.getpid(),
        "visits-of-process": len(_visits_of_this_process),
        "draw": random.random(),
    }
    return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)


def fail(message, context, orders, depth=6):
    if depth == 0:
        raise ValueError("no such luck")
    fail(message, context, orders, depth - 1)


def refuse(message, context, orders):
    raise MethodRefused("aggregation.krum: 3 rows; use more clients")


def sleep(message, context, orders):
    time.sleep(orders["seconds"])
    return answer(message, context, orders)


def mutate(message, context, orders):
    del message.content["orders"]
    orders["do"] = "mutated"
    orders["list"].append(9)
    for array in message.content["arrays"].values():
        array.data = b"mutated"
    message.content["arrays"].clear()
    return Message(RecordDict(), reply_to=message)


def share_state(message, context, orders):
    context.state["kept"] = ArrayRecord([np.arange(3.0)])
    return Message(RecordDict({"kept": context.state["kept"]}), reply_to=message)


def hoard(message, context, orders):
    for records in _hoard:
        records.clear()
    reply = answer(message, context, orders)
    _hoard.extend([reply.content, reply.content["answer"], context.state, context.state["visits"]])
    return reply


def environment(message, context, orders):
    time.sleep(orders["seconds"])
    names = {name: os.environ.get(name, "") for name in orders["names"]}
    return Message(RecordDict({"environment": ConfigRecord(names)}), reply_to=message)


def echo_arrays(message, context, orders):
    context.state["last"] = message.content["arrays"]
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


def add_one(message, context, orders):
    arrays = [array.numpy() + 1 for array in message.content["arrays"].values()]
    return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)


DEEDS = {
    "answer": answer,
    "raise": fail,
    "refuse": refuse,
    "leave": lambda message, context, orders: sys.exit(3),
    "exit": lambda message, context, orders: os._exit(7),
    "killed": lambda message, context, orders: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda message, context, orders: time.sleep(600),
    "sleep": sleep,
    "wrong type": lambda message, context, orders: {"not": "a message"},
    "no reply": lambda message, context, orders: message,
    "mutate": mutate,
    "share state": share_state,
    "hoard": hoard,
    "environment": environment,
    "echo arrays": echo_arrays,
    "add one": add_one,
}


@app.train("with_mod", mods=[_mark])
def train_with_mod(message, context):
    return Message(RecordDict(), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    config = {**context.run_config, **{f"node-{key}": value for key, value in context.node_config.items()}}
    return Message(RecordDict({"config": ConfigRecord(config)}), reply_to=message)


@app.query("family")
def family(message, context):
    """Die, and leave a child behind that holds the pipe to the driver open."""
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            time.sleep(message.content["orders"]["seconds"])
        os._exit(0)
    os._exit(9)


@app.query("partition")
def partition(message, context):
    content = RecordDict({"answer": ConfigRecord({"partition": context.node_config["partition-id"]})})
    return Message(content, reply_to=message)
