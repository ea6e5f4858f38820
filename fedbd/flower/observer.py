"""What the simulator sees beside the protocol: a client's own notes, written to files of the run.

A client's training loss, its isolation precision or its encryption time are measurements of the simulation, not
messages of the protocol: under encryption a server would never see them. Clients write them to the folder that the
environment variable FEDBD_OBSERVER names; the recorder collects them. Without that variable nothing is written, and the
record's fields are null. No strategy and no defense reads them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context

PREFIX = "fedbd-observing-"
"""What the names of the folders begin with: temporary ones, for clients on other machines may not see the run's own."""

YOUNG = 60.0
"""Seconds in which a folder may be waiting for its lock."""


@contextlib.contextmanager
def observations() -> Iterator[Path]:
    """Make a folder for a run's notes, locked while this process lives and removed in the end.

    What runs that were killed have left behind is removed first.
    """
    _remove_stale()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        held = os.open(name, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody will take it for stale
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(held)


def _remove_stale() -> None:
    """Remove this user's folders that no living process has locked."""
    for place in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # also where it is locked
            found = place.lstat()
            young = time.time() - found.st_mtime < YOUNG
            if young or found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                continue
            held = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(held)


def observe(topic: str, notes: dict[str, Any], context: Context, round_: int) -> None:
    """Write one client's notes on a topic, atomically.

    Args:
        topic: ``train`` or ``encrypt``.
        notes: JSON values.
        context: The client's context (for its partition).
        round_: The round.
    """
    folder = os.environ.get("FEDBD_OBSERVER")
    if not folder:
        return
    path = Path(folder) / str(round_) / f"{context.node_config['partition-id']}.{topic}.json"
    draft = path.with_suffix(f".{os.getpid()}.draft")
    # The round is over where it was collected meanwhile; mkdir says that the folder exists where it was removed between
    # mkdir's own two looks.
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(notes), encoding="utf-8")
        draft.replace(path)


def collect(folder: Path, round_: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Return client -> topic -> notes of a round, and remove the files."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    place = folder / str(round_)
    for path in sorted(place.glob("*.json")):
        client, topic = path.name.split(".")[:2]
        found.setdefault(int(client), {})[topic] = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    shutil.rmtree(place, ignore_errors=True)  # drafts; a client that nobody waits for may just be writing one
    return dict(sorted(found.items()))
