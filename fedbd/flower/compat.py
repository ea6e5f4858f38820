"""What LocalGrid needs of Flower that Flower does not export: the only file of fedbd with private Flower names.

Tried with flwr 1.41; everything else in fedbd imports ``flwr.app``, ``flwr.clientapp`` and ``flwr.serverapp`` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from flwr.app import Message

_Identity: Any
try:
    # Message(...) reads the sender's run, node and task from this class and raises where a runtime has not set them.
    # There is no public way to set them. Guarded: releases before 1.38 have no such class and need none.
    from flwr.supercore.task_identity import TaskIdentity as _Identity
except ImportError:
    _Identity = None

_FIELDS = ("run_id", "node_id", "task_id")


class ErrorCode(IntEnum):
    """Flower's numbers for what went wrong with a message.

    They are part of the wire format, so they do not change; the class that names them, ``flwr.common.constant``'s, is
    not exported, so they stand here again.
    """

    LOAD_CLIENT_APP_EXCEPTION = 1
    CLIENT_APP_RAISED_EXCEPTION = 2
    MESSAGE_UNAVAILABLE = 3
    REPLY_MESSAGE_UNAVAILABLE = 4
    NODE_UNAVAILABLE = 5
    CLIENT_APP_CRASHED = 8


def act_as(run_id: int, node_id: int) -> None:
    """Make this process's new messages come from a node of a run."""
    if _Identity is not None:
        _Identity.run_id, _Identity.node_id, _Identity.task_id = run_id, node_id, 1


@contextmanager
def acting_as(run_id: int, node_id: int) -> Iterator[None]:
    """Make new messages come from a node of a run until the block ends, then from whom they came before."""
    # The getters of the class raise while nothing is set; the fields behind them can be read at any time.
    before = {name: getattr(_Identity, f"_{name}", None) for name in _FIELDS}
    act_as(run_id, node_id)
    try:
        yield
    finally:
        if _Identity is not None:
            for name, value in before.items():
                setattr(_Identity, name, value)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, a grid's task; ``Metadata.message_id`` has no setter (Flower's grids do the same)."""
    message.metadata.__dict__["_message_id"] = message_id
