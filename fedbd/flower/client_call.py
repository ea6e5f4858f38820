"""One message answered by a ClientApp, whatever process it happens in."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict

from fedbd.errors import FedBDError
from fedbd.flower.compat import ErrorCode, acting_as

App = Callable[[Message, Context], Message]
"""What answers a message: a Flower ClientApp."""

THREADS = 1
"""CPU threads with which a client trains, in every engine: another number gives other bits."""

_FRAMES = 3


@dataclass(frozen=True)
class Outcome:
    """What came of a message.

    Attributes:
        reply: The client's reply, or one that carries an ``Error``.
        state: The client's state afterwards; None: it stays what it was before the message.
    """

    reply: Message
    state: RecordDict | None


def failure(message: Message, code: ErrorCode, reason: str) -> Outcome:
    """Return an outcome that says why a message has no reply."""
    return Outcome(Message(Error(int(code), reason), reply_to=message), None)


def run_client(app: App, message: Message, context: Context) -> Outcome:
    """Let a ClientApp answer a message; whatever it raises becomes an ``Error``, and its state is then rolled back."""
    with acting_as(context.run_id, context.node_id):
        try:
            reply = app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__}; it must return a Message")
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError(
                    "the ClientApp returned a Message that is no reply; it must be made with reply_to=message"
                )
        # sys.exit() in an app ends that client's message, not the simulation.
        except (Exception, SystemExit) as error:
            return failure(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason_of(error))
        return Outcome(reply, context.state)


def reason_of(error: BaseException) -> str:
    """Return an exception's type, message and last frames; of fedbd's own, which explain themselves, the message."""
    if isinstance(error, FedBDError):
        return str(error)
    line = "".join(traceback.format_exception_only(error)).strip()
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-_FRAMES)).rstrip()
    return f"{line}\n{frames}" if frames else line


@dataclass(frozen=True)
class GlobalState:
    """What of the libraries' global state decides results: random states and torch's number of CPU threads."""

    python: Any
    numpy: Any
    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    threads: int

    @classmethod
    def now(cls) -> Self:
        """Return what it is now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(
            random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda, torch.get_num_threads()
        )

    def set(self) -> None:
        """Make it so again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        torch.set_num_threads(self.threads)
