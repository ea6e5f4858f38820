"""What a server makes of clients that fail: reasons, replies that are lost, and the time that others get."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedbd.config.scenario import from_dict
from fedbd.defenses.aggregation.mean import Mean
from fedbd.errors import ClientFailed, RunFailed
from fedbd.flower.app_loader import load_component
from fedbd.flower.arrays import pack_all, payload_bytes, view_all
from fedbd.flower.executors import Executor, ProcessPoolExecutor, SerialExecutor
from fedbd.flower.failures import DIED, NO_REPLY, first_line, named, reason_in
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.outcome import Outcome
from fedbd.flower.proxies import LOST, OrderedGrid
from fedbd.flower.strategy import DefendedStrategy
from fedbd.running import engines
from fedbd.running.engines import flower_app_dir

OBEDIENT = (Path(__file__).parent / "toy_apps" / "obedient.py", "app")
START = {"w": np.zeros(5, np.float32)}


def error(code: int, reason: str) -> Message:
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    return Message(Error(code, reason), reply_to=request)


@pytest.fixture(autouse=True)
def _somebody() -> None:
    from fedbd.flower.compat import act_as

    act_as(1, 1)  # a message needs a sender


@pytest.mark.parametrize(
    ("code", "said", "line"),
    [
        (4, "timed out after 1 s", NO_REPLY),
        (3, "Message Unavailable", NO_REPLY),
        (8, "ClientApp stopped responding.", DIED),
        (2, "ValueError: no\n  File ...", "ValueError: no"),
        (5, "Node Unavailable", "Node Unavailable"),
    ],
)
def test_a_record_does_not_tell_the_engine_and_the_message_still_tells_all(code: int, said: str, line: str) -> None:
    reason = reason_in(error(code, said))
    assert first_line(reason) == line
    assert said in reason


def test_the_first_failed_clients_are_named_and_the_others_counted() -> None:
    failed = {client: f"reason {client}\nmore" for client in range(7)}
    assert named({}) == ""
    assert named({3: "a\nb"}) == "\n  client 3: a"
    assert named(failed).split("\n  ")[1:] == [*(f"client {c}: reason {c}" for c in range(5)), "and 2 more"]


def losing(lost: set[int]) -> ClientApp:
    """A client adds its number plus one; some replies are lost on their way."""
    toy = ClientApp()

    @toy.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if client in lost:
            return Message(RecordDict({LOST: ConfigRecord({"weight": 3})}), reply_to=message)
        arrays = {"w": view_all(message.content["arrays"])["w"] + client + 1}
        content = RecordDict({"arrays": pack_all(arrays), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return toy


def outcomes(toy: ClientApp, timeout: float, **fields: Any) -> list[Outcome]:
    seen: list[Outcome] = []
    strategy = DefendedStrategy(
        FedAvg(fraction_evaluate=0.0), Mean(), after_round=seen.append, timeout=timeout, **fields
    )
    with SerialExecutor(lambda: toy) as executor:
        strategy.start(LocalGrid(executor, 4), pack_all(START), num_rounds=1, timeout=timeout)
    return seen


def test_a_lost_reply_is_waited_for_and_leaves_nothing_behind() -> None:
    started = time.monotonic()
    (whole,) = outcomes(losing(set()), 30)
    assert time.monotonic() - started < 20  # nobody is waited for who has answered
    started = time.monotonic()
    (seen,) = outcomes(losing({1, 2}), 1.0, on_client_failure="skip")
    assert time.monotonic() - started >= 1.0
    assert (seen.accepted, set(seen.faults)) == ((0, 3), {1, 2})
    assert {first_line(reason) for reason in seen.faults.values()} == {NO_REPLY}
    np.testing.assert_allclose(seen.weights, 2.5, atol=2**-23)  # the mean of 1 and 4
    assert (
        seen.bytes_up
        == whole.bytes_up / 2
        == 2 * payload_bytes(RecordDict({"arrays": pack_all(START), "metrics": MetricRecord({"num-examples": 1})}))
    )


def test_a_lost_reply_ends_the_run_where_failures_do() -> None:
    with pytest.raises(ClientFailed, match=r"round 1: client 1: no reply in time\nwaited for 0.5 s"):
        outcomes(losing({1}), 0.5)


def test_where_nobody_is_left_the_reasons_are_told() -> None:
    with pytest.raises(ClientFailed, match=r"no client is left of 4\n  client 0: no reply in time\n  client 1"):
        outcomes(losing({0, 1, 2, 3}), 0.3, on_client_failure="skip")


def orders(grid: OrderedGrid, *told: dict[str, Any]) -> list[Message]:
    return [
        Message(RecordDict({"orders": ConfigRecord(what)}), node, "train")
        for node, what in zip(grid.get_node_ids(), told, strict=True)
    ]


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(OBEDIENT, 1, timeout=2.0) as executor:
        yield executor


ANSWER = {"do": "answer"}


def test_replacing_a_worker_does_not_cost_the_clients_behind_it_their_turn(pool: ProcessPoolExecutor) -> None:
    grid = OrderedGrid(LocalGrid(pool, 4), 4)
    slow = {"do": "sleep", "seconds": 60.0}
    replies = grid.send_and_receive(orders(grid, slow, slow, ANSWER, ANSWER), timeout=2.0)
    assert [reply.has_error() for reply in replies] == [True, True, False, False]
    assert {first_line(reason_in(reply)) for reply in replies[:2]} == {NO_REPLY}


def test_a_serial_client_gets_its_turn_however_slow_the_others_were() -> None:
    with SerialExecutor(OBEDIENT) as executor:
        grid = OrderedGrid(LocalGrid(executor, 3), 3)
        slow = {"do": "sleep", "seconds": 0.3}
        replies = grid.send_and_receive(orders(grid, slow, slow, ANSWER), timeout=0.1)
    assert [reply.has_error() for reply in replies] == [False, False, False]


class Gathering(LocalGrid):
    """A grid whose nodes come one by one, as SuperNodes do."""

    def __init__(self, come: list[int]) -> None:
        self.come = come

    def get_node_ids(self) -> list[int]:
        return list(range(self.come.pop(0) if len(self.come) > 1 else self.come[0]))


def test_what_is_waited_for_is_said_at_once_and_whenever_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    assert len(OrderedGrid(Gathering([0, 1, 1, 2, 3]), 3, patience=60)._wait_for_nodes()) == 3
    said = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert said == [f"waiting for 3 SuperNodes, {count} connected" for count in range(3)]
    caplog.clear()
    with pytest.raises(RunFailed, match=r"only 1 of 3 SuperNodes connected within 0\.1 s; start one SuperNode for"):
        OrderedGrid(Gathering([1]), 3, patience=0.1)._wait_for_nodes()
    assert len(caplog.records) == 1
    caplog.clear()
    assert len(OrderedGrid(Gathering([2]), 2)._wait_for_nodes()) == 2
    assert caplog.records == []


def test_an_executor_that_does_not_keep_time_is_not_waited_for() -> None:
    with ProcessPoolExecutor(OBEDIENT, 1) as executor:
        grid = OrderedGrid(LocalGrid(executor, 2), 2)
        grid.send_and_receive(orders(grid, ANSWER, ANSWER), timeout=60.0)
        slow = {"do": "sleep", "seconds": 60.0}
        replies = grid.send_and_receive(orders(grid, slow, ANSWER), timeout=1.0)
    assert replies == []  # the second waits behind the first


@pytest.mark.parametrize(
    ("make", "keeps"),
    [
        (lambda: SerialExecutor(OBEDIENT), True),
        (lambda: ProcessPoolExecutor(OBEDIENT, 1, timeout=5.0), True),
        (lambda: ProcessPoolExecutor(OBEDIENT, 1), False),
    ],
    ids=["serial", "with a timeout", "without one"],
)
def test_who_keeps_time(make: Any, keeps: bool) -> None:
    executor: Executor = make()
    assert LocalGrid(executor, 1).keeps_time is keeps
    executor.close()


def test_the_server_is_as_patient_as_the_clients_turns_need() -> None:
    patience: Any = load_component(flower_app_dir(), "server", "app", "patience")
    raw = {"name": "p", "rounds": 1, "data": "digits", "model": "mlp", "cohort": {"size": 7}}

    def seconds(**engine: Any) -> float:
        found: float = patience(from_dict({**raw, "engine": {"timeout": 10, **engine}}))
        return found

    assert seconds(workers=2) == seconds(name="ray", workers=2) == 40  # ceil(7 / 2) turns
    assert seconds(workers=7) == 10
    assert seconds(executor="serial") == 70  # one after the other, however many cores there are


def test_a_runtime_that_outlives_its_run_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LINGER", 0.1)
    polls: list[int] = []
    (tmp_path / "summary.json").write_text("{}")  # of the run that is taken up again
    look = engines._ending(tmp_path, lambda: polls.append(1))
    look()
    time.sleep(0.2)
    look()
    time.sleep(0.02)  # file times have a resolution
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    look()
    time.sleep(0.2)
    with pytest.raises(engines._Lingers):
        look()
    assert len(polls) == 4
    engines._ending(tmp_path / "none yet", None)()
