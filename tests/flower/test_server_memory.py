"""What the server holds during a round: as much for a hundred clients as for ten."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedbd.defenses.aggregation.mean import Mean
from fedbd.defenses.aggregation.median import Median
from fedbd.flower.arrays import pack_all, view_all
from fedbd.flower.client_call import Outcome, run_client
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.proxies import OrderedGrid
from fedbd.flower.strategy import DefendedStrategy
from fedbd.types import Aggregator

SIZE = 100_000
"""Weights of the model: 400 kB a reply."""


def steps() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array + 1 for name, array in view_all(message.content["arrays"]).items()}
        content = RecordDict({"arrays": pack_all(arrays), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


class AtOnce:
    """An executor that answers a message the moment it gets it: no client can be further ahead of the server."""

    def __init__(self, width: int | None, on_submit: Callable[[], None] = lambda: None) -> None:
        self.app, self.width, self.on_submit = steps(), width, on_submit

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        self.on_submit()
        future: Future[Outcome] = Future()
        future.set_result(run_client(self.app, message, context))
        return future

    def advance(self) -> bool:
        return False

    def drop(self, future: Future[Outcome]) -> None:
        raise AssertionError("nothing is given up")

    def close(self) -> None:
        pass


def most_bytes(clients: int, rule: Aggregator, width: int | None = 2) -> int:
    """Return the most bytes that Python and NumPy held at once in a round, beyond those before it."""
    grid = LocalGrid(AtOnce(width), clients)
    strategy = DefendedStrategy(FedAvg(fraction_evaluate=0.0), aggregation=rule, clients=clients)
    start = pack_all({"w": np.zeros(SIZE, np.float32)})
    gc.collect()
    tracemalloc.start()
    try:
        end = strategy.start(grid, start, num_rounds=1).arrays
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(view_all(end)["w"], np.ones(SIZE, np.float32))
    return peak


def test_a_mean_takes_no_more_for_more_clients() -> None:
    few = max(most_bytes(10, Mean()) for _ in range(2))  # the first one fills caches
    assert most_bytes(60, Mean()) - few < 4 * SIZE  # not even one reply more


def test_what_would_grow_is_seen_by_this_measure() -> None:
    """Single rows are kept by a rule that compares them; and without a bound, clients run ahead of the fold."""
    assert most_bytes(40, Median()) - most_bytes(10, Median()) > 30 * 4 * SIZE
    assert most_bytes(40, Mean(), width=None) - most_bytes(10, Mean(), width=None) > 20 * 4 * SIZE


@pytest.mark.parametrize(("width", "expected"), [(3, 6), (1, 2), (None, 20)])
def test_as_many_messages_are_under_way_as_keep_the_executor_busy(width: int | None, expected: int) -> None:
    under_way: list[int] = [0]
    seen: list[int] = []

    def submitted() -> None:
        under_way[0] += 1
        seen.append(under_way[0])

    def folded(client: int, reply: Message) -> Message:
        under_way[0] -= 1
        return reply

    grid = OrderedGrid(LocalGrid(AtOnce(width, submitted), 20), 20)
    grid.on_reply = folded
    content = RecordDict({"arrays": pack_all({"w": np.zeros(3, np.float32)})})
    messages = [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    assert len(grid.send_and_receive(messages)) == 20
    assert max(seen) == expected + (width is not None)  # the next one goes out before a reply is folded
