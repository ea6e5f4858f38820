from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml

from fedbd.errors import UserError
from fedbd.report.export import export_rows, run_folders, write_export, write_tensorboard


def run(place: Path, name: str, seed: int, lines: list[dict[str, Any]]) -> Path:
    """Write a run's folder as ``fedbd run`` would, with so much in its lines."""
    place.mkdir(parents=True)
    scenario = {"name": name, "seed": seed, "rounds": len(lines) - 1, "training": {"lr": 0.05}, "attacks": []}
    (place / "scenario.yaml").write_text(yaml.safe_dump(scenario))
    (place / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


LINES: list[dict[str, Any]] = [
    {"round": 0, "clean_accuracy": 0.125, "participants": [], "cleanup": {}, "collapsed": True, "notes": {}},
    {
        "round": 1,
        "clean_accuracy": 0.5,
        "participants": [0, 2],
        "cleanup": {"rnp": {"acted": True, "after": {"attack_success": 0.25}}},
        "collapsed": False,
        "notes": {"clients": {"0": {"loss": 1.5}}},
    },
]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run(tmp_path / "runs" / "a" / "seed-1", "a", 1, LINES)
    run(tmp_path / "runs" / "b" / "seed-2", "b", 2, [{"round": 0, "attack_success": None}])
    run(tmp_path / "runs" / "twins" / "0123", "a (twin)", 1, LINES)
    run(tmp_path / "runs" / "warm-ups" / "4567", "a (warm-up)", 1, LINES)
    return tmp_path / "runs"


def test_the_rows_worked_out_by_hand(runs: Path) -> None:
    rows = export_rows([runs / "a" / "seed-1"])
    first = {"run": str(runs / "a/seed-1"), "name": "a", "seed": 1, "finished": True}
    assert rows == [
        {**first, "round": 0, "clean_accuracy": 0.125, "participants": "[]", "collapsed": True, "notes": "{}"}
        | {"cleanup.rnp.acted": None, "cleanup.rnp.after.attack_success": None},
        {**first, "round": 1, "clean_accuracy": 0.5, "participants": "[0,2]", "collapsed": False}
        | {"notes": '{"clients":{"0":{"loss":1.5}}}'}
        | {"cleanup.rnp.acted": True, "cleanup.rnp.after.attack_success": 0.25},
    ]
    assert list(rows[0]) == list(rows[1])
    assert list(rows[0])[:5] == ["run", "name", "seed", "finished", "round"]


def test_a_group_that_a_round_lacks_is_no_column_of_its_own(tmp_path: Path) -> None:
    lines = [
        {"round": 0, "server_saw": None, "cipher_error": None},
        {"round": 1, "server_saw": {"kind": "sum"}, "cipher_error": None},
    ]
    rows = export_rows([run(tmp_path / "a", "a", 1, lines)])
    assert list(rows[0])[5:] == ["cipher_error", "server_saw.kind"]
    assert [row["server_saw.kind"] for row in rows] == [None, "sum"]


def test_a_folder_of_runs_stands_for_those_below_but_for_what_they_share(runs: Path) -> None:
    assert run_folders([runs]) == [runs / "a" / "seed-1", runs / "b" / "seed-2"]
    assert run_folders([runs / "twins" / "0123"]) == [runs / "twins" / "0123"]
    assert run_folders([runs / "a", runs]) == run_folders([runs])
    with pytest.raises(UserError, match="gone: must be a run's folder, or hold such folders"):
        run_folders([runs, runs / "gone"])


def test_the_scenarios_fields_as_columns(runs: Path) -> None:
    rows = export_rows(run_folders([runs]), scenario=True)
    assert [row["scenario.training.lr"] for row in rows] == [0.05] * 3
    assert [row["attack_success"] for row in rows] == [None] * 3
    assert rows[2]["scenario.name"] == "b"


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet"])
def test_every_form_reads_back(runs: Path, tmp_path: Path, ending: str) -> None:
    rows = export_rows(run_folders([runs]))
    file = tmp_path / f"table{ending}"
    write_export(file, rows)
    if ending == ".csv":
        with open(file, newline="") as opened:
            found = list(csv.DictReader(opened))
        assert found == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    elif ending == ".json":
        assert json.loads(file.read_text()) == rows
    else:
        assert pq.read_table(file).to_pylist() == rows


def test_a_column_of_two_kinds_is_text_in_parquet(tmp_path: Path) -> None:
    write_export(tmp_path / "t.parquet", [{"a": 1, "b": 1}, {"a": "x", "b": 2.5}, {"a": None, "b": None}])
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {"a": ["1", "x", None], "b": [1.0, 2.5, None]}


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(UserError, match=r"taken\.csv: must be a file that can be written"):
        write_export(tmp_path / "taken.csv", [])


class FakeWriter:
    """Remembers what it is given, in place of TensorBoard's."""

    written: ClassVar[dict[str, list[tuple[str, float, int]]]] = {}

    def __init__(self, place: str) -> None:
        self.scalars = self.written.setdefault(place, [])

    def __enter__(self) -> FakeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def test_tensorboard_gets_every_number_of_every_round(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(FakeWriter, "written", {})
    places = write_tensorboard(tmp_path / "tb", run_folders([runs]))
    assert places == [tmp_path / "tb" / "a" / "seed-1", tmp_path / "tb" / "b" / "seed-2"]
    assert FakeWriter.written[str(places[0])] == [
        ("clean_accuracy", 0.125, 0),
        ("collapsed", 1.0, 0),
        ("clean_accuracy", 0.5, 1),
        ("cleanup/rnp/acted", 1.0, 1),
        ("cleanup/rnp/after/attack_success", 0.25, 1),
        ("collapsed", 0.0, 1),
    ]


def test_without_tensorboard_the_remedy_is_told(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError) as refused:
        write_tensorboard(tmp_path / "tb", [runs / "a" / "seed-1"])
    assert "--tensorboard: needs TensorBoard, which is not here" in str(refused.value)
    assert "pip install 'fedbd[tensorboard]'" in str(refused.value)
    assert not (tmp_path / "tb").exists()


def test_two_runs_for_one_event_folder_are_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    again = run(tmp_path / "other" / "seed-1", "a", 1, LINES)
    with pytest.raises(UserError, match="must differ from the others in name or seed"):
        write_tensorboard(tmp_path / "tb", [runs / "a" / "seed-1", again])
