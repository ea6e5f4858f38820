"""What a worker process does: load the ClientApp once, then answer the driver's messages one by one."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
import torch

from fedbd.flower.client_call import THREADS, App, failure, reason_of, run_client
from fedbd.flower.compat import ErrorCode
from fedbd.flower.shared_bytes import Inbox, ReplyFile


def answer_all(pipe: Connection, factory: bytes) -> None:
    """Load the app, tell the driver None (or what went wrong), then answer messages until the pipe ends."""
    # The driver may be gone at any moment; there is then nobody to tell.
    with contextlib.suppress(EOFError, OSError):
        try:
            _prepare_libraries()
            app: App = pickle.loads(factory)()
        except (Exception, SystemExit) as error:
            pipe.send(reason_of(error))
            return
        pipe.send(None)
        inbox, replies = Inbox(), ReplyFile()
        while True:
            _answer(pipe, app, inbox, replies)


def _answer(pipe: Connection, app: App, inbox: Inbox, replies: ReplyFile) -> None:
    data, numbers, keep = pipe.recv()
    inbox.receive({number: recv_handle(pipe) for number in numbers}, keep)
    (message, context), origin = inbox.unpack(data)
    outcome = run_client(app, message, context)
    had_file = replies.file is not None
    try:
        packed = replies.pack((outcome.reply, outcome.state), origin)
    except Exception as error:  # a reply that cannot be pickled, or no memory for it
        outcome = failure(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason_of(error))
        packed = replies.pack((outcome.reply, outcome.state), origin)
    new_file = None if had_file else replies.file
    pipe.send((packed, new_file is not None))
    if new_file is not None:
        send_handle(pipe, new_file, os.getppid())


def _prepare_libraries() -> None:
    """Fix torch's threads, and give each worker its own global random state, where forked ones would share one."""
    torch.set_num_threads(THREADS)
    torch.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    random.seed()
