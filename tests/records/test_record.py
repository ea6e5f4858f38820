from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedbd.errors import DataError, UserError
from fedbd.records.record import (
    ROUND_NAMES,
    RunFolder,
    plain,
    read_environment,
    read_rounds,
    read_summary,
    resumed_from,
    round_record,
    rounds_from,
    same_records,
)
from fedbd.types import Role

NAMES = [
    "round",
    "participants",
    "attackers",
    "polluted",
    "accepted",
    "rejected",
    "clean_accuracy",
    "clean_accuracy_without_target",
    "attack_success",
    "per_attack",
    "attack_success_floor",
    "robust_accuracy",
    "collapsed",
    "evaluated_samples",
    "weights_sha256",
    "server_saw",
    "clients_saw",
    "cleanup",
    "detection",
    "seconds",
    "bytes_up",
    "bytes_down",
    "cipher_error",
    "bit_exact",
    "notes",
]


def record(number: int, **more) -> dict:
    return round_record(**{"round": number, "clean_accuracy": 0.5, **more})


def test_a_line_has_every_name_in_order_and_null_for_what_is_absent():
    line = record(3)
    assert list(line) == NAMES == list(ROUND_NAMES)
    assert (line["round"], line["attack_success"], line["accepted"], line["server_saw"]) == (3, None, None, None)
    assert (line["cleanup"], line["notes"]) == ({}, {})
    assert line["seconds"] == dict.fromkeys(
        ("train", "encrypt", "aggregate", "decrypt", "cleanup", "detect", "evaluate", "total")
    )


def test_entries_get_their_names_and_keep_what_else_they_hold():
    line = record(
        1,
        cleanup={"rnp": {"seconds": 2, "mode": "in_loop", "pruned": 7}},
        detection={"strip": {"auc": 0.5}},
        server_saw={"kind": "sum"},
    )
    assert list(line["cleanup"]["rnp"]) == [
        "mode",
        "acted",
        "before",
        "after",
        "twin_after",
        "seconds",
        "notes",
        "pruned",
    ]
    assert list(line["detection"]["strip"])[:3] == ["where", "auc", "tpr_at_fpr_1"]
    assert line["server_saw"]["honest_per_sum_min"] is None


def test_unknown_names_and_foreign_objects_are_refused():
    with pytest.raises(TypeError, match="asr"):
        round_record(round=1, asr=0.5)
    with pytest.raises(TypeError, match="round"):
        round_record(clean_accuracy=0.5)
    with pytest.raises(TypeError, match=r"notes\.aggregation\.model: a object"):
        record(1, notes={"aggregation": {"model": object()}})


def test_arrays_become_plain_values_and_nothing_that_is_not_finite_survives():
    line = record(
        np.int64(2),
        collapsed=np.bool_(True),
        attack_success=np.float64("nan"),
        cipher_error=np.float32(0.25),
        participants=np.array([1, 2]),
        notes={"a": {"norms": torch.tensor([1.0, float("inf")]), "role": Role.HONEST, "ids": {3, 1}, 5: (1, None)}},
    )
    assert line["notes"] == {
        "a": {"norms": [1.0, None], "role": "honest", "ids": [1, 3], "5": [1, None]},
        "non_finite": ["attack_success", "notes.a.norms[1]"],
    }
    assert (line["attack_success"], line["cipher_error"], line["participants"]) == (None, 0.25, [1, 2])
    assert [type(line[k]) for k in ("round", "collapsed", "cipher_error")] == [int, bool, float]
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert type(plain(Role.HONEST)) is str


def test_rounds_come_back_as_they_went(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    lines = [record(0), record(1, attack_success=1 / 3, notes={"text": "zwei\nZeilen \u2028 ü"})]
    for line in lines:
        folder.append_round(line)
    assert read_rounds(folder.path) == lines == read_rounds(folder.path / "rounds.jsonl")
    assert (folder.path / "rounds.jsonl").read_bytes().count(b"\n") == 2
    assert read_rounds(tmp_path / "nothing") == []
    assert read_summary(folder.path) is None


def test_every_line_is_on_disk_before_the_next_round(tmp_path):
    script = (
        "import os, sys; from fedbd.records.record import RunFolder, round_record; f = RunFolder(sys.argv[1]);"
        "[f.append_round(round_record(round=n)) for n in range(3)]; os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False).returncode == 9
    assert [line["round"] for line in read_rounds(tmp_path / "run")] == [0, 1, 2]


def test_a_line_cut_short_by_a_kill_is_skipped_and_taken_away_on_resume(tmp_path):
    folder = RunFolder(tmp_path)
    for n in range(3):
        folder.append_round(record(n))
    whole = (tmp_path / "rounds.jsonl").read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last + 1, len(whole)):
        (tmp_path / "rounds.jsonl").write_bytes(whole[:cut])
        assert [line["round"] for line in read_rounds(tmp_path)] == [0, 1]
    again = RunFolder(tmp_path, resume=True)
    again.append_round(record(2))
    assert (tmp_path / "rounds.jsonl").read_bytes() == whole


def test_rounds_after_a_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    for n in range(5):
        folder.append_round(record(n))
    folder.keep_rounds(2)
    assert [line["round"] for line in read_rounds(tmp_path)] == [0, 1, 2]
    assert os.listdir(tmp_path) == ["rounds.jsonl"]  # no draft left


def test_a_file_that_grows_is_followed_line_by_line(tmp_path):
    file = tmp_path / "rounds.jsonl"
    assert rounds_from(tmp_path, 0) == ([], 0)
    file.write_bytes(b'{"round": 0}\n{"rou')
    assert rounds_from(tmp_path, 0) == ([{"round": 0}], 13)
    with file.open("ab") as stream:
        stream.write(b'nd": 1}\n{"round": 2}\n')
    assert rounds_from(tmp_path, 13) == ([{"round": 1}, {"round": 2}], 39)
    assert rounds_from(tmp_path, 39) == ([], 39)
    file.write_bytes(b'{"round": 0}\n{"round": 1}\n{"round\n')
    with pytest.raises(DataError, match="line 2 after byte 13"):
        rounds_from(tmp_path, 13)


@pytest.mark.parametrize("line", ["{}", '{"round": "1"}', '{"round": true}', "[" * 100_000, "\xff"])
def test_what_is_no_line_of_a_round_is_refused(tmp_path, line):
    (tmp_path / "rounds.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"rounds\.jsonl:1: must be one JSON object"):
        read_rounds(tmp_path)


def test_folders_in_the_place_of_files_are_refused(tmp_path):
    for name in ("rounds.jsonl", "summary.json"):
        (tmp_path / name).mkdir()
    for read in (read_rounds, read_summary):
        with pytest.raises(DataError, match="Is a directory"):
            read(tmp_path)


@pytest.mark.parametrize("text", ['{"resumed": 5}', '{"resumed": ["x"]}', '{"resumed": [{}]}', "[" * 100_000])
def test_an_environment_that_was_tampered_with_decides_nothing(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert read_environment(tmp_path) is None
    RunFolder(tmp_path).note_resumed(3)
    assert resumed_from(tmp_path) == [3]


def test_a_damaged_line_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_round(record(0))
    for text in ("{oops\n", "[1]\n"):
        (tmp_path / "rounds.jsonl").write_text(text + json.dumps(record(1)) + "\n")
        with pytest.raises(DataError, match=r"rounds\.jsonl:1"):
            read_rounds(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_a_finished_run_is_never_overwritten_and_an_unfinished_one_only_resumed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "run")  # nothing recorded yet
    folder.append_round(record(0))
    with pytest.raises(UserError, match="resume"):
        RunFolder(tmp_path / "run")
    folder.write_summary({"status": "failed"})
    RunFolder(tmp_path / "run", resume=True)
    folder.write_summary({"status": "finished", "attack_success": np.float64(0.5)})
    assert read_summary(tmp_path / "run") == {"status": "finished", "attack_success": 0.5}
    for resume in (False, True):
        with pytest.raises(UserError, match="finished run with 1 recorded rounds") as caught:
            RunFolder(tmp_path / "run", resume=resume)
        assert "another folder" in caught.value.problems[0].remedy


def test_a_folder_that_cannot_be_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder"):
        RunFolder(tmp_path / "file")


def test_summary_replaces_in_one_step(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_summary({"status": "running"})

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedbd.records.record.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        folder.write_summary({"status": "finished"})
    assert read_summary(tmp_path) == {"status": "running"}


def test_environment_says_what_it_ran_on_and_nothing_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "swordfish-swordfish")
    RunFolder(tmp_path).write_environment(devices=["cpu"], threads=1)
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["packages"]["numpy"] == np.__version__
    assert found["torch_build"]["version"] == torch.__version__
    assert (found["devices"], found["threads"]) == (["cpu"], 1)
    assert found["cores_usable"] == len(os.sched_getaffinity(0))
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    for private in ("swordfish", os.uname().nodename, os.path.expanduser("~") + "/", str(tmp_path)):
        assert private not in text


def test_same_records_but_for_time_and_memory(tmp_path):
    one, two = RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")
    for folder, seconds in ((one, 1.0), (two, 2.0)):
        cleanup = {"rnp": {"seconds": seconds, "after": {"clean_accuracy": 0.5}, "notes": {"seconds_search": seconds}}}
        folder.append_round(
            record(1, cleanup=cleanup, seconds={"total": seconds}, notes={"a": {"peak_memory_bytes": seconds}})
        )
    assert same_records(one.path, two.path) == []
    two.append_round(record(2))
    assert same_records(one.path, two.path) == ["line 2: only in the second"]
    assert same_records(two.path, one.path) == ["line 2: only in the first"]


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        ({"clean_accuracy": 0.1}, {"clean_accuracy": 0.1 + 2**-56}, "clean_accuracy: 0.1 against"),
        ({"participants": [1, 2]}, {"participants": [1, 3]}, "participants[1]: 2 against 3"),
        ({"participants": [1]}, {"participants": [1, 3]}, "participants: [1] against [1, 3]"),
        ({"notes": {"a": 1}}, {"notes": {"a": 1, "b": None}}, "notes.b: '(absent)' against None"),
        ({"notes": {"a": 1}}, {"notes": {"a": True}}, "notes.a: 1 against True"),
        ({"bytes_up": 1}, {"bytes_up": 2}, "bytes_up: 1 against 2"),
    ],
)
def test_differences_are_named(left, right, text):
    found = same_records([record(4, **left)], [record(4, **right)])
    assert len(found) == 1
    assert found[0].startswith(f"round 4: {text}")


def test_across_secure_sums_the_encryption_itself_is_left_out_and_nothing_else():
    plain_run = record(1, bytes_up=10, bit_exact=None, server_saw={"kind": "single"}, notes={"aggregation": {"k": 1}})
    secret = record(
        1,
        bytes_up=99,
        bytes_down=5,
        bit_exact=True,
        cipher_error=1e-9,
        clients_saw={"0": "sum"},
        server_saw={"kind": "sum"},
        notes={"aggregation": {"k": 1}, "secure_sum": {"scale": 40}},
    )
    assert len(same_records([plain_run], [secret])) > 5
    assert same_records([plain_run], [secret], across_secure_sum=True) == []
    other = {**secret, "attack_success": 0.5}
    found = same_records([plain_run], [other], across_secure_sum=True)
    assert found == ["round 1: attack_success: None against 0.5"]


def test_reading_needs_no_torch():
    script = "import sys, fedbd.records.record, fedbd.summary; assert not {'torch', 'scipy.stats'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
