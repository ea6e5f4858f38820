"""Grid proxies: who is seen, in which order, and what happens to a reply the moment it arrives.

Flower's node ids are random, its node list is a set and its replies come in order of completion; a simulator that
promises the same bits shows a strategy partitions 0 .. N-1 in order, whatever the engine.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedbd.errors import RunFailed

log = logging.getLogger(__name__)

PROTOCOL = "fedbd.protocol"
"""Name of the ConfigRecord that marks a message which the client's mod answers itself."""

LOST = "fedbd.lost"
"""Name of the record that marks a reply as lost on its way, for a simulation of networks that lose some."""


class _Proxy(Grid):
    """Hands everything on to another grid; the proxies override what they change."""

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def set_run(self, run: object) -> None:
        """See ``Grid``."""
        self.inner.set_run(cast(Any, run))

    @property
    def run(self) -> Any:
        """See ``Grid``."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See ``Grid``."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See ``Grid``."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See ``Grid``."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See ``Grid``."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See ``Grid``."""
        return self.inner.send_and_receive(messages, timeout=timeout)


class OrderedGrid(_Proxy):
    """A grid whose nodes are partitions: sorted, complete, and with replies sorted or folded as they arrive.

    Args:
        inner: The engine's grid.
        clients: How many partitions there are; None: as many nodes as are there at first sight.
        patience: Seconds to wait until all of them are registered.
        pause: Seconds between two looks for replies.

    Attributes:
        on_reply: Called with (partition, reply) as each reply arrives; returns what to keep of it.
        cost: Partition -> expected work in any unit; messages are sent in falling order of it. None: as they come.
    """

    def __init__(self, inner: Grid, clients: int | None, *, patience: float = 120.0, pause: float = 0.1) -> None:
        super().__init__(inner)
        self.clients = clients
        self.patience = patience
        self.pause = pause
        self.on_reply: Callable[[int, Message], Message] | None = None
        self.cost: Callable[[int], float] | None = None
        self._node_of: dict[int, int] = {}
        self._partition_of: dict[int, int] = {}
        self._asked: dict[str, int] = {}

    def get_node_ids(self) -> list[int]:
        """Return all node ids in the order of their partitions."""
        return [self.nodes()[partition] for partition in sorted(self.nodes())]

    def nodes(self) -> dict[int, int]:
        """Return partition -> node id; asks every node once.

        Raises:
            RunFailed: If nodes are missing, do not answer or share a partition.
        """
        if not self._node_of:
            lookup = getattr(self.inner, "partition_of", None)
            ids = self._wait_for_nodes()
            pairs = [(lookup(node), node) for node in ids] if lookup is not None else self._ask(ids)
            self._node_of = dict(pairs)
            self._partition_of = {node: partition for partition, node in pairs}
            if len(self._node_of) != len(ids):
                raise RunFailed(f"{len(ids)} nodes answer for only {len(self._node_of)} different partitions")
        return self._node_of

    def partition(self, node: int) -> int:
        """Return the partition of a node."""
        self.nodes()
        return self._partition_of[node]

    def _pause(self, waiting: set[str]) -> None:
        """Wait for the next reply where the engine can tell of it, else a moment."""
        wait = getattr(self.inner, "wait", None)
        if wait is not None:
            wait(sorted(waiting), 1.0)
        else:
            time.sleep(self.pause)

    def partition_of_reply(self, reply: Message) -> int:
        """Return the partition that a reply answers for; what Flower itself says for a lost node names no node."""
        asked = self._asked.get(reply.metadata.reply_to_message_id)
        return asked if asked is not None else self.partition(reply.metadata.src_node_id)

    def _wait_for_nodes(self) -> list[int]:
        """Return the nodes once all are there; say what is being waited for: somebody may have to start one."""
        deadline = time.monotonic() + self.patience
        wanted, told = self.clients or 1, -1
        while True:
            ids = list(self.inner.get_node_ids())
            if len(ids) >= wanted:
                return ids
            if len(ids) != told:
                told = len(ids)
                left = max(0.0, deadline - time.monotonic())
                # A warning: Flower's runtimes print no other log of ours.
                log.warning("waiting for %d SuperNodes, %d connected; giving up in %.0f s", wanted, told, left)
            if time.monotonic() > deadline:
                remedy = "start one SuperNode for each client (partition.clients)"
                raise RunFailed(f"only {told} of {wanted} SuperNodes connected within {self.patience:g} s; {remedy}")
            time.sleep(0.2)

    def _ask(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        content = RecordDict({PROTOCOL: ConfigRecord({"kind": "identity"})})
        replies = self.inner.send_and_receive(
            [Message(content, dst_node_id=node, message_type="train") for node in ids], timeout=self.patience
        )
        pairs = []
        for reply in replies:
            if reply.has_error():
                raise RunFailed(f"a node did not tell its partition: {reply.error.reason}")
            pairs.append((int(cast(int, reply.content[PROTOCOL]["partition-id"])), reply.metadata.src_node_id))
        if len(pairs) != len(ids):
            raise RunFailed(f"only {len(pairs)} of {len(ids)} nodes told their partition within {self.patience:g} s")
        return pairs

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, hand each reply to ``on_reply`` as it arrives, and return the replies in the order of partitions.

        Replies that have not come when the timeout ends are left out. A grid that ends slow clients itself
        (``keeps_time``) is waited for: what it needs to replace a worker is not the other clients' fault. A reply that
        is marked as lost is waited for until the timeout, in vain.
        """
        self.nodes()
        deadline = None if timeout is None else time.monotonic() + timeout
        batch = list(messages)
        if self.cost is not None:  # longest first: no worker idles while the last one works through a long job
            cost = self.cost
            batch.sort(key=lambda message: -cost(self._partition_of[message.metadata.dst_node_id]))
        self._asked = {}
        rest = iter(batch)
        # Replies that have come and are not folded yet take memory. Where the engine says how many messages keep it
        # busy, it gets no more at a time: it cannot run ahead of the fold, whatever the size of the cohort.
        waiting = self._send(rest, getattr(self.inner, "window", None) or len(batch))
        replies: list[tuple[int, Message]] = []
        lost = False
        ends = deadline is not None and not getattr(self.inner, "keeps_time", False)
        while waiting:
            arrived = list(self.inner.pull_messages(sorted(waiting)))
            for reply in arrived:
                waiting |= self._send(rest, 1)
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_content() and LOST in reply.content:
                    lost = True
                    continue
                partition = self.partition_of_reply(reply)
                replies.append((partition, self.on_reply(partition, reply) if self.on_reply is not None else reply))
            if ends and deadline is not None and time.monotonic() > deadline:
                break
            if waiting and not arrived:
                self._pause(waiting)
        if lost and deadline is not None:
            time.sleep(max(0.0, deadline - time.monotonic()))
        end = getattr(self.inner, "end_batch", None)
        if end is not None:
            end()
        return [reply for _, reply in sorted(replies, key=lambda pair: pair[0])]

    def _send(self, messages: Iterator[Message], count: int) -> set[str]:
        """Send the next few messages; return their ids."""
        some = list(itertools.islice(messages, count))
        ids = list(self.inner.push_messages(some)) if some else []
        for message_id, message in zip(ids, some, strict=True):
            self._asked[message_id] = self._partition_of[message.metadata.dst_node_id]
        return set(ids)


class CohortGrid(_Proxy):
    """Shows an inner strategy only this round's nodes, in the order of their partitions."""

    def __init__(self, inner: Grid, nodes: Sequence[int]) -> None:
        super().__init__(inner)
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        """Return the cohort's node ids."""
        return list(self._nodes)
