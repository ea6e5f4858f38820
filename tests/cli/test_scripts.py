"""The command line for scripts: JSON and quiet output, tables, citations, completion, no terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedbd
from fedbd.cli import main as cli
from fedbd.cli.arguments import kind_names, method_names, names_and_paths
from fedbd.config.scenario import fingerprint, load_scenario, to_dict
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
engine: {executor: serial}
"""
ANSI = re.compile(r"\x1b\[")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_closed_are_no_matter(closed: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    command = f"exec {sys.executable} -m fedbd run small.yaml --out runs {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len((tmp_path / "runs" / "small" / "seed-1" / "rounds.jsonl").read_text().splitlines()) == 3


class Said(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def fedbd_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Said]:
    """Runs the command line in this process, in a folder of its own with ``small.yaml``."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)

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
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "fedbd", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """One run with ``--json``, colors forced, in a process of its own."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "small.yaml").write_text(SMALL)
    return folder, outside("run", "small.yaml", "--json", folder=folder, FORCE_COLOR="1")


# JSON.


def test_run_prints_one_object(ran: tuple[Path, Said]) -> None:
    folder, said = ran
    assert said.status == 0
    titles = [line.split("  ")[:2] for line in said.err.splitlines()]
    assert titles == [["small seed 1", f"round {n}/2"] for n in range(3)] + [["small seed 1", "done after 2 rounds"]]
    found = json.loads(said.out)
    assert list(found) == ["runs", "failures", "comparison"]
    assert found["failures"] == []
    (run,) = found["runs"]
    assert list(run) == ["folder", "name", "seed", "finished", "oracle", "rounds", "summary"]
    assert (run["folder"], run["name"], run["seed"], run["finished"], run["rounds"]) == (
        "runs/small/seed-1",
        "small",
        1,
        True,
        3,
    )
    assert run["summary"]["fingerprint"] == fingerprint(load_scenario(folder / "small.yaml"))
    written = json.loads((folder / "runs/small/seed-1/summary.json").read_text())
    assert run["summary"]["clean_accuracy"] == written["clean_accuracy"]
    (row,) = found["comparison"]
    assert (row["arm"], row["seeds"]) == ("small", 1)


def test_show_a_run_prints_one_object_and_draws_nothing(ran: tuple[Path, Said], fedbd_: Callable[..., Said]) -> None:
    folder, said = ran
    shown = fedbd_("show", folder / "runs/small/seed-1", "--json")
    assert (shown.status, shown.err) == (0, "")
    mine, theirs = json.loads(shown.out)["run"], json.loads(said.out)["runs"][0]
    assert {**mine, "folder": ""} == {**theirs, "folder": ""}
    assert not (folder / "runs/small/seed-1/curves.png").exists()


def test_a_failed_run_is_in_the_object(fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    said = fedbd_("run", "small.yaml", "--json", "-s", "data={name: npz, file: gone.npz, root: .}")
    assert said.status == 2
    (problem,) = json.loads(said.out)["problems"]
    assert problem["path"] == "gone.npz"
    assert said.err.startswith("scenario 'small' does not fit its data:\n  gone.npz: must lie in ")


def test_validate_prints_a_verdict_per_file(fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(SMALL.replace("lr: 0.05", "lr: fast").replace("rounds: 2", "rounds: 0"))
    said = fedbd_("validate", "small.yaml", "bad.yaml", "gone.yaml", "--json")
    assert said.status == 2
    good, bad, gone = json.loads(said.out)["scenarios"]
    scenario = load_scenario(tmp_path / "small.yaml")
    assert good == {
        "file": "small.yaml",
        "good": True,
        "problems": [],
        "scenario": json.loads(json.dumps(to_dict(scenario))),
        "fingerprint": fingerprint(scenario),
    }
    assert (bad["file"], bad["good"], bad["scenario"], bad["fingerprint"]) == ("bad.yaml", False, None, None)
    assert bad["problems"] == [
        {"of": "bad.yaml is not a scenario that can run:", "path": path, "expected": expected, "got": got, "remedy": ""}
        for path, expected, got in (("rounds", "must be >= 1", "0"), ("training.lr", "must be a number", "'fast'"))
    ]
    assert gone["problems"][0]["path"] == "gone.yaml"
    assert "training.lr: must be a number, got 'fast'" in said.err


def test_list_and_show_print_objects(fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    listed = json.loads(fedbd_("list", "--json").out)["methods"]
    assert [(entry["kind"], entry["name"]) for entry in listed] == [(k, n) for k, ms in METHODS.items() for n in ms]
    (shown,) = json.loads(fedbd_("show", "norm_clip", "--json").out)["methods"]
    assert (shown["kind"], shown["class"]) == ("aggregation", "fedbd.defenses.aggregation.norm_clip:NormClip")
    assert "https://arxiv.org/abs/1911.07963" in shown["source"]
    bound = next(field for field in shown["fields"] if field["name"] == "where")
    assert (bound["required"], bound["default"]) == (False, "server")
    resolved = json.loads(fedbd_("show", "small.yaml", "--json").out)
    assert resolved["scenario"]["cohort"]["size"] is None
    assert resolved["fingerprint"] == fingerprint(load_scenario(tmp_path / "small.yaml"))


def test_every_method_shows_as_json(fedbd_: Callable[..., Said]) -> None:
    for name in sorted({name for methods in METHODS.values() for name in methods}):
        said = fedbd_("show", name, "--json")
        assert said.status == 0
        assert all(method["name"] == name for method in json.loads(said.out)["methods"])


def test_doctor_prints_an_object_with_the_same_status(
    fedbd_: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedbd.cli import doctor

    good = doctor.Check("fine", "yes", True, "for when it is not")
    bad = doctor.Check("sum", "wrong", False, "reinstall")
    monkeypatch.setattr(doctor, "LOOKS", {"fine": lambda: good, "sum": lambda: bad})
    said = fedbd_("doctor", "--json")
    assert said.status == 1
    assert json.loads(said.out) == {
        "good": False,
        "checks": [
            {"name": "fine", "found": "yes", "good": True, "remedy": None},
            {"name": "sum", "found": "wrong", "good": False, "remedy": "reinstall"},
        ],
    }
    assert [line.split()[0] for line in fedbd_("doctor", "--quiet").out.splitlines()] == ["BAD", "reinstall"]


MISTAKES: dict[str, list[str]] = {
    "a kind": ["list", "modell", "--json"],
    "a method": ["show", "medien", "--json"],
    "a scenario": ["show", "gone.yaml", "--json"],
    "a run": ["show", ".", "--json"],
    "a table": ["show", "median", "--table", "t.csv", "--json"],
    "a table of no kind": ["run", "small.yaml", "--json", "--table", "t.txt"],
    "one name twice": ["run", "small.yaml", "small.yaml", "--json"],
    "a setting": ["run", "small.yaml", "--json", "-s", "rounds"],
}


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_json_on_one_side_and_text_on_the_other(words: list[str], fedbd_: Callable[..., Said]) -> None:
    said = fedbd_(*words)
    assert said.status == 2
    problems = json.loads(said.out)["problems"]
    assert problems
    for problem in problems:
        assert list(problem) == ["of", "path", "expected", "got", "remedy"]
        assert f"{problem['path']}: {problem['expected']}" in said.err


# Quiet.


def test_quiet_leaves_out_what_is_well(ran: tuple[Path, Said], fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    assert fedbd_("validate", "small.yaml", "-q") == Said(0, "", "")
    assert fedbd_("list", "model", "-q").out.split() == list(METHODS["model"])
    folder = ran[0] / "runs/small/seed-1"
    assert fedbd_("show", folder, "--quiet") == Said(0, "", "")
    assert (folder / "curves.png").exists()
    (folder / "curves.png").unlink()
    bad = fedbd_("validate", "small.yaml", "-q", "-s", "rounds=0")
    assert (bad.status, bad.out) == (2, "")
    assert "rounds: must be >= 1, got 0" in bad.err


# Tables and citations.


def test_export(ran: tuple[Path, Said], fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    said = fedbd_("export", ran[0], "rounds.json")
    assert said == Said(0, "rounds.json: 3 rounds of 1 run\n", "")
    rows = json.loads((tmp_path / "rounds.json").read_text())
    lines = [json.loads(line) for line in (ran[0] / "runs/small/seed-1/rounds.jsonl").read_text().splitlines()]
    assert [row["clean_accuracy"] for row in rows] == [line["clean_accuracy"] for line in lines]
    assert [row["seconds.total"] for row in rows] == [line["seconds"]["total"] for line in lines]
    (tmp_path / "rounds.json").write_text("mine")
    again = fedbd_("export", ran[0], "rounds.json")
    expected = "rounds.json: is there already; pass --overwrite to replace it, or name another file"
    assert (again.status, again.err.splitlines()) == (2, ["nothing was exported:", f"  {expected}"])
    assert (tmp_path / "rounds.json").read_text() == "mine"
    assert fedbd_("export", ran[0], "rounds.json", "--overwrite").status == 0
    assert json.loads((tmp_path / "rounds.json").read_text()) == rows


EXPORTS: dict[str, tuple[list[str], str]] = {
    "no file": (["RUN"], "FILE: must end with a file to write, named .csv, .json or .parquet"),
    "a file of no kind": (["RUN", "t.xlsx"], "FILE: must end with a file to write, named .csv, .json or .parquet"),
    "no run": (["t.csv"], "RUN_DIR: is required before the file"),
    "a folder without runs": ([".", "t.csv"], ".: must be a run's folder, or hold such folders"),
    "a folder that is none": (["gone", "t.csv"], "gone: must be a run's folder, or hold such folders"),
    "a file nowhere": (["RUN", "gone/t.csv"], "FILE: must be a file in a folder that exists"),
    "events in a file": (["RUN", "--tensorboard", "small.yaml"], "--tensorboard: must be a folder, got small.yaml"),
}


@pytest.mark.parametrize(("words", "sentence"), EXPORTS.values(), ids=EXPORTS)
def test_an_export_that_cannot_be(
    words: list[str], sentence: str, ran: tuple[Path, Said], fedbd_: Callable[..., Said], tmp_path: Path
) -> None:
    run = str(ran[0] / "runs/small/seed-1")
    said = fedbd_("export", *(run if word == "RUN" else word for word in words))
    assert (said.status, said.out) == (2, "")
    assert sentence in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_damaged_record_is_told(ran: tuple[Path, Said], fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text("name: [")
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    said = fedbd_("export", ".", "t.csv")
    assert (said.status, said.out) == (2, "")
    assert "scenario.yaml: must be a run's scenario" in said.err
    (tmp_path / "scenario.yaml").write_text(SMALL)
    (tmp_path / "rounds.jsonl").write_text("no JSON\n")
    assert "rounds.jsonl:1: must be one JSON object" in fedbd_("export", ".", "t.csv").err


def test_cite_a_scenario_names_all_that_it_uses(fedbd_: Callable[..., Said]) -> None:
    said = fedbd_("cite", ROOT / "scenarios" / "quickstart-defended.yaml")
    assert (said.status, said.err) == (0, "")
    named = re.findall(r"^% (\w+) \((\w+)\)", said.out, re.MULTILINE)
    assert {("badnets", "attack"), ("grid", "trigger"), ("rnp", "cleanup"), ("ckks", "secure_sum")} <= set(named)
    assert said.out.startswith("@software{fedbd,")
    expected = "must be a method, a scenario file or a run's folder"
    assert fedbd_("cite", "medien").err == f"NAME: {expected}, got 'medien'; did you mean 'median'?\n"


def test_cite_a_run_and_a_training(ran: tuple[Path, Said], fedbd_: Callable[..., Said], tmp_path: Path) -> None:
    assert fedbd_("cite", ran[0] / "runs/small/seed-1").out == fedbd_("cite", "small.yaml").out
    said = fedbd_("cite", ROOT / "scenarios/central/cifar10-badnets.yaml")
    assert (said.status, said.err) == (0, "")
    assert {"badnets (attack)", "grid (trigger)"} <= set(re.findall(r"^% (.+ \(\w+\))", said.out, re.MULTILINE))
    (tmp_path / "empty").mkdir()
    nothing = fedbd_("cite", "empty")
    expected = "must be a run's or a training's folder; it holds neither scenario.yaml nor central.yaml"
    assert (nothing.status, nothing.err) == (2, f"empty: {expected}\n")


# Completion.


def test_names_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rnp-run").mkdir()
    (tmp_path / "rnp.yaml").write_text("")
    (tmp_path / "rnp.txt").write_text("")
    (tmp_path / "rnp-run" / "a.yml").write_text("")
    assert method_names("rnp") == ["rnp", "rnp_label", "rnp_unlearned"]
    assert kind_names("de") == ["detection"]
    assert names_and_paths("rnp") == ["rnp", "rnp_label", "rnp_unlearned", "rnp-run/", "rnp.yaml"]
    assert names_and_paths("rnp-run/") == ["rnp-run/a.yml"]
    assert names_and_paths("gone/x") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [("fedbd cite rnp_", {"rnp_label", "rnp_unlearned"}), ("fedbd li", {"list"}), ("fedbd list cle", {"cleanup"})],
)
def test_a_shell_gets_completions(line: str, expected: set[str], tmp_path: Path) -> None:
    words = line.split()
    said = outside(
        folder=tmp_path,
        _FEDBD_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert set(said.out.split()) == expected


def test_the_completion_script_is_shown(tmp_path: Path) -> None:
    said = outside("--show-completion", "bash", folder=tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert said.status == 0
    assert "_FEDBD_COMPLETE=complete_bash" in said.out


# Terminals.


def test_nothing_is_colored_or_redrawn_without_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    for words in (["--help"], ["list", "model"], ["validate", "gone.yaml"]):
        said = outside(*words, folder=tmp_path)
        assert ANSI.search(said.out + said.err) is None
    forced = outside("run", "small.yaml", folder=tmp_path, FORCE_COLOR="1")
    assert forced.status == 0
    assert ANSI.search(forced.out)  # colored, as asked for; but no line is erased and drawn again
    assert re.search(r"\x1b\[[0-9]*[AKJ]", forced.out) is None
    assert re.search(r"^small seed 1  round 1/2  CA ", forced.out, re.MULTILINE)


@pytest.mark.parametrize(("columns", "width"), [(None, 160), ("70", 70)])
def test_tables_have_room_in_a_pipe(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedbd.cli.arguments import terminal

    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal().width == width


def on_a_terminal(*words: str, folder: Path, **environment: str) -> str:
    """Return what a command shows on a terminal of its own."""
    master, slave = pty.openpty()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    variables = {name: value for name, value in variables.items() if name not in ("FORCE_COLOR", "CI")}
    command = [sys.executable, "-m", "fedbd", *words]
    with subprocess.Popen(command, cwd=folder, env=variables, stdout=slave, stderr=slave, stdin=slave) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        process.wait(timeout=60)
    os.close(master)
    return shown.decode(errors="replace")


def test_no_color_is_heeded_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [")
    red = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert red.search(on_a_terminal("validate", "bad.yaml", folder=tmp_path))
    plain = on_a_terminal("validate", "bad.yaml", folder=tmp_path, NO_COLOR="1")
    assert "bad.yaml:1:8: must be YAML" in plain
    assert ANSI.search(plain) is None


def test_long_runs_print_some_hundred_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from fedbd.report.console import LiveRuns

    def lines(planned: int, every: int | None = None, **options: Any) -> list[int]:
        with LiveRuns(Console(width=200), every=every, **options) as live:
            live.add("r", name="long", seed=1, rounds=planned)
            for round_ in range(planned + 1):
                live.update("r", {"round": round_})
        return [int(found) for found in re.findall(r"round +(\d+)/", capsys.readouterr().out)]

    assert lines(100) == list(range(101))
    assert lines(1000) == [0, 1, *range(10, 1001, 10)]
    assert lines(7, every=3) == [0, 1, 3, 6, 7]
    assert lines(3, silent=True) == []
