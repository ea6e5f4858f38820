"""Why a client failed, in words that are the same on every engine: a record must not tell which one ran it.

The first line says what the server came to know; what the engine has to add (seconds, exit codes, frames) stands below
and goes into the message that ends a run, not into a record.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message

from fedbd.flower.compat import ErrorCode

NO_REPLY = "no reply in time"
DIED = "the client's process died"
_KNOWN = {
    ErrorCode.MESSAGE_UNAVAILABLE: NO_REPLY,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: NO_REPLY,
    ErrorCode.CLIENT_APP_CRASHED: DIED,
}


def reason_in(reply: Message) -> str:
    """Return why a reply is an error."""
    said = reply.error.reason or "failed without a reason"
    known = _KNOWN.get(reply.error.code)  # type: ignore[call-overload]
    return f"{known}\n{said}" if known is not None else said


def first_line(reason: str) -> str:
    """Return what of a reason goes into a record."""
    return reason.partition("\n")[0]


def named(failed: Mapping[int, str], most: int = 5) -> str:
    """Return a line for each of the first failed clients and their reasons, to stand below a sentence."""
    lines = [f"\n  client {client}: {first_line(failed[client])}" for client in sorted(failed)[:most]]
    return "".join(lines) + (f"\n  and {len(failed) - most} more" if len(failed) > most else "")
