from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import fedbd
from fedbd.cli import main as cli
from fedbd.config.scenario import fingerprint, load_scenario, to_dict
from fedbd.config.scenario_file import parse_yaml
from fedbd.registry import METHODS

ROOT = Path(fedbd.__file__).resolve().parent.parent
SMALL = """\
name: small
seed: 1
rounds: 2
data: digits
partition: {name: iid, clients: 3}
model: {name: mlp, hidden: [16]}
training: {epochs: 1, batch_size: 64, lr: 0.05}
attacks:
  - {name: badnets, clients: {count: 1}, target: 0, trigger: grid}
"""
CLEAN = SMALL.replace("name: small", "name: small-clean").replace("name: badnets,", "name: badnets, enabled: false,")
NO_ATTACK = SMALL.partition("attacks:")[0]
FAILING = '''
from __future__ import annotations

from dataclasses import dataclass

from fedbd.training import train


@dataclass(frozen=True, kw_only=True)
class Fails:
    """Trains once, and fails in its second round."""

    def fit(self, model, data, plan, memory, rng):
        import numpy as np

        if "rounds" in memory:
            raise RuntimeError("the second round is too much")
        return {"rounds": np.array([1])}, train(model, data, plan, rng)
'''


class Said(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture
def fedbd_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedbd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)

    return call


def outside(*words: str | Path, folder: Path, **environment: str) -> Said:
    """Run the command line as a user does, in a folder of its own."""
    variables = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "fedbd", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


# Quick commands.


def test_help_is_quick_and_imports_nothing_slow(tmp_path: Path) -> None:
    code = (
        "import sys, time; started = time.perf_counter(); sys.argv = ['fedbd', '--help']\n"
        "from fedbd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: status = ended.code\n"
        "slow = [name for name in ('torch', 'numpy', 'flwr', 'ray', 'pydantic') if name in sys.modules]\n"
        "print('END', status, slow)"
    )
    times = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        times.append(time.perf_counter() - started)
        assert done.stdout.rstrip().endswith("END 0 []")
        assert "run " in done.stdout
        assert "validate" in done.stdout
        if times[-1] < 1.5:
            break
    assert min(times) < 1.5


@pytest.mark.parametrize("command", ["run", "validate", "list", "show", "doctor"])
def test_every_command_has_help(command: str, fedbd_: Callable[..., Said]) -> None:
    for option in ("-h", "--help"):
        said = fedbd_(command, option)
        assert said.status == 0
        assert f"Usage: fedbd {command}" in said.out


def test_help_tells_of_arguments_and_fills_its_lines(
    fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = fedbd_("train", "--help").out
    assert "A central training (YAML). [required]" in said
    text = said.partition("attack-free twin.")[2].partition("Arguments")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()][:-1]
    assert len(lines) == 3
    assert all(len(line) > 60 for line in lines[:-1])


def test_version(fedbd_: Callable[..., Said]) -> None:
    assert fedbd_("--version") == Said(0, f"fedbd {fedbd.__version__}\n", "")


def test_list(fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("list")
    assert said.status == 0
    rows = [line.split()[:2] for line in said.out.splitlines()[1:] if line.strip()]
    named = [tuple(row) for row in rows if tuple(row) in {(k, n) for k, ms in METHODS.items() for n in ms}]
    assert named == [(kind, name) for kind, methods in METHODS.items() for name in methods]
    assert [line.split()[1] for line in fedbd_("list", "model").out.splitlines()[1:]] == list(METHODS["model"])


def test_show_a_method(fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("show", "median")
    assert said.status == 0
    assert said.out.startswith("aggregation: median  (fedbd.defenses.aggregation.median:Median)\n")
    assert "https://arxiv.org/abs/1803.01498" in said.out


def test_show_a_scenario_resolves_it(small: Path, fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("show", small)
    scenario = load_scenario(small)
    assert said.status == 0
    assert said.out.startswith(f"# resolved by fedbd; fingerprint {fingerprint(scenario)}\n")
    assert parse_yaml(said.out, "out") == to_dict(scenario)


def test_doctor_finds_this_installation_good(fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("doctor")
    assert said.status == 0, said.text
    names = [
        "Python",
        "packages",
        "devices",
        "Flower app",
        "Flower runtime",
        "methods",
        "worker process",
        "encrypted sum",
    ]
    assert [line for line in said.out.splitlines() if not line.startswith("ok")] == []
    assert all(any(line.removeprefix("ok   ").startswith(name) for line in said.out.splitlines()) for name in names)


def test_doctor_says_what_to_do(fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbd.cli import doctor

    def broken() -> doctor.Check:
        raise OSError("no such library")

    good = doctor.Check("fine", "yes")
    monkeypatch.setattr(doctor, "LOOKS", {"fine": lambda: good, "sum": broken})
    said = fedbd_("doctor")
    assert said.status == 1
    assert said.out.splitlines()[0].split() == ["ok", "fine", "yes"]
    assert said.out.splitlines()[1].split(maxsplit=2) == ["BAD", "sum", "OSError: no such library"]
    assert said.out.splitlines()[2].strip() == "reinstall fedbd with its constraints file"


def test_doctor_starts_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedbd.cli import doctor

    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "app.py").write_text("raise ImportError('no libfoo.so')")
    monkeypatch.setattr(doctor, "flower_app_dir", lambda: tmp_path)
    monkeypatch.setattr(doctor, "LOOKS", {"worker process": doctor.LOOKS["worker process"]})
    (check,) = doctor.examine()
    assert not check.good
    assert "no libfoo.so" in check.found


# Validating.


def test_validate_a_good_scenario(small: Path, fedbd_: Callable[..., Said]) -> None:
    assert fedbd_("validate", small) == Said(0, f"{small}: good\n", "")


def test_validate_prints_what_it_resolved_with_its_settings(small: Path, fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("validate", small, "--resolved", "-s", "training.lr=1e-3", "--set", "model.hidden=[4]")
    assert said.status == 0
    assert parse_yaml(said.out, "out") == to_dict(load_scenario(small, ["training.lr=1e-3", "model.hidden=[4]"]))


def test_validate_tells_of_every_file_what_is_wrong(small: Path, tmp_path: Path, fedbd_: Callable[..., Said]) -> None:
    texts = {
        "fields": SMALL.replace("lr: 0.05", "lr: fast"),
        "strategy": NO_ATTACK + "strategy: {name: fedadam, arguments: {etta: 1}}\n",
        "data": NO_ATTACK + "trusted: {size: 4000}\n",
        "yaml": "name: [",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    said = fedbd_("validate", *(tmp_path / f"{name}.yaml" for name in texts), small)
    assert said.status == 2
    assert said.out == f"{small}: good\n"
    assert said.err.splitlines() == [
        f"{tmp_path}/fields.yaml is not a scenario that can run:",
        "  training.lr: must be a number, got 'fast'",
        f"{tmp_path}/strategy.yaml is not a scenario that can run:",
        "  strategy.arguments.etta: is no argument of FedAdam; did you mean 'eta'?",
        "scenario 'small' does not fit its data:",
        "  trusted.size: must leave samples for the clients: less than 1348, got 4000",
        f"{tmp_path}/yaml.yaml:1:8: must be YAML: expected the node content, but found '<stream end>', while parsing a "
        "flow node that starts at line 1, column 8",
    ]


def test_validate_without_data_reads_none(tmp_path: Path, fedbd_: Callable[..., Said]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SMALL.replace("data: digits", "data: {name: npz, file: gone.npz, root: /nowhere}"))
    assert fedbd_("validate", path, "--no-data").status == 0
    assert fedbd_("validate", path).status == 2


# Mistakes: status 2, a sentence that helps, no traceback.

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such file": (["run", "gone.yaml"], "gone.yaml: must be a readable YAML file: No such file or directory"),
    "no file at all": (["run"], "Missing argument 'SCENARIOS...'"),
    "a folder": (["validate", "."], ".: must be a readable YAML file: Is a directory"),
    "no YAML": (["validate", "torn.yaml"], "torn.yaml:1:8: must be YAML"),
    "wrong fields": (["run", "wrong.yaml"], "training.lr: must be a number, got 'fast'"),
    "wrong setting": (["run", "small.yaml", "-s", "rounds"], "--set rounds: must be PATH=VALUE"),
    "setting of another type": (["run", "small.yaml", "-s", "rounds=x"], "rounds: must be an integer, got 'x'"),
    "wrong strategy": (
        ["run", "small.yaml", "-s", "strategy={name: fedadam, arguments: {etta: 1}}"],
        "small.yaml is not a scenario that can run:\n  strategy.arguments.etta: is no argument of FedAdam; did you "
        "mean 'eta'?",
    ),
    "one name twice": (["run", "small.yaml", "small.yaml"], "is wanted by two scenarios"),
    "a table of no kind": (
        ["run", "small.yaml", "--table", "t.txt"],
        "--table: must end in .csv or .json, got 't.txt'",
    ),
    "a table nowhere": (
        ["run", "small.yaml", "--table", "gone/t.csv"],
        "--table: must be a file in a folder that exists",
    ),
    "a file for the runs": (
        ["run", "small.yaml", "--seeds", "2", "--out", "small.yaml"],
        "nothing was started:\n  small.yaml: must be a folder that can be written; pass --out with another folder\n",
    ),
    "a central training": (
        ["run", "one.yaml"],
        "one.yaml: must be a scenario, got a central training (one model on one data set); use fedbd train one.yaml",
    ),
    "no seeds": (["run", "small.yaml", "--seeds", "0"], "'--seeds': 0 is not in the range 1<=x<=1000"),
    "too many seeds": (["run", "small.yaml", "--seeds", "100000000"], "100000000 is not in the range 1<=x<=1000"),
    "too many trainings": (["train", "small.yaml", "--seeds", "1001"], "1001 is not in the range 1<=x<=1000"),
    "unknown option": (["run", "small.yaml", "--overwite"], "--overwite"),
    "unknown command": (["runn"], "No such command 'runn'"),
    "unknown kind": (["list", "modell"], "did you mean 'model'?"),
    "unknown method": (["show", "medien"], "did you mean 'median'?"),
    "no run in a folder": (
        ["show", "."],
        ".: must be a run's folder, got a folder without scenario.yaml; name what `fedbd",
    ),
    "no run to split": (["show", "--partition", "."], ".: must be a run's folder, got a folder without scenario.yaml"),
    "a table of a method": (["show", "median", "--table", "t.csv"], "--table: is for a run's folder, got 'median'"),
    "missing data": (
        ["validate", "small.yaml", "-s", "data={name: npz, file: a.npz, root: /nowhere}"],
        "scenario 'small' does not fit its data:\n  a.npz: must lie in /nowhere",
    ),
    "data that do not suffice": (
        ["run", "small.yaml", "--overwrite", "-s", "trusted={size: 5000}"],
        "scenario 'small' does not fit its data:\n  trusted.size: must leave samples for the clients",
    ),
    "no GPU": (["validate", "small.yaml", "-s", "engine.device=cuda"], "engine.device: no CUDA device is here"),
}


@pytest.mark.parametrize(("words", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_sentence(
    words: list[str],
    sentence: str,
    small: Path,
    tmp_path: Path,
    fedbd_: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words[-1] == "engine.device=cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.yaml").write_text("name: [")
    (tmp_path / "one.yaml").write_text("name: a\ndata: digits\nmodel: mlp\nheld_out: 0\n")
    (tmp_path / "wrong.yaml").write_text(SMALL.replace("lr: 0.05", "lr: fast"))
    before = {path.name for path in tmp_path.iterdir()}
    said = fedbd_(*words)
    assert said.status == 2
    assert sentence in said.err
    assert "Traceback" not in said.text
    assert said.out == ""
    assert {path.name for path in tmp_path.iterdir()} == before  # nothing was begun


def test_a_command_that_is_none_is_told_its_like_once(fedbd_: Callable[..., Said]) -> None:
    assert fedbd_("runn").err.count("Did you mean 'run'?") == 1


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(SMALL.replace("lr: 0.05", "lr: fast"))
    said = outside("run", "wrong.yaml", folder=tmp_path)
    assert said == Said(
        2, "", "wrong.yaml is not a scenario that can run:\n  training.lr: must be a number, got 'fast'\n"
    )


def test_an_interrupt_is_status_130(fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    said = fedbd_()
    assert (said.status, said.err) == (130, "interrupted\n")


def test_our_own_failures_are_status_1(fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS["model"], "mlp", "fedbd.models.gone:Mlp")
    said = fedbd_("show", "mlp")
    assert said.status == 1
    assert said.err.startswith("model mlp: fedbd.models.gone cannot be imported")
    assert "Traceback" not in said.text


# Running.


class Runs(NamedTuple):
    """Two scenarios with two seeds each, run by one command; the second is the first one's attack-free twin."""

    folder: Path
    said: Said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "clean.yaml").write_text(CLEAN)
    said = outside("run", "small.yaml", "clean.yaml", "--seeds", "2", "--table", "table.csv", folder=folder)
    return Runs(folder, said)


PLACES = [f"runs/{name}/seed-{seed}" for name in ("small", "small-clean") for seed in (1, 2)]


def test_a_run_leaves_its_folders_and_no_others(runs: Runs) -> None:
    assert runs.said.status == 0, runs.said.text
    assert "Traceback" not in runs.said.text
    found = {path.parent.relative_to(runs.folder).as_posix() for path in runs.folder.rglob("summary.json")}
    assert found == set(PLACES)  # the clean scenario is the twin: none was run beside it
    for place in PLACES:
        lines = [json.loads(line) for line in (runs.folder / place / "rounds.jsonl").read_text().splitlines()]
        summary = json.loads((runs.folder / place / "summary.json").read_text())
        assert [line["round"] for line in lines] == [0, 1, 2]
        assert (summary["status"], summary["rounds"], summary["reason"]) == ("finished", 2, None)
        assert {"scenario.yaml", "environment.json", "model.safetensors"} <= {
            path.name for path in (runs.folder / place).iterdir()
        }


def test_the_floor_of_an_attack_is_the_clean_scenarios_success(runs: Runs) -> None:
    for seed in (1, 2):
        attacked, clean = (
            [
                json.loads(line)
                for line in (runs.folder / f"runs/{name}/seed-{seed}/rounds.jsonl").read_text().splitlines()
            ]
            for name in ("small", "small-clean")
        )
        floors = [None if line["collapsed"] else line["attack_success"] for line in clean]
        assert [line["attack_success_floor"] for line in attacked] == floors
        summaries = (json.loads((runs.folder / f"{place}/summary.json").read_text()) for place in PLACES[seed - 1 :: 2])
        assert [summary["twin"] for summary in summaries] == [f"../../small-clean/seed-{seed}", None]
        assert [line["attackers"] for line in clean[1:]] == [[], []]
        assert all(len(line["attackers"]) == 1 for line in attacked[1:])


def test_the_resolved_scenario_beside_the_records_runs_again(runs: Runs) -> None:
    written = load_scenario(runs.folder / "runs/small/seed-2/scenario.yaml")
    asked = load_scenario(runs.folder / "small.yaml", ["seed=2"])
    summary = json.loads((runs.folder / "runs/small/seed-2/summary.json").read_text())
    assert fingerprint(written) == fingerprint(asked) == summary["fingerprint"]


def test_every_round_is_printed_and_the_comparison_names_the_arms_in_the_order_given(runs: Runs) -> None:
    out = runs.said.out
    for name in ("small", "small-clean"):
        for seed in (1, 2):
            for round_ in range(3):
                assert f"{name} seed {seed}  round {round_}/2" in out
            assert re.search(rf"{name} seed {seed}  done(, COLLAPSED,)? after 2 rounds", out)
    assert "the difference to small, paired by seed" in out
    assert out.index("\n small ") < out.index("\n small-clean ")
    assert "WARNING" not in runs.said.text


def test_the_comparison_as_csv(runs: Runs) -> None:
    with open(runs.folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seeds"], row["unfinished"]) for row in rows] == [
        ("small", "2", "0"),
        ("small-clean", "2", "0"),
    ]
    for row in rows:
        values = [
            json.loads((runs.folder / f"runs/{row['arm']}/seed-{seed}/summary.json").read_text())["clean_accuracy"]
            for seed in (1, 2)
        ]
        assert float(row["clean_accuracy_mean"]) == pytest.approx(sum(values) / 2)
        assert float(row["clean_accuracy_min"]) == pytest.approx(min(values))
    assert rows[0]["clean_accuracy_difference"] == ""
    difference = float(rows[1]["clean_accuracy_mean"]) - float(rows[0]["clean_accuracy_mean"])
    assert float(rows[1]["clean_accuracy_difference"]) == pytest.approx(difference)


def test_a_taken_folder_is_left_alone(runs: Runs, fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.folder)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in runs.folder.rglob("*")}
    said = fedbd_("run", "small.yaml", "-s", "seed=2")
    assert said.status == 2
    assert said.err == (
        "nothing was started:\n  runs/small/seed-2: holds an earlier run; pass --overwrite to replace it, or --out "
        "with another folder\n"
    )
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in runs.folder.rglob("*")} == before


def test_show_a_run(runs: Runs, fedbd_: Callable[..., Said]) -> None:
    folder = runs.folder / "runs/small/seed-1"
    said = fedbd_("show", folder)
    assert said.status == 0
    assert "small" in said.out
    assert "CA %" in said.out
    assert f"Attack-free twin: {runs.folder / 'runs/small-clean/seed-1'}\n" in said.out
    assert f"Curves: {folder / 'curves.png'}" in said.out
    assert (folder / "curves.png").stat().st_size > 1000


def test_a_run_that_fails_in_its_second_round_keeps_the_first_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "someones.py").write_text(FAILING)
    (tmp_path / "fails.yaml").write_text(NO_ATTACK + "local_defense: {name: 'someones:Fails'}\n")
    said = outside("run", "fails.yaml", folder=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    folder = tmp_path / "runs/small/seed-1"
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert said.status == 1
    assert "Traceback" not in said.text
    reason = "round 2: client 0: RuntimeError: the second round is too much (and 2 more clients)"
    assert said.err.splitlines()[0] == f"runs/small/seed-1: {reason}"
    assert "someones.py" in said.err  # and where in whose code
    assert said.out.splitlines()[-1] == f"small seed 1  FAILED in {reason}"
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert summary["reason"].startswith(reason)
    assert [line["round"] for line in lines] == [0, 1]
    assert lines[1]["clean_accuracy"] is not None
    assert not (folder / "model.safetensors").exists()
    shown = outside("show", "runs/small/seed-1", folder=tmp_path)
    assert shown.status == 0
    assert "runs/small/seed-1: failed; 1 of 2 rounds are done" in shown.out
    assert reason in shown.out
    assert shown.out.splitlines()[-1] == "Go on with: fedbd resume runs/small/seed-1"
