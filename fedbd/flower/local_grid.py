"""Flower's Grid in one process: any ServerApp, Strategy and ClientApp, without Ray, sockets or a SuperLink.

Clients are partitions 0 .. N - 1 of nodes whose ids never change, so nothing has to be asked for and nothing is random.
Who computes is the executor's matter (``fedbd.flower.executors``). Messages, replies and client states are copied, but
for the bytes of arrays, which are immutable: what one side does to its records never reaches the other.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedbd.errors import Problem, UserError
from fedbd.flower import compat
from fedbd.flower.client_call import Outcome, failure
from fedbd.flower.cloning import clone
from fedbd.flower.executors import Executor

SERVER_NODE = 1
"""The server's node id, as in Flower's own runtimes."""

FIRST_NODE = 1000
"""The node id of partition 0; the others follow."""

Config = Mapping[str, bool | int | float | str]


@dataclass
class _Flight:
    """A message that has no outcome yet; it has no future either while its client is busy with an earlier one."""

    message: Message
    partition: int
    future: Future[Outcome] | None = None
    dropped: bool = False


class LocalGrid(Grid):
    """Flower's Grid over an executor of this machine.

    Replies come from ``send_and_receive`` in the order of the messages, one per message; whatever goes wrong with a
    client is a reply that carries an ``Error``. A client answers its messages one at a time, in the order in which they
    were pushed. Its ``Context`` is made when the first message reaches it, and its state is kept when its ClientApp
    returned a message (as in Flower's runtimes, also one with an ``Error``) and rolled back when it raised.

    Args:
        executor: Runs the clients; closing it is the caller's matter.
        clients: How many there are.
        run_config: Every client's ``context.run_config``.
        node_config: What ``context.node_config`` of a partition holds beside ``partition-id`` and ``num-partitions``.
        run_id: The id of the run.

    Raises:
        UserError: If there is no client.
    """

    def __init__(
        self,
        executor: Executor,
        clients: int,
        *,
        run_config: Config | None = None,
        node_config: Callable[[int], Config] | None = None,
        run_id: int = 1,
    ) -> None:
        """Take the executor; nothing is made for a client before a message reaches it."""
        if clients < 1:
            raise UserError([Problem(path="clients", expected="must be >= 1", got=str(clients))])
        self._executor = executor
        self._clients = clients
        self._run_config = dict(run_config or {})
        self._node_config = node_config
        self._run: Any = SimpleNamespace(run_id=run_id)
        self._run_id = run_id
        self._numbers = itertools.count(1)
        self._states: dict[int, RecordDict] = {}
        self._node_configs: dict[int, dict[str, Any]] = {}
        self._flights: dict[str, _Flight] = {}
        self._queues: dict[int, deque[str]] = {}  # by partition: the message that its client is at, and those behind it
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()  # filled by the executor's threads
        self._replies: dict[str, Message] = {}
        compat.act_as(run_id, SERVER_NODE)

    @property
    def window(self) -> int | None:
        """How many messages keep the executor busy while replies are being dealt with; None where it does not say."""
        width = getattr(self._executor, "width", None)
        return None if width is None else 2 * int(width)

    def peak_memory(self) -> int:
        """Return the most memory that one of the executor's processes held, in bytes; 0 where nobody can tell."""
        ask = getattr(self._executor, "peak_memory", None)
        return int(ask()) if ask is not None else 0

    def set_run(self, run: Any) -> None:
        """Keep what Flower calls a run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run; without ``set_run``, an object that has its ``run_id``."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message from the server."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def keeps_time(self) -> bool:
        """Whether every message has an outcome in time; see ``Executor``."""
        return getattr(self._executor, "keeps_time", False)

    def get_node_ids(self) -> list[int]:
        """Return the clients' node ids, in the order of their partitions."""
        return list(range(FIRST_NODE, FIRST_NODE + self._clients))

    def partition_of(self, node_id: int) -> int:
        """Return the partition of a node.

        Raises:
            KeyError: If there is no such node.
        """
        if not FIRST_NODE <= node_id < FIRST_NODE + self._clients:
            raise KeyError(f"no node {node_id}; nodes are {FIRST_NODE} to {FIRST_NODE + self._clients - 1}")
        return node_id - FIRST_NODE

    def client_states(self) -> dict[int, RecordDict]:
        """Return copies of the states of all clients that have one, by partition (for a checkpoint)."""
        return {partition: clone(state) for partition, state in sorted(self._states.items()) if state}

    def restore_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Put what ``client_states`` returned in place of all clients' states."""
        self._states = {partition: clone(state) for partition, state in states.items()}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return their ids, in the same order."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, in the order of the ids, each once; wait for none.

        An executor that works in this thread answers messages here, until there is a reply to return.
        """
        wanted = list(message_ids)
        self._land(0.0)
        while not any(message_id in self._replies for message_id in wanted) and self._executor.advance():
            self._land(0.0)
        return self._take(wanted)

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> bool:
        """Wait until ``pull_messages`` has a reply to one of the messages; return whether it has.

        Args:
            message_ids: Messages that were pushed.
            timeout: Seconds to wait at most; None: no limit.
        """
        wanted = set(message_ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._land(0.0)
        while wanted.isdisjoint(self._replies):
            left = None if deadline is None else deadline - time.monotonic()
            if wanted.isdisjoint(self._flights) or (left is not None and left <= 0):
                return False
            self._land(left)
        return True

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, wait for the replies and return them in the order of the messages.

        When ``timeout`` seconds are over, the replies that are missing are left out and given up for good.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        missing = set(ids) - self._replies.keys()
        while missing:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            missing.difference_update(self._land(left))
        self._drop(message_id for message_id in ids if message_id in missing)
        return self._take(ids)

    def end_batch(self) -> None:
        """Give up all messages whose replies were not pulled; one that arrives later is dropped, as is its state."""
        self._drop(list(self._flights))
        self._replies.clear()

    def _take(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def _push(self, message: Message) -> str:
        message_id = f"message-{next(self._numbers)}"
        compat.set_message_id(message, message_id)
        meta = message.metadata
        own = Message(
            clone(message.content), meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id or None
        )
        compat.set_message_id(own, message_id)
        try:
            partition = self.partition_of(meta.dst_node_id)
        except KeyError as error:
            self._reply(message_id, failure(own, compat.ErrorCode.NODE_UNAVAILABLE, str(error.args[0])).reply)
            return message_id
        self._flights[message_id] = _Flight(own, partition)
        line = self._queues.setdefault(partition, deque())
        line.append(message_id)
        if len(line) == 1:
            self._launch(message_id)
        return message_id

    def _launch(self, message_id: str) -> None:
        flight = self._flights[message_id]
        flight.future = self._executor.submit(flight.message, self._context(flight.partition))
        flight.future.add_done_callback(lambda _: self._finished.put(message_id))

    def _context(self, partition: int) -> Context:
        if partition not in self._node_configs:
            more = self._node_config(partition) if self._node_config is not None else {}
            self._node_configs[partition] = {"partition-id": partition, "num-partitions": self._clients, **more}
        return Context(
            run_id=self._run_id,
            node_id=FIRST_NODE + partition,
            node_config=dict(self._node_configs[partition]),
            state=clone(self._states.get(partition, RecordDict())),
            run_config=dict(self._run_config),
        )

    def _land(self, timeout: float | None) -> list[str]:
        """Take in the outcomes that are there; where there is none, wait for one or work on one. Return their ids."""
        landed: list[str] = []
        block = timeout is None or timeout > 0
        if block and self._finished.empty():
            self._executor.advance()
        while self._flights:
            try:
                message_id = self._finished.get(block=block, timeout=timeout)
            except queue.Empty:
                break
            self._settle(message_id)
            landed.append(message_id)
            block = False
        return landed

    def _settle(self, message_id: str) -> None:
        flight = self._flights.pop(message_id)
        if not flight.dropped and flight.future is not None:
            if flight.future.cancelled():
                reason = "the executor was closed"
                outcome = failure(flight.message, compat.ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason)
            else:
                outcome = flight.future.result()
            if outcome.state is not None:
                self._states[flight.partition] = clone(outcome.state)
            self._reply(message_id, outcome.reply)
        line = self._queues[flight.partition]
        line.popleft()
        if line:
            self._launch(line[0])
        else:
            del self._queues[flight.partition]

    def _reply(self, message_id: str, reply: Message) -> None:
        if reply.has_content():
            reply.content = clone(reply.content)
        compat.set_message_id(reply, f"reply-{next(self._numbers)}")
        self._replies[message_id] = reply

    def _drop(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            flight = self._flights[message_id]
            if flight.future is None:
                del self._flights[message_id]
                self._queues[flight.partition].remove(message_id)
            else:
                flight.dropped = True
                self._executor.drop(flight.future)
