"""The executors, with real worker processes."""

import contextlib
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedbd.errors import RunFailed, UserError
from fedbd.flower.app_loader import load_component
from fedbd.flower.compat import ErrorCode
from fedbd.flower.executors import ProcessPoolExecutor, SerialExecutor
from fedbd.flower.local_grid import LocalGrid

TOYS = Path(__file__).parent / "toy_apps"
OBEDIENT = (TOYS / "obedient.py", "app")
LEARNER = (TOYS / "learner", "app")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(OBEDIENT, 2, timeout=30) as executor:
        yield executor


@pytest.fixture(scope="module")
def serial():
    return SerialExecutor(OBEDIENT)


@pytest.fixture(params=["serial", "pool"])
def grid(request):
    return LocalGrid(request.getfixturevalue(request.param), 6)


@pytest.fixture
def pool_grid(pool):
    return LocalGrid(pool, 6)


def order(node, do="answer", message_type="train", arrays=None, **orders):
    content = RecordDict({"orders": ConfigRecord({"do": do, **orders})})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, node, message_type)


def process_of(reply):
    return reply.content["answer"]["process"]


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def federation(executor):
    """Run FedAvg on the toy learner; return a digest of the final weights, all metrics, and the server's next draw."""
    build = load_component(TOYS, "learner", "model", "build")
    torch.manual_seed(0)
    random.seed(5)
    app, results = ServerApp(), []

    @app.main()
    def main(grid, context):
        strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.5)
        start = ArrayRecord(build().state_dict())
        results.append(strategy.start(grid=grid, initial_arrays=start, num_rounds=2, timeout=60))

    app(grid=LocalGrid(executor, 6), context=Context(1, 1, {}, RecordDict(), {}))
    [result] = results
    digest = hashlib.sha256(b"".join(array.data for array in result.arrays.values())).hexdigest()
    metrics = [dict(result.train_metrics_clientapp[k]) | dict(result.evaluate_metrics_clientapp[k]) for k in (1, 2)]
    return digest, metrics, random.random()


def test_the_memory_of_workers_is_known_while_they_live(pool):
    grid = LocalGrid(pool, 3)
    assert 2**26 < grid.peak_memory() < 2**34
    assert LocalGrid(SerialExecutor(OBEDIENT), 3).peak_memory() == 0


def test_a_federation_gives_the_same_bits_on_any_number_of_workers(caplog):
    caplog.set_level(logging.ERROR, logger="flwr")
    expected = federation(SerialExecutor(LEARNER))
    assert [metrics["threads"] for metrics in expected[1]] == [1, 1]
    for workers in (1, 2):
        with ProcessPoolExecutor(LEARNER, workers, timeout=60) as executor:
            assert federation(executor) == expected


def test_replies_stand_in_the_order_of_the_messages_not_of_their_completion(pool_grid):
    messages = [order(1000, "sleep", seconds=0.3), order(1001), order(1002)]
    replies = pool_grid.send_and_receive(messages)
    assert [reply.content["answer"]["partition"] for reply in replies] == [0, 1, 2]
    assert process_of(replies[0]) != process_of(replies[1])


def test_replies_can_be_had_as_they_finish(pool_grid):
    ids = pool_grid.push_messages([order(1000, "sleep", seconds=0.5), order(1001)])
    assert pool_grid.wait(ids, 10)
    [reply] = pool_grid.pull_messages(ids)
    assert reply.content["answer"]["partition"] == 1
    assert pool_grid.pull_messages(ids) == []
    assert pool_grid.wait(ids, 10)
    assert len(pool_grid.pull_messages(ids)) == 1


def test_state_is_kept_on_success_and_rolled_back_on_failure(grid):
    codes = []
    for do in ("answer", "raise", "wrong type", "no reply", "leave"):
        [reply] = grid.send_and_receive([order(1003, do)])
        codes.append(reply.error.code if reply.has_error() else 0)
    assert codes == [0, 2, 2, 2, 2]
    [reply] = grid.send_and_receive([order(1003)])
    assert reply.content["answer"]["visits"] == 2


def test_reasons_are_the_same_in_every_engine(serial, pool):
    def reasons(executor):
        messages = [order(1000, do) for do in ("raise", "refuse", "wrong type", "no reply", "leave")]
        return [reply.error.reason for reply in LocalGrid(executor, 1).send_and_receive(messages)]

    assert reasons(pool) == reasons(serial)
    assert reasons(pool)[1] == "aggregation.krum: 3 rows; use more clients"


def test_messages_are_isolated(grid):
    arrays = ArrayRecord([np.arange(20_000.0)])
    content = order(0, "mutate", list=[1], arrays=arrays).content
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert all(reply.has_content() for reply in replies)
    assert dict(content["orders"]) == {"do": "mutate", "list": [1]}
    np.testing.assert_array_equal(content["arrays"]["0"].numpy(), np.arange(20_000.0))


def test_mods_and_queries_work(grid):
    with_mod, query = grid.send_and_receive(
        [order(1004, message_type="train.with_mod"), order(1004, "", "query.partition")]
    )
    assert with_mod.content["mod"]["ran"]
    assert query.content["answer"]["partition"] == 4


def test_big_arrays_arrive_unchanged_in_both_directions(grid):
    rng = np.random.default_rng(0)
    # Below, at and above the size from which bytes travel by shared memory.
    ours = [rng.standard_normal(n) for n in (10, 8_176, 8_192, 1_000_000)]
    for _ in range(2):
        messages = [order(node, "add one", arrays=ArrayRecord(ours)) for node in grid.get_node_ids()[:3]]
        for reply in grid.send_and_receive(messages):
            theirs = [array.numpy() for array in reply.content["arrays"].values()]
            assert len(theirs) == 4
            for mine, their in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(their, mine + 1)


def test_what_comes_back_as_it_went_is_not_copied(pool_grid):
    arrays = ArrayRecord([np.zeros(100_000)])
    [reply] = pool_grid.send_and_receive([order(1000, "echo arrays", arrays=arrays)])
    assert reply.content["arrays"]["0"].data is arrays["0"].data
    assert pool_grid.client_states()[0]["last"]["0"].data is arrays["0"].data


def test_different_arrays_for_each_client_do_not_mix(pool_grid):
    messages = [
        order(node, "add one", arrays=ArrayRecord([np.full(50_000, float(node)), np.arange(30_000.0)]))
        for node in pool_grid.get_node_ids()
    ]
    for node, reply in zip(pool_grid.get_node_ids(), pool_grid.send_and_receive(messages), strict=True):
        np.testing.assert_array_equal(reply.content["arrays"]["0"].numpy(), np.full(50_000, node + 1.0))
        np.testing.assert_array_equal(reply.content["arrays"]["1"].numpy(), np.arange(1.0, 30_001.0))


@pytest.mark.parametrize(("do", "reason"), [("exit", "exit code 7"), ("killed", "signal SIGKILL; out of memory?")])
def test_a_worker_that_dies_costs_one_message_and_is_replaced(pool_grid, do, reason):
    replies = pool_grid.send_and_receive([order(1000), order(1001, do), order(1002), order(1003)])
    assert [reply.has_error() for reply in replies] == [False, True, False, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reason in replies[1].error.reason
    again = pool_grid.send_and_receive([order(node, "sleep", seconds=0.3) for node in (1000, 1001)])
    assert len({process_of(reply) for reply in again}) == 2
    assert again[1].content["answer"]["visits"] == 1  # what the dead worker did to the state is gone


def test_a_child_that_outlives_its_worker_does_not_hide_the_death(pool_grid):
    start = time.monotonic()
    [reply] = pool_grid.send_and_receive([order(1000, seconds=20, message_type="query.family")])
    assert "exit code 9" in reply.error.reason
    assert time.monotonic() - start < 10


def test_a_worker_that_exceeds_the_timeout_is_killed_and_replaced():
    with ProcessPoolExecutor(OBEDIENT, 1, timeout=1) as executor:
        grid = LocalGrid(executor, 3)
        [before] = grid.send_and_receive([order(1000)])
        start = time.monotonic()
        late, after = grid.send_and_receive([order(1001, "hang"), order(1002)])
        assert time.monotonic() - start < 10
        assert late.error.reason == "timed out after 1 s"
        assert process_of(after) != process_of(before)
        assert wait_until(lambda: is_gone(process_of(before)))


def test_a_message_that_is_given_up_does_not_keep_its_worker():
    with ProcessPoolExecutor(OBEDIENT, 1) as executor:
        grid = LocalGrid(executor, 3)
        assert grid.send_and_receive([order(1000, "hang"), order(1001)], timeout=0.5) == []
        [reply] = grid.send_and_receive([order(1000)], timeout=20)
        assert reply.content["answer"]["visits"] == 1


def test_nothing_is_left_behind(pool):
    def files():
        return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))

    grid = LocalGrid(pool, 6)
    grid.send_and_receive([order(node, "sleep", seconds=0.3) for node in (1000, 1001)])  # both workers are there
    before = files()
    for do in ("echo arrays", "add one", "raise", "echo arrays", "add one"):
        arrays = ArrayRecord([np.zeros(100_000)])
        grid.send_and_receive([order(node, do, arrays=arrays) for node in grid.get_node_ids()])
    # Only a worker's file of replies stays open, and only one per worker.
    assert files()[0] <= before[0] + 2
    assert files()[1] == before[1]


def test_a_worker_that_dies_idle_costs_no_message(pool_grid):
    messages = [order(node, "sleep", seconds=0.2) for node in (1000, 1001)]
    idle = {process_of(reply) for reply in pool_grid.send_and_receive(messages)}
    for process in idle:
        os.kill(process, signal.SIGKILL)
    assert wait_until(lambda: all(is_gone(process) for process in idle))
    time.sleep(0.5)  # the fork server, their parent, tells the pool a moment after the kernel tells us
    replies = pool_grid.send_and_receive([order(node) for node in pool_grid.get_node_ids()])
    assert idle.isdisjoint(process_of(reply) for reply in replies)


def test_workers_do_not_mind_ctrl_c(pool_grid):
    [first] = pool_grid.send_and_receive([order(1000)])
    ids = pool_grid.push_messages([order(node, "sleep", seconds=0.5) for node in (1000, 1001)])
    time.sleep(0.1)
    os.kill(process_of(first), signal.SIGINT)
    assert pool_grid.wait(ids[:1], 10)
    assert pool_grid.wait(ids[1:], 10)
    assert [reply.has_content() for reply in pool_grid.pull_messages(ids)] == [True, True]
    assert not is_gone(process_of(first))


def test_a_pool_that_is_closed_leaves_neither_process_nor_file():
    before = len(os.listdir("/proc/self/fd"))
    executor = ProcessPoolExecutor(OBEDIENT, 2)
    grid = LocalGrid(executor, 2)
    arrays = ArrayRecord([np.zeros(100_000)])
    replies = grid.send_and_receive([order(node, "sleep", seconds=0.3, arrays=arrays) for node in (1000, 1001)])
    grid.push_messages([order(1000, "hang", arrays=arrays)])
    start = time.monotonic()
    executor.close()
    executor.close()
    assert time.monotonic() - start < 5
    assert all(is_gone(process_of(reply)) for reply in replies)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(RuntimeError, match="closed"):
        grid.push_messages([order(1001)])


def test_workers_get_their_environment_gpu_and_threads(monkeypatch):
    monkeypatch.setenv("FEDBD_TEST_OURS", "of the driver")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    names = ["FEDBD_TEST_OURS", "FEDBD_TEST_AGENT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
    worker_env = {"FEDBD_TEST_AGENT": "handle 5"}
    with ProcessPoolExecutor(OBEDIENT, 3, worker_env=worker_env, cuda_devices=[4, 6]) as executor:
        messages = [order(node, "environment", names=names, seconds=0.4) for node in (1000, 1001, 1002)]
        seen = [dict(reply.content["environment"]) for reply in LocalGrid(executor, 3).send_and_receive(messages)]
    assert sorted(each.pop("CUDA_VISIBLE_DEVICES") for each in seen) == ["4", "4", "6"]
    expected = {"FEDBD_TEST_OURS": "of the driver", "FEDBD_TEST_AGENT": "handle 5"}
    assert seen == [expected | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 3
    assert os.environ["OMP_NUM_THREADS"] == "8"


def test_an_app_that_cannot_be_loaded_is_told_at_once(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(
        RunFailed, match=r"could not load the ClientApp: ModuleNotFoundError.*a_module_that_is_not_there"
    ):
        ProcessPoolExecutor((broken, "app"), 2)
    with pytest.raises(RunFailed, match=r"absent.py: must be the Python file"):
        ProcessPoolExecutor((tmp_path / "absent.py", "app"), 1)
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(RunFailed, match=r"could not load the ClientApp: timed out after 0.3 s"):
        ProcessPoolExecutor((slow, "app"), 1, start_timeout=0.3)


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="app_factory"):
        ProcessPoolExecutor(lambda: None, 1)
    with pytest.raises(UserError) as refused:
        ProcessPoolExecutor(OBEDIENT, 0, timeout=0, cuda_devices=[])
    assert [problem.path for problem in refused.value.problems] == ["workers", "timeout", "cuda_devices"]


DRIVER = """
    import sys
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict
    from fedbd import fork_server
    from fedbd.flower.executors import ProcessPoolExecutor
    from fedbd.flower.local_grid import LocalGrid

    fork_server.PRELOAD.remove("torch._dynamo")  # nobody trains here: two seconds saved
    # No guard of __name__ on purpose: workers must not run this file again.
    print("started", flush=True)
    executor = ProcessPoolExecutor((Path({toys!r}) / "obedient.py", "app"), 2)
    grid = LocalGrid(executor, 4)

    def ask(do, **orders):
        content = RecordDict({{"orders": ConfigRecord({{"do": do, **orders}})}})
        return [Message(content, node, "train") for node in grid.get_node_ids()[:2]]

    for reply in grid.send_and_receive(ask("sleep", seconds=0.4)):
        print(reply.content["answer"]["process"], flush=True)
    print("ready", flush=True)
    if sys.argv[1] == "hang":
        with executor:
            grid.send_and_receive(ask("hang"))
"""


def driver(tmp_path, what):
    """Start a script that uses a pool of two; return it and its workers' process ids."""
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER).format(toys=str(TOYS)))
    process = subprocess.Popen(
        [sys.executable, str(script), what],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        if line.strip() == "ready":
            break
        lines.append(line.strip())
    return process, [int(line) for line in lines if line.isdigit()], lines


def test_a_script_without_guard_or_close_ends_well_in_a_folder_full_of_traps(tmp_path):
    traps, scripts = tmp_path / "traps", tmp_path / "scripts"
    traps.mkdir()
    scripts.mkdir()
    for trap in ("clients", "random", "obedient", "server"):
        (traps / f"{trap}.py").write_text("raise RuntimeError('the wrong module was imported')\n")
    script = scripts / "driver.py"
    script.write_text(textwrap.dedent(DRIVER).format(toys=str(TOYS)))
    done = subprocess.run(
        [sys.executable, str(script), "end"],
        cwd=traps,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("started") == 1
    assert done.stderr == ""
    assert all(is_gone(int(pid)) for pid in done.stdout.split() if pid.isdigit())


def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    process, workers, _ = driver(tmp_path, "hang")
    try:
        assert len(set(workers)) == 2
        time.sleep(0.3)  # both are now amid a message that never ends
        assert not any(is_gone(pid) for pid in workers)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert wait_until(lambda: all(is_gone(pid) for pid in workers))
        assert "leaked" not in process.stderr.read()
    finally:
        end(process)


def test_ctrl_c_ends_the_driver_and_its_workers_quietly(tmp_path):
    process, workers, _ = driver(tmp_path, "hang")
    try:
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert process.wait(10) == -signal.SIGINT
        error = process.stderr.read()
        assert error.count("Traceback") == 1
        assert "KeyboardInterrupt" in error
        assert "leaked" not in error
        assert wait_until(lambda: all(is_gone(pid) for pid in workers))
    finally:
        end(process)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
