from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbd.flower.runtime import RunOutcome, run_app
from fedbd.flower.supervisor import descendants

APP = Path(__file__).parent / "toy_flwr_app"
MESSAGE = '{"name": "it\'s \\"quoted\\"", "k=v": [1, 2],\n "text": "\t\u00fc\u20ac\U0001f600 \\n \x7f # \'\'\' "}'
DECOY = 'raise SystemExit("a module of the same name, but not the app\'s")\n'

pytestmark = pytest.mark.flower


class Witness:
    """Remembers every process below this one that it has seen, by id and start time; serves as ``poll``."""

    def __init__(self, out: Path | None = None) -> None:
        self.out = out
        self.before = {(pid, start_time(pid)) for pid in descendants(os.getpid())}  # other tests' fork server
        self.seen: set[tuple[int, str]] = set()
        self.titles: set[bytes] = set()
        self.actors: set[int] = set()
        self.most_actors = 0
        self.rounds: set[int] = set()

    def __call__(self) -> None:
        actors = set()
        for pid in descendants(os.getpid()):
            if (begun := start_time(pid)) and (pid, begun) not in self.before:
                self.seen.add((pid, begun))
                title = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b""
                if b"ClientAppActor" in title:
                    actors.add(pid)
                self.titles.add(title)
        self.most_actors = max(self.most_actors, len(actors))
        self.actors |= actors
        if self.out is not None and self.out.exists():
            self.rounds.add(len(json.loads(self.out.read_text())["rounds"]))

    def survivors(self) -> list[int]:
        return [pid for pid, begun in self.seen if start_time(pid) == begun]


def start_time(pid: int) -> str:
    """Return when a process started, in the kernel's words; empty where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def bearers(mark: str) -> list[str]:
    """Return the command lines of all processes of this machine whose environment holds the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def hostile_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory and a PYTHONPATH full of modules named like the app's, and a Ray address that is none."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "server.py").write_text(DECOY)
    (place / "clients.py").write_text(DECOY)
    for package in ("server", "clients"):
        (place / "path" / package).mkdir(parents=True)
        for module in ("__init__", "app", "answer"):
            (place / "path" / package / f"{module}.py").write_text(DECOY)
    # Ray's files go to the system's temporary folder; one of our own shows what is left of them.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        patch.setattr(tempfile, "tempdir", temporary)
        patch.chdir(place)
        patch.setenv("PYTHONPATH", str(place / "path"))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        patch.setenv("TOY_CLIENT", "meant for the client, but the caller has it too")
        yield place


Finished = tuple[RunOutcome, dict[str, Any], Witness]


def finished(mode: str, folder: Path, **options: Any) -> Finished:
    out = folder / "out.json"
    witness = Witness(out)
    outcome = run_app(
        APP,
        mode=mode,  # type: ignore[arg-type]
        clients=2,
        run_config={"out": str(out), "message": MESSAGE, "pause": 0.5},
        work_dir=folder,
        server_env={"TOY_SERVER": "server's"},
        client_env={"TOY_CLIENT": "client's"},
        timeout=200,
        poll=witness,
        **options,
    )
    assert outcome.status == "completed", outcome
    return outcome, json.loads(out.read_text()), witness


@pytest.fixture(scope="module")
def ray_run(hostile_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished("ray", tmp_path_factory.mktemp("ray"), workers=1)


@pytest.fixture(scope="module")
def deployed_run(hostile_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("deployment")
    return finished("deployment", folder, node_config=lambda p: {"keys": f"/keys of '{p}'", "port": 7000 + p})


@pytest.fixture(params=["ray_run", "deployed_run"])
def run(request: pytest.FixtureRequest) -> Finished:
    return request.getfixturevalue(request.param)


def test_both_runtimes_give_the_same_result(ray_run: Finished, deployed_run: Finished) -> None:
    answers = [
        [[reply["value"] for reply in replies] for replies in run[1]["rounds"]] for run in (ray_run, deployed_run)
    ]
    assert answers[0] == answers[1] == [[100, 101], [200, 201]]


def test_strings_arrive_unharmed(run: Finished) -> None:
    _, result, _ = run
    assert result["message"] == MESSAGE
    assert {reply["message"] for replies in result["rounds"] for reply in replies} == {MESSAGE}


def test_the_apps_own_code_runs_with_this_python_in_an_empty_folder(run: Finished) -> None:
    outcome, result, _ = run
    home = outcome.logs.parent / "flwr-home"
    for place in [result, *(reply for replies in result["rounds"] for reply in replies)]:
        assert Path(place["file"]).is_relative_to(home)
        assert place["python"] == sys.prefix
        assert Path(place["cwd"]).parent == outcome.logs.parent
        assert not Path(place["cwd"]).exists()


def test_the_bundle_holds_what_the_app_includes_and_nothing_else(run: Finished) -> None:
    outcome, _, _ = run
    bundles = list(outcome.logs.parent.glob("flwr-home/**/apps/fedbd.toy.*"))
    assert bundles
    for bundle in bundles:
        names = {
            str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file() and path.suffix != ".pyc"
        }
        code = {"clients/__init__.py", "clients/answer.py", "clients/app.py", "server/__init__.py", "server/app.py"}
        assert names == code | {"pyproject.toml", "scenarios/toy.yaml"}


def test_no_process_and_no_file_of_ray_is_left(run: Finished) -> None:
    outcome, _, witness = run
    assert len(witness.seen) > 5
    assert witness.survivors() == []
    assert bearers("TOY_SERVER=server's") == bearers("TOY_CLIENT=client's") == []
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    assert {"run.log", "superlink.log"} <= {path.name for path in outcome.logs.iterdir()}
    assert (outcome.logs / "ray").exists() == any(b"raylet" in title for title in witness.titles)
    assert "toy server starts" in (outcome.logs / "run.log").read_text()


def test_poll_sees_the_rounds_go_by(run: Finished) -> None:
    assert run[2].rounds >= {1, 2}


def test_ray_runs_as_many_clients_at_once_as_workers_says(ray_run: Finished) -> None:
    _, result, witness = ray_run
    assert witness.most_actors == len(witness.actors) == 1
    assert {reply["pid"] for replies in result["rounds"] for reply in replies} == witness.actors


def test_each_side_sees_only_its_own_environment_in_a_deployment(deployed_run: Finished) -> None:
    _, result, _ = deployed_run
    assert result["environment"] == {"TOY_SERVER": "server's"}
    for replies in result["rounds"]:
        assert [reply["environment"] for reply in replies] == [{"TOY_CLIENT": "client's"}] * 2


def test_supernodes_get_their_node_config(deployed_run: Finished) -> None:
    _, result, _ = deployed_run
    for partition, reply in enumerate(result["rounds"][0]):
        own = {"keys": f"/keys of '{partition}'", "port": 7000 + partition}
        assert reply["node_config"] == {"partition-id": partition, "num-partitions": 2, **own}


def test_a_server_app_that_fails_is_reported_with_its_reason(tmp_path: Path) -> None:
    config = {"out": str(tmp_path / "out.json"), "fail": "server"}
    outcome = run_app(APP, mode="deployment", clients=1, run_config=config, work_dir=tmp_path, timeout=200)
    assert outcome.status == "failed"
    assert outcome.reason.startswith("ValueError: the toy server fails as told: \u00fc, 100 % (")
    assert "server/app.py:" in outcome.reason


def test_an_app_that_flower_refuses_is_reported(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    project = app / "pyproject.toml"
    project.write_text(project.read_text().replace("scenarios/**/*.yaml", "scenes/**/*.yaml"))
    outcome = run_app(app, mode="ray", clients=1, run_config={}, work_dir=tmp_path / "work", timeout=200)
    assert outcome.status == "failed"
    assert "scenes/**/*.yaml" in outcome.reason


def test_a_key_that_the_app_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no nonsense in"):
        run_app(APP, mode="ray", clients=1, run_config={"nonsense": 1, "fail": ""}, work_dir=tmp_path)


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    witness = Witness()
    config = {"out": str(tmp_path / "out.json"), "pause": 600.0}
    begin = time.monotonic()
    outcome = run_app(
        APP, mode="deployment", clients=2, run_config=config, work_dir=tmp_path, timeout=5, poll=witness,
        server_env={"TOY_MARK": str(tmp_path)}, client_env={"TOY_MARK": str(tmp_path)},
    )  # fmt: skip
    assert outcome.status == "timeout"
    assert "in time" in outcome.reason
    assert time.monotonic() - begin < 5 + 15
    assert witness.seen
    assert witness.survivors() == bearers(str(tmp_path)) == []


INTERRUPTED = """
import sys
from pathlib import Path
from fedbd.flower.runtime import run_app
folder = Path(sys.argv[2])
config = {"out": str(folder / "out.json"), "pause": 600.0}
marks = {"TOY_MARK": sys.argv[2]}
try:
    run_app(Path(sys.argv[1]), mode="ray", clients=2, run_config=config, work_dir=folder, server_env=marks)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_in_the_middle_of_a_ray_run_leaves_nothing_behind(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", INTERRUPTED, str(APP), str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as caller:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.json").exists():
            assert caller.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running = bearers(str(tmp_path))
        assert any("raylet" in line for line in running)
        assert any("gcs_server" in line for line in running)
        assert any("ClientAppActor" in line for line in running)
        caller.send_signal(signal.SIGINT)
        words, _ = caller.communicate(timeout=30)
    assert words == "interrupted\n"
    assert bearers(str(tmp_path)) == []


def test_what_poll_raises_ends_the_run(tmp_path: Path) -> None:
    def stop() -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        run_app(
            APP,
            mode="ray",
            clients=1,
            run_config={},
            work_dir=tmp_path,
            poll=stop,
            server_env={"TOY_MARK": str(tmp_path)},
        )
    assert bearers(str(tmp_path)) == []


def test_a_ray_cluster_that_does_not_answer_is_no_hang(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = run_app(APP, mode="ray", clients=1, run_config={}, work_dir=tmp_path, ray_address="127.0.0.1:1")
    assert (outcome.status, outcome.reason) == ("failed", "no Ray cluster answers at 127.0.0.1:1")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"workers": 0}, {"client_cpus": 0}, {"node_config": lambda p: {}}])
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        run_app(APP, **{"mode": "ray", "clients": 1, "run_config": {}, "work_dir": tmp_path, **wrong})
