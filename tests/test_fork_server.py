"""One process that all others are forked from: who comes from it, with which signals and which fedbd."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from fedbd import fork_server
from fedbd.fork_server import _ROOT, _finds_this_fedbd

FAMILY = """
    import os, signal, sys
    from multiprocessing import resource_tracker
    from fedbd import fork_server

    def child(answer):
        answer.send((os.getpid(), os.getppid(), sorted(int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, []))))

    def asked():
        context = fork_server.server_context()
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        fork_server.start(process, hide_main=False)
        answer = here.recv()
        process.join()
        return answer

    def parent(answer, joins, kills):
        if joins:
            fork_server.join()
        born = os.getppid()
        first = asked()[1] == born
        if kills:
            os.kill(born, signal.SIGKILL)
            while os.getppid() == born:
                pass
        answer.send((born, first, asked()[1] == born, asked()[1] == asked()[1]))

    if __name__ == "__main__":
        fork_server.PRELOAD.clear()
        context = fork_server.server_context()
        if sys.argv[1] == "mask":
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            print(asked()[2], signal.pthread_sigmask(signal.SIG_BLOCK, []) == before)
            sys.exit()
        here, there = context.Pipe()
        process = context.Process(target=parent, args=(there, sys.argv[1] != "apart", sys.argv[1] == "kill"))
        fork_server.start(process, hide_main=False)
        print(*here.recv()[1:])
"""


def family(folder: Path, how: str) -> str:
    script = folder / "family.py"
    script.write_text(textwrap.dedent(FAMILY))
    done = subprocess.run(
        [sys.executable, str(script), how], capture_output=True, text=True, timeout=120, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_children_of_a_child_come_from_the_same_server_where_it_joined(tmp_path):
    assert family(tmp_path, "join") == "True True True"


def test_without_joining_python_starts_another_server(tmp_path):
    # The reason for join: were this to fail under a later Python, join could go.
    assert family(tmp_path, "apart") == "False False True"


def test_a_child_whose_server_is_killed_goes_on_with_one_of_its_own(tmp_path):
    assert family(tmp_path, "kill") == "True False True"


def test_children_start_with_the_ending_signals_held_back_and_the_driver_keeps_its_own_mask(tmp_path):
    assert family(tmp_path, "mask") == f"{sorted(map(int, fork_server.ENDING))} True"


def test_let_in_lets_the_signals_through():
    got = []
    before = signal.signal(signal.SIGHUP, lambda *_: got.append(True))
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, fork_server.ENDING)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # another thread would take it
        time.sleep(0.05)
        assert not got
        fork_server.let_in()
        assert got
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        signal.signal(signal.SIGHUP, before)


def test_only_a_fedbd_that_the_server_would_find_is_loaded_there(tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "fedbd").mkdir(parents=True)
    (other / "fedbd" / "__init__.py").touch()
    assert _finds_this_fedbd()
    for path, found in (
        (["", str(_ROOT)], True),
        ([str(_ROOT)], False),  # python -m fedbd in a checkout: the server does not look into the current folder
        (["", str(other), str(_ROOT)], False),
        (["", str(tmp_path), str(_ROOT), str(other)], True),
    ):
        monkeypatch.setattr(sys, "path", path)
        assert _finds_this_fedbd() is found, path


def test_the_command_line_takes_a_run_and_its_workers_from_one_server(tmp_path):
    quick = Path(__file__).parent.parent / "scenarios" / "quickstart.yaml"
    settings = ["rounds=5", "engine.workers=1", "training.epochs=30"]
    command = [sys.executable, "-m", "fedbd", "run", str(quick), "-o", str(tmp_path), "--no-twin", "-q"]
    run = subprocess.Popen([*command, *(word for setting in settings for word in ("-s", setting))])
    try:
        while not list(tmp_path.rglob("rounds.jsonl")):
            assert run.poll() is None
            time.sleep(0.02)
        servers = [pid for pid in children(run.pid) if b"forkserver" in cmdline(pid)]
        assert len(servers) == 1
        assert len(children(servers[0])) == 2  # the run and its worker
        assert not any(children(pid) for pid in children(servers[0]))
    finally:
        run.kill()
        run.wait()


def test_a_mistake_does_not_wait_for_the_server(tmp_path):
    (tmp_path / "wrong.yaml").write_text("rounds: none\n")
    command = [sys.executable, "-m", "fedbd", "run", "wrong.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, "rounds" in done.stderr) == (2, True)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(entry / "cwd") != str(tmp_path), cmdline(int(entry.name))
        except OSError:
            continue  # it is another user's, or gone


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
