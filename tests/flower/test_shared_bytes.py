"""Big byte strings between processes; both sides play in this one."""

import os
import random

import pytest

from fedbd.flower import shared_bytes
from fedbd.flower.shared_bytes import BIG, REPLY_FILE, Inbox, Outbox, ReplyFile, anonymous_file, load, read_at, write_at


def open_files():
    return len(os.listdir("/proc/self/fd"))


class Worker:
    """Receives parcels as a worker process does."""

    def __init__(self):
        self.inbox, self.seen, self.received = Inbox(), set(), 0

    def take(self, outbox, value):
        parcel = outbox.pack(value, self.seen)
        self.received += len(parcel.files)
        self.seen = (self.seen & parcel.keep) | set(parcel.files)
        self.inbox.receive(parcel.files, parcel.keep)
        assert self.inbox._files.keys() == self.seen
        return self.inbox.unpack(parcel.data)[0]


def test_an_object_is_written_once_for_all_messages_and_workers():
    outbox, workers = Outbox(), [Worker(), Worker()]
    weights = os.urandom(3 * BIG)
    for _ in range(3):
        for worker in workers:
            got = worker.take(outbox, {"w": weights, "again": weights, "small": b"x" * (BIG - 1)})
            assert got == {"w": weights, "again": weights, "small": b"x" * (BIG - 1)}
            assert got["w"] is got["again"]
    assert [worker.received for worker in workers] == [1, 1]
    assert len(outbox.pack(weights, ()).data) < 100
    [sheet] = outbox._sheets.values()
    assert os.fstat(sheet.file).st_size == sheet.size == 3 * BIG


def test_any_sequence_of_requests_arrives_whatever_is_evicted_meanwhile():
    before = open_files()
    rng = random.Random(0)
    outbox, workers = Outbox(limit=8 * BIG, files=3), [Worker() for _ in range(3)]
    strings = [rng.randbytes(rng.randint(BIG - 10, 3 * BIG)) for _ in range(12)]
    for step in range(300):
        value = rng.sample(strings, rng.randint(0, 4))
        if rng.random() < 0.2:
            strings[rng.randrange(12)] = rng.randbytes(2 * BIG)  # the old one may be freed and its id reused
        assert rng.choice(workers).take(outbox, value) == value
        used = sum(len(data) >= BIG for data in value)
        assert len(outbox._sheets) <= max(3, used)
        if step % 50 == 49:
            outbox.clear()
    for worker in workers:
        worker.inbox.receive({}, frozenset())
    assert open_files() == before


def test_unlike_strings_for_each_message_do_not_pile_up():
    outbox, worker = Outbox(limit=6 * BIG, files=64), Worker()
    weights = os.urandom(BIG)
    assert worker.take(outbox, weights) == weights
    where = outbox._places[id(weights)]
    for _ in range(20):
        state = os.urandom(BIG)
        assert worker.take(outbox, [weights, state]) == [weights, state]
        assert sum(sheet.size for sheet in outbox._sheets.values()) <= 6 * BIG
    assert len(worker.inbox._read) <= 6
    assert outbox._places[id(weights)] == where  # what all messages hold stays where it was written first


def test_a_value_that_cannot_be_pickled_leaves_no_file():
    before, outbox = open_files(), Outbox()
    with pytest.raises(Exception, match="pickle"):
        outbox.pack([os.urandom(BIG), lambda: None], set())
    assert open_files() == before
    assert outbox._places == {}


def test_a_reply_carries_only_what_the_driver_has_not():
    sent, made = os.urandom(2 * BIG), os.urandom(3 * BIG)
    outbox, inbox, replies = Outbox(), Inbox(), ReplyFile()
    parcel = outbox.pack(sent, set())
    inbox.receive(parcel.files, parcel.keep)
    received, origin = inbox.unpack(parcel.data)
    for _ in range(2):  # the file is written anew for each reply
        packed = replies.pack([received, made, b"small", made], origin)
        assert os.fstat(replies.file).st_size == 3 * BIG

        def fetch(place):
            number, offset, size = place
            return read_at(replies.file, size, offset) if number == REPLY_FILE else parcel.strings[place]

        got = load(packed, fetch)
        assert got == [sent, made, b"small", made]
        assert got[0] is sent


def test_reading_and_writing_take_as_many_steps_as_needed(monkeypatch):
    monkeypatch.setattr(shared_bytes, "_STEP", 1000)
    file, data = anonymous_file(), os.urandom(2_500)
    write_at(file, data, 7)
    assert read_at(file, 2_500, 7) == data
    with pytest.raises(EOFError, match="7 bytes early"):
        read_at(file, 2_500, 14)
    os.close(file)


def test_without_memfd_an_unnamed_file_serves(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    file = anonymous_file()
    assert os.fstat(file).st_nlink == 0
    write_at(file, b"abc", 0)
    assert read_at(file, 3, 0) == b"abc"
    os.close(file)
