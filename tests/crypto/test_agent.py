from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import pickle
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbd
from fedbd.crypto import agent as module
from fedbd.crypto.agent import AgentProcess, KeyAgent, read_key_file, start_agent, write_key_file
from fedbd.crypto.agent_frames import MAX_BODY, PROTOCOL, receive, send
from fedbd.crypto.ckks import Ckks, Evaluator, decrypt, encrypt, new_secret_context
from fedbd.errors import SecureSumFailed

_spec = importlib.util.spec_from_file_location("key_hunt", Path(__file__).with_name("key_hunt.py"))
assert _spec is not None and _spec.loader is not None
key_hunt = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(key_hunt)

CKKS = Ckks()
VALUES = np.arange(-1500, 1500, dtype=np.int64)
ROOT = str(Path(fedbd.__file__).parent.parent)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "ckks.key"
    write_key_file(path, CKKS)
    return path


@pytest.fixture(scope="module")
def running(key_file: Path) -> Iterator[AgentProcess]:
    with start_agent(CKKS, key_file=key_file) as process:
        yield process


@pytest.fixture
def client(running: AgentProcess) -> Iterator[KeyAgent]:
    with KeyAgent(running.handle, CKKS) as client:
        yield client


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def raw_connection(process: AgentProcess) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(process.handle.removeprefix("unix:"))
    return connection


def encrypt_in_worker(client: KeyAgent, seed: int) -> tuple[bytes, int]:
    return client.encrypt(np.full(2100, seed, dtype=np.int64)), os.getpid()


# --- work -------------------------------------------------------------------------------------------------------------


def test_the_agent_encrypts_and_decrypts_what_the_library_does(client: KeyAgent, key_file: Path) -> None:
    secret = key_file.read_bytes()
    evaluator = Evaluator(CKKS)
    total = evaluator.add(evaluator.add(None, client.encrypt(VALUES)), encrypt(VALUES, secret))
    blob = evaluator.serialize(total)
    for summed, error in (client.decrypt(blob), decrypt(blob, secret)):
        assert summed.dtype == np.int64
        assert np.array_equal(summed, 2 * VALUES)
        assert 0 < error < CKKS.noise_bound(2)
    assert client.hello() == {"protocol": PROTOCOL, "parameters": {"parameters": "n4096", "grid_bits": 24}}


def test_agents_with_one_key_file_understand_each_other(client: KeyAgent, key_file: Path) -> None:
    with start_agent(CKKS, key_file=key_file) as second, KeyAgent(second.handle) as other:
        assert np.array_equal(other.decrypt(client.encrypt(VALUES))[0], VALUES)


def test_agents_without_a_key_file_do_not(client: KeyAgent) -> None:
    with start_agent(CKKS) as second, KeyAgent(second.handle) as other:
        total, error = other.decrypt(client.encrypt(VALUES))
        assert not np.array_equal(total, VALUES)
        assert error > CKKS.noise_bound(1)


def test_workers_encrypt_at_the_same_time_and_the_client_travels_as_its_handle(
    running: AgentProcess, client: KeyAgent
) -> None:
    client.hello()  # an open connection must not travel
    assert len(pickle.dumps(client)) < 400
    assert vars(pickle.loads(pickle.dumps(client)))["_connection"] is None
    evaluator, total = Evaluator(CKKS), None
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for blob, pid in pool.map(encrypt_in_worker, [client] * 6, range(6)):
            assert pid != os.getpid()
            total = evaluator.add(total, blob)
    assert total is not None
    assert np.array_equal(client.decrypt(evaluator.serialize(total))[0], np.full(2100, 15))


def test_a_forked_child_opens_its_own_connection(client: KeyAgent) -> None:
    blob = client.encrypt(VALUES)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(Exception):
            code = 0 if np.array_equal(client.decrypt(blob)[0], VALUES) else 2
        os._exit(code)
    for _ in range(20):
        assert np.array_equal(client.decrypt(blob)[0], VALUES)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_refusals_come_back_as_errors_and_the_connection_stays(client: KeyAgent) -> None:
    with pytest.raises(SecureSumFailed, match="ciphertext: expected one made by fedbd"):
        client.decrypt(b"rubbish")
    connection = client._connection
    with pytest.raises(SecureSumFailed, match="at most 4096, got 8192"):
        client.encrypt(np.array([8192 << 24]))
    with pytest.raises(SecureSumFailed, match="D >= 1"):
        client.encrypt(np.zeros(0, dtype=np.int64))
    with pytest.raises(SecureSumFailed, match=r"\(D,\) int64, got \(2,\) float64"):
        client.encrypt(np.zeros(2))
    assert np.array_equal(client.decrypt(client.encrypt(VALUES))[0], VALUES)
    assert client._connection is connection


def test_parameters_are_checked(running: AgentProcess) -> None:
    with pytest.raises(SecureSumFailed, match=r"expected parameters .*n8192.*, got .*n4096"):
        KeyAgent(running.handle, Ckks(parameters="n8192")).hello()
    with pytest.raises(SecureSumFailed, match="expected a handle unix:PATH"):
        KeyAgent("tcp:localhost:80")


# --- start and end ----------------------------------------------------------------------------------------------------


def test_start_is_quick_and_loads_no_torch() -> None:
    start = time.perf_counter()
    with start_agent(CKKS) as process:
        seconds = time.perf_counter() - start
        libraries = Path(f"/proc/{process.pid}/maps").read_text()
    assert "_tenseal_cpp" in libraries
    assert "torch" not in libraries
    assert seconds < 5  # 0.2 on an idle core; this only catches a hang


def test_the_client_side_loads_neither_tenseal_nor_torch() -> None:
    code = "import sys, fedbd.crypto.agent_client; print([m for m in ('tenseal', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_only_one_module_imports_tenseal() -> None:
    importing = re.compile(r"^\s*(import|from) tenseal", re.MULTILINE)
    found = [path.name for path in Path(ROOT, "fedbd").rglob("*.py") if importing.search(path.read_text())]
    assert found == ["ckks.py"]


def test_stop_ends_every_process_and_removes_the_folder(tmp_path: Path) -> None:
    process = start_agent(CKKS, directory=tmp_path)
    client = KeyAgent(process.handle)
    client.hello()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.stop()
    assert gone(process.pid)
    assert within(3, lambda: gone(int(children[0])))
    assert list(tmp_path.iterdir()) == []
    process.stop()
    with pytest.raises(SecureSumFailed, match="start the run again"):
        client.hello()


def test_a_killed_agent_is_an_error_at_once_and_not_a_hang(tmp_path: Path) -> None:
    with start_agent(CKKS, directory=tmp_path) as process:
        connected, fresh = KeyAgent(process.handle), KeyAgent(process.handle)
        connected.hello()
        os.kill(process.pid, signal.SIGKILL)
        assert within(3, lambda: gone(process.pid))
        start = time.monotonic()
        for client in (connected, fresh, connected):
            with pytest.raises(SecureSumFailed, match=r"key agent at unix:.*; start the run again"):
                client.encrypt(VALUES)
        assert time.monotonic() - start < 5


def test_a_silent_agent_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    with start_agent(CKKS, directory=tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            with pytest.raises(SecureSumFailed, match="timed out"):
                KeyAgent(process.handle, timeout=0.3).hello()
            assert 0.2 < time.monotonic() - start < 3
        finally:
            os.kill(process.pid, signal.SIGCONT)


def test_a_client_reconnects_after_its_connection_was_lost(running: AgentProcess) -> None:
    client = KeyAgent(running.handle)
    client.hello()
    client._connection.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
    with pytest.raises(SecureSumFailed):
        client.hello()
    assert client.hello()["protocol"] == PROTOCOL
    client.close()


def test_ctrl_c_does_not_end_the_agent(running: AgentProcess, client: KeyAgent) -> None:
    assert os.getpgid(running.pid) != os.getpgid(0)  # so a terminal does not even send it
    os.kill(running.pid, signal.SIGINT)
    time.sleep(0.1)
    assert not gone(running.pid)
    assert np.array_equal(client.decrypt(client.encrypt(VALUES))[0], VALUES)


def test_the_agent_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from fedbd.crypto.agent_client import start_agent, KeyAgent\n"
        "from fedbd.crypto.ckks import Ckks\n"
        "agent = start_agent(Ckks(), directory=pathlib.Path(sys.argv[1])); KeyAgent(agent.handle).hello()\n"
        "print(agent.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert within(5, lambda: gone(int(done.stdout)))
    assert within(5, lambda: list(tmp_path.iterdir()) == [])


def test_a_failed_start_says_why(tmp_path: Path, key_file: Path) -> None:
    with pytest.raises(SecureSumFailed, match=r"nowhere.key: cannot read the key file: No such file"):
        start_agent(CKKS, key_file=tmp_path / "nowhere.key", directory=tmp_path)
    with pytest.raises(SecureSumFailed, match=r"expected a key for Ckks\(parameters='n8192'"):
        start_agent(Ckks(parameters="n8192"), key_file=key_file, directory=tmp_path)
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    with pytest.raises(SecureSumFailed, match="too long for a socket"):
        start_agent(CKKS, directory=deep)
    with pytest.raises(SecureSumFailed, match="cannot make the key agent's folder"):
        start_agent(CKKS, directory=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == [deep.name]
    assert list(deep.iterdir()) == []


# --- who may reach it -------------------------------------------------------------------------------------------------


def test_socket_and_folder_are_the_owners_only(running: AgentProcess) -> None:
    path = Path(running.handle.removeprefix("unix:"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(SecureSumFailed, match="chmod 700"):
        module.listen(tmp_path / "agent.sock")


def test_a_foreign_user_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert module.peer_uid(ours) == os.geteuid()
        monkeypatch.setattr(module, "peer_uid", lambda connection: os.geteuid() + 1)
        send(theirs, {"operation": "hello"})
        module.converse(ours, b"no key is touched", lambda: True)
        reply = receive(theirs)
    assert reply is not None
    assert re.search(rf"serves user {os.geteuid()} only, got {os.geteuid() + 1}", reply[0]["error"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_real_foreign_user_is_refused_even_where_the_folder_lets_it_in(tmp_path: Path) -> None:
    with start_agent(CKKS) as process:
        path = Path(process.handle.removeprefix("unix:"))
        for mode_folder, mode_socket, word in (
            (0o700, 0o600, "Permission denied"),
            (0o755, 0o666, "serves user 0 only"),
        ):
            path.parent.chmod(mode_folder)
            path.chmod(mode_socket)
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.setgid(65534)
                    os.setuid(65534)
                    KeyAgent(process.handle).hello()
                    os.write(writing, b"was served")
                except Exception as fault:
                    os.write(writing, str(fault).encode())
                finally:
                    os._exit(0)
            os.close(writing)
            os.waitpid(child, 0)
            said = os.read(reading, 1000).decode()
            os.close(reading)
            assert word in said


def test_no_core_dumps_and_no_reading_by_the_same_user(running: AgentProcess) -> None:
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0\s", limits)
    child = os.fork()
    if child == 0:
        module.harden()
        os._exit(10 + ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10


# --- key files --------------------------------------------------------------------------------------------------------


def test_a_key_file_is_the_owners_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_key_file(tmp_path / "key", CKKS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert decrypt(encrypt(VALUES, read_key_file(tmp_path / "key")), (tmp_path / "key").read_bytes())[0][0] == VALUES[0]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o601])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_key_file(path, CKKS)
    path.chmod(mode)
    with pytest.raises(SecureSumFailed, match=r"others can reach the key .* chmod 600"):
        read_key_file(path)
    path.chmod(0o400)
    assert read_key_file(path)[:4] == b"FBSK"


def test_key_files_are_never_overwritten_nor_followed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_file(path, CKKS)
    content = path.read_bytes()
    with pytest.raises(SecureSumFailed, match="File exists; name one that is free"):
        write_key_file(path, CKKS)
    assert path.read_bytes() == content
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SecureSumFailed, match="symbolic link"):
        read_key_file(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SecureSumFailed, match="regular file"):
        read_key_file(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_key_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_file(path, CKKS)
    os.chown(path, 65534, 65534)
    with pytest.raises(SecureSumFailed, match="of user 0"):
        read_key_file(path)


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (struct.pack("<IQ", 2**16 + 1, 0), "at most 65536"),
        (struct.pack("<IQ", 2, MAX_BODY + 1) + b"{}", "bytes are taken"),
        (struct.pack("<IQ", 3, 0) + b"{]}", "no JSON"),
        (struct.pack("<IQ", 2, 0) + b"\xff\xfe", "no JSON"),
        (struct.pack("<IQ", 2, 0) + b"[]", "no JSON object"),
    ],
)
def test_what_is_no_frame_is_refused_and_the_connection_closed(running: AgentProcess, sent: bytes, says: str) -> None:
    with raw_connection(running) as connection:
        connection.sendall(sent)
        reply = receive(connection)
        assert reply is not None
        assert says in reply[0]["error"]
        with contextlib.suppress(ConnectionResetError):
            assert receive(connection) is None


def test_a_frame_cut_short_ends_only_its_own_connection(running: AgentProcess, client: KeyAgent) -> None:
    with raw_connection(running) as connection:
        connection.sendall(struct.pack("<IQ", 24, 10**9) + json.dumps({"operation": "encrypt"}).encode() + b"abc")
    assert np.array_equal(client.decrypt(client.encrypt(VALUES))[0], VALUES)


def test_the_key_is_in_no_reply(running: AgentProcess, key_file: Path) -> None:
    hunt = key_hunt.KeyHunt.for_secret(key_file.read_bytes())
    blob = encrypt(VALUES, key_file.read_bytes())
    questions: list[tuple[dict[str, Any], bytes]] = [
        ({"operation": "hello"}, b""),
        ({"operation": "encrypt"}, VALUES.tobytes()),
        ({"operation": "encrypt"}, b"\x7f" * 800),
        ({"operation": "encrypt"}, b"abc"),
        ({"operation": "encrypt"}, key_file.read_bytes()[:4096]),
        ({"operation": "decrypt"}, blob),
        ({"operation": "decrypt"}, blob[:-5]),
        ({"operation": "decrypt"}, key_file.read_bytes()),
        ({"operation": "decrypt"}, os.urandom(999)),
        ({"operation": "share_key"}, b""),
        ({"operation": ["hello"]}, b""),
        ({}, b""),
    ]
    everything = b""
    with raw_connection(running) as connection:
        for header, body in questions:
            send(connection, header, body)
            reply = receive(connection)
            assert reply is not None
            everything += json.dumps(reply[0]).encode() + bytes(reply[1])
    assert everything.count(b'"error"') == 9
    assert hunt.search_bytes(everything) == []
    assert hunt.search_bytes(everything + key_file.read_bytes())


def test_an_unexpected_fault_tells_its_kind_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = new_secret_context(CKKS)

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot parse {secret!r}")

    monkeypatch.setattr(module, "decrypt", fail)
    header, body = module.answer({"operation": "decrypt"}, memoryview(b"x"), secret)
    assert header == {"error": "key agent: unexpected RuntimeError during decrypt"}
    assert body == b""
