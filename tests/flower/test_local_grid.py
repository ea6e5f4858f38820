"""LocalGrid, on an executor that the test plays itself and on the serial one."""

import random
import time
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedbd.errors import UserError
from fedbd.flower import compat
from fedbd.flower.client_call import Outcome
from fedbd.flower.cloning import clone
from fedbd.flower.compat import ErrorCode
from fedbd.flower.executors import SerialExecutor
from fedbd.flower.local_grid import FIRST_NODE, SERVER_NODE, LocalGrid

OBEDIENT = (Path(__file__).parent / "toy_apps" / "obedient.py", "app")


class ByHand:
    """An executor whose clients answer when, and in what order, the test says."""

    def __init__(self):
        self.futures, self.contexts, self.messages, self.dropped = [], [], [], []

    def submit(self, message, context):
        self.messages.append(message)
        self.contexts.append(context)
        self.futures.append(Future())
        return self.futures[-1]

    def finish(self, k, **state):
        content = RecordDict({"answer": ConfigRecord({"k": k})})
        reply = Message(content, reply_to=self.messages[k])
        self.futures[k].set_result(Outcome(reply, RecordDict({"state": ConfigRecord(state)})))

    def advance(self):
        return False

    def drop(self, future):
        self.dropped.append(self.futures.index(future))

    def close(self):
        pass


@pytest.fixture
def by_hand():
    return ByHand()


@pytest.fixture
def grid():
    return LocalGrid(SerialExecutor(OBEDIENT), 6, run_config={"rounds": 3})


def order(node, do="answer", message_type="train", **orders):
    return Message(RecordDict({"orders": ConfigRecord({"do": do, **orders})}), node, message_type)


def ks(replies):
    return [reply.content["answer"]["k"] for reply in replies]


def test_nodes_are_partitions_in_order(grid):
    assert grid.get_node_ids() == [1000, 1001, 1002, 1003, 1004, 1005]
    assert [grid.partition_of(node) for node in grid.get_node_ids()] == [0, 1, 2, 3, 4, 5]
    for stranger in (999, 1006, SERVER_NODE):
        with pytest.raises(KeyError, match=str(stranger)):
            grid.partition_of(stranger)
    assert [info.node_id for info in grid.get_nodes()] == grid.get_node_ids()


def test_replies_stand_in_the_order_of_the_messages(by_hand):
    grid = LocalGrid(by_hand, 3)
    ids = grid.push_messages([order(1002), order(1000), order(1001)])
    for k in (1, 2, 0):
        by_hand.finish(k)
    assert ks(grid.pull_messages(ids)) == [0, 1, 2]
    assert grid.pull_messages(ids) == []  # each reply is given out once


def test_send_and_receive_orders_replies_that_come_in_another_order():
    class Backwards(ByHand):
        def submit(self, message, context):
            future = super().submit(message, context)
            if len(self.futures) == 3:
                for k in (2, 1, 0):
                    self.finish(k)
            return future

    replies = LocalGrid(Backwards(), 3).send_and_receive([order(1001), order(1002), order(1000)])
    assert ks(replies) == [0, 1, 2]
    assert [reply.metadata.src_node_id for reply in replies] == [1001, 1002, 1000]


def test_pull_returns_what_is_done_and_never_waits(by_hand):
    grid = LocalGrid(by_hand, 4)
    ids = grid.push_messages([order(node) for node in grid.get_node_ids()])
    assert grid.pull_messages(ids) == []
    by_hand.finish(2)
    assert ks(grid.pull_messages(ids)) == [2]  # although the first one is unfinished
    by_hand.finish(3)
    assert grid.pull_messages(ids[:2]) == []  # 3 was not asked for, and waits
    by_hand.finish(0)
    assert ks(grid.pull_messages(ids)) == [0, 3]


def test_wait_ends_with_the_first_reply_or_the_timeout(by_hand):
    grid = LocalGrid(by_hand, 2)
    ids = grid.push_messages([order(1000), order(1001)])
    start = time.monotonic()
    assert not grid.wait(ids, 0.05)
    assert 0.05 <= time.monotonic() - start < 1
    by_hand.finish(1)
    assert grid.wait(ids, 5)
    assert not grid.wait(ids[:1], 0)
    assert not grid.wait(["never-sent"])
    assert ks(grid.pull_messages(ids)) == [1]


def test_after_a_timeout_late_replies_and_their_states_are_dropped():
    class FirstAnswers(ByHand):
        def submit(self, message, context):
            future = super().submit(message, context)
            if len(self.futures) == 1:
                self.finish(0, visits=1)
            return future

    executor = FirstAnswers()
    grid = LocalGrid(executor, 3)
    assert ks(grid.send_and_receive([order(1000), order(1001)], timeout=0.05)) == [0]
    assert executor.dropped == [1]
    executor.finish(1, visits=1)
    assert not grid.wait([executor.messages[1].metadata.message_id], 0)
    grid.push_messages([order(1001)])
    assert set(grid.client_states()) == {0}
    assert dict(executor.contexts[2].state) == {}


def test_end_batch_gives_up_what_was_not_pulled(by_hand):
    grid = LocalGrid(by_hand, 3)
    ids = grid.push_messages([order(1000), order(1001), order(1001), order(1002)])
    by_hand.finish(0)
    grid.wait(ids)
    grid.end_batch()
    assert by_hand.dropped == [1, 2]
    by_hand.finish(1)
    by_hand.finish(2)
    assert grid.pull_messages(ids) == []
    assert len(by_hand.futures) == 3  # the second message to node 1001 never started


def test_a_client_answers_one_message_at_a_time(by_hand):
    grid = LocalGrid(by_hand, 2)
    ids = grid.push_messages([order(1000), order(1000), order(1001)])
    assert [message.metadata.dst_node_id for message in by_hand.messages] == [1000, 1001]
    by_hand.finish(0, visits=7)
    assert len(grid.pull_messages(ids)) == 1
    assert by_hand.messages[2].metadata.message_id == ids[1]
    assert by_hand.contexts[2].state["state"]["visits"] == 7


def test_a_client_sees_its_own_earlier_message_of_the_same_batch(grid):
    replies = grid.send_and_receive([order(1000), order(1001), order(1000)])
    assert [reply.content["answer"]["visits"] for reply in replies] == [1, 1, 2]


def test_state_is_kept_on_success_and_rolled_back_on_an_exception(grid):
    answers = []
    for do in ("answer", "raise", "leave", "answer"):
        [reply] = grid.send_and_receive([order(1003, do)])
        answers.append(reply.content["answer"]["visits"] if reply.has_content() else reply.error.code)
    assert answers == [1, 2, 2, 2]  # 2 is also CLIENT_APP_RAISED_EXCEPTION
    assert set(grid.client_states()) == {3}


def test_an_exception_becomes_an_error_with_type_message_and_three_frames(grid):
    [reply] = grid.send_and_receive([order(1000, "raise")])
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason.startswith("ValueError: no such luck\n")
    assert reply.error.reason.count('File "') == 3
    assert reply.error.reason.count("in fail") == 3
    assert reply.metadata.src_node_id == 1000


def test_an_error_of_fedbd_is_its_message(grid):
    [reply] = grid.send_and_receive([order(1000, "refuse")])
    assert reply.error.reason == "aggregation.krum: 3 rows; use more clients"


@pytest.mark.parametrize(
    ("do", "reason"),
    [("wrong type", "returned dict; it must return a Message"), ("no reply", "reply_to"), ("leave", "SystemExit: 3")],
)
def test_a_handler_that_gives_no_reply_gives_an_error(grid, do, reason):
    [reply] = grid.send_and_receive([order(1000, do)])
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reason in reply.error.reason


def test_an_unknown_node_or_action_gives_an_error_and_disturbs_nobody(grid):
    replies = grid.send_and_receive([order(1006), order(1001), order(1000, message_type="train.unheard_of")])
    assert replies[0].error.code == ErrorCode.NODE_UNAVAILABLE
    assert "1006" in replies[0].error.reason
    assert replies[1].content["answer"]["partition"] == 1
    assert "unheard_of" in replies[2].error.reason


def test_what_a_handler_does_to_its_message_reaches_nobody_else(grid):
    weights = np.arange(4.0)
    shared = RecordDict(
        {"orders": ConfigRecord({"do": "mutate", "list": [1, 2]}), "arrays": ArrayRecord({"w": Array(weights)})}
    )
    replies = grid.send_and_receive([Message(shared, node, "train") for node in grid.get_node_ids()])
    assert all(reply.has_content() for reply in replies)
    assert shared["orders"] == ConfigRecord({"do": "mutate", "list": [1, 2]})
    np.testing.assert_array_equal(shared["arrays"]["w"].numpy(), weights)


def test_what_the_server_does_to_a_reply_does_not_reach_the_state(grid):
    [reply] = grid.send_and_receive([order(1000, "share state")])
    reply.content["kept"].clear()  # as FedMedian does
    [kept] = grid.client_states()[0]["kept"].values()
    np.testing.assert_array_equal(kept.numpy(), np.arange(3.0))


def test_what_an_app_does_to_records_it_kept_reaches_nobody(grid):
    replies = grid.send_and_receive([order(1000, "hoard"), order(1001, "hoard")])
    assert [reply.content["answer"]["partition"] for reply in replies] == [0, 1]
    assert [state["visits"]["count"] for state in grid.client_states().values()] == [1, 1]


def test_clone_shares_bytes_and_nothing_else():
    array = Array(np.arange(3.0))
    records = RecordDict(
        {"a": ArrayRecord({"w": array}), "c": ConfigRecord({"l": [1]}), "m": MetricRecord({"l": [1.0], "x": 2})}
    )
    copied = clone(records)
    assert copied == records
    assert copied["a"]["w"].data is array.data
    assert copied["a"]["w"] is not array
    copied["c"]["l"].append(2)
    copied["m"]["l"].append(2.0)
    del copied["a"]
    assert records["c"]["l"] == [1]
    assert records["m"]["l"] == [1.0]
    assert "a" in records


def test_mods_queries_and_configs_reach_the_app(grid):
    messages = [order(1004, message_type=kind) for kind in ("train.with_mod", "query.partition", "evaluate")]
    with_mod, query, evaluate = grid.send_and_receive(messages)
    assert with_mod.content["mod"]["ran"]
    assert query.content["answer"]["partition"] == 4
    assert dict(evaluate.content["config"]) == {"rounds": 3, "node-partition-id": 4, "node-num-partitions": 6}


def test_reply_metadata_point_back_at_the_message(grid):
    message = grid.create_message(order(1002).content, "train", 1002, "round-7")
    [reply] = grid.send_and_receive([message])
    assert message.metadata.message_id
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.metadata.message_id not in ("", message.metadata.message_id)
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (1002, SERVER_NODE)
    assert reply.metadata.group_id == "round-7"


def test_clients_that_no_message_reaches_cost_nothing(by_hand):
    asked = []

    def node_config(partition):
        asked.append(partition)
        return {"name": f"client {partition}"}

    tracemalloc.start()
    grid = LocalGrid(by_hand, 10_000, node_config=node_config)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 20_000  # a Context alone takes about 1,000 bytes
    assert len(grid.get_node_ids()) == 10_000
    ids = grid.push_messages([order(FIRST_NODE + 9_999), order(FIRST_NODE + 5)])
    by_hand.finish(0)
    by_hand.finish(1)
    grid.pull_messages(ids)
    grid.push_messages([order(FIRST_NODE + 5)])
    assert asked == [9_999, 5]
    assert by_hand.contexts[0].node_config == {"partition-id": 9_999, "num-partitions": 10_000, "name": "client 9999"}


def test_client_states_can_be_taken_to_another_grid(grid):
    grid.send_and_receive([order(1000), order(1004)])
    grid.send_and_receive([order(1004)])
    states = grid.client_states()
    other = LocalGrid(SerialExecutor(OBEDIENT), 6)
    other.restore_client_states(states)
    states[4]["visits"]["count"] = 99
    replies = other.send_and_receive([order(1004), order(1000), order(1001)])
    assert [reply.content["answer"]["visits"] for reply in replies] == [3, 2, 1]


def test_the_serial_executor_works_only_until_a_pull_has_a_reply(grid):
    ids = grid.push_messages([order(node) for node in grid.get_node_ids()])
    done = []
    for _ in ids:
        [reply] = grid.pull_messages(ids)
        done.append(reply.content["answer"]["visits-of-process"])
    assert done == list(range(done[0], done[0] + 6))
    assert grid.pull_messages(ids) == []


def test_the_serial_executor_stops_at_the_timeout(grid):
    start = time.monotonic()
    replies = grid.send_and_receive([order(node, "sleep", seconds=0.2) for node in grid.get_node_ids()], timeout=0.3)
    assert time.monotonic() - start < 1
    assert len(replies) == 2
    assert set(grid.client_states()) == {0, 1}


def test_clients_in_this_process_leave_the_servers_random_state_alone(grid):
    random.seed(1)
    expected = [random.random() for _ in range(2)]
    random.seed(1)
    first = random.random()
    draws = [reply.content["answer"]["draw"] for reply in grid.send_and_receive([order(1000), order(1001)])]
    assert [first, random.random()] == expected
    assert draws[0] != draws[1]


def test_the_run_is_known(grid):
    assert grid.run.run_id == 1
    assert LocalGrid(ByHand(), 1, run_id=5).run.run_id == 5
    grid.set_run("another")
    assert grid.run == "another"


def test_a_grid_needs_a_client(by_hand):
    with pytest.raises(UserError, match="clients: must be >= 1, got 0"):
        LocalGrid(by_hand, 0)


def test_error_codes_are_flowers():
    from flwr.common.constant import ErrorCode as Flowers

    assert {code.name: code.value for code in ErrorCode} == {
        code.name: getattr(Flowers, code.name) for code in ErrorCode
    }


def test_messages_made_by_a_client_come_from_it():
    compat.act_as(1, SERVER_NODE)
    with compat.acting_as(1, 1003):
        assert order(1000).metadata.src_node_id == 1003
    assert order(1000).metadata.src_node_id == SERVER_NODE
