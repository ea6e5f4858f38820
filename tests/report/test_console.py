from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fedbd.records.record import round_record
from fedbd.report.console import LiveRuns, duration, percent, success_style


def record(number: int, **more) -> dict:
    given = {"clean_accuracy": 0.912, "attack_success": 0.987, "attack_success_floor": 0.01, "seconds": {"total": 2.0}}
    return round_record(**{"round": number, **given, **more})


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def terminal(width: int = 140, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="standard")


def text_of(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_without_a_terminal_every_round_is_one_unbroken_line():
    console = plain_console()
    with LiveRuns(console) as live:
        live.add("a", name="quick[start]", seed=3, rounds=10)
        live.update("a", record(0, attack_success=None, attack_success_floor=None, seconds={}))
        cleanup = {"rnp": {"mode": "if_stopped_now", "after": {"clean_accuracy": 0.9, "attack_success": 0.02}}}
        live.update("a", record(4, cleanup=cleanup, detection={"strip": {"auc": 0.98}}))
        live.update("a", record(5, collapsed=True))
        live.finish("a", {"clean_accuracy": 0.9, "attack_success": None, "collapsed": False})
        live.finish("a", {"clean_accuracy": 0.1, "attack_success": None, "collapsed": True})
    assert console.file.getvalue().splitlines() == [
        "quick[start] seed 3  round  0/10  CA 91.2  ASR -  -s  ETA -",
        "quick[start] seed 3  round  4/10  CA 91.2  ASR 98.7  floor 1.0  cleaned CA/ASR rnp 90.0/2.0  AUC strip 0.980"
        "  2.0s  ETA 12s",
        "quick[start] seed 3  round  5/10  CA 91.2 collapsed  ASR 98.7  floor 1.0  2.0s  ETA 10s",
        "quick[start] seed 3  done after 5 rounds  CA 90.0  ASR - (means over the last rounds counted)",
        "quick[start] seed 3  done, COLLAPSED, after 5 rounds  CA 10.0  ASR - (means over the last rounds counted)",
    ]


def test_failed_clients_are_counted_as_a_share_and_columns_without_a_value_go():
    console = terminal()
    with LiveRuns(console) as live:
        live.add("a", name="x", seed=0, rounds=3)
        shown = {"participants": [0, 1, 2, 3], "attack_success": None, "attack_success_floor": None}
        live.update("a", record(1, **shown, notes={"faults": {"2": "no reply in time", "3": "no reply in time"}}))
        live.update("a", record(2, **shown))
    rounds = text_of(console).rpartition("attackers")[2].splitlines()
    assert rounds[0].split() == ["CA", "%", "failed", "clients", "s"]
    assert [row.split()[2:-1] for row in rounds[1:3]] == [["91.2", "2", "of", "4"], ["91.2", "-"]]
    assert "2 of 8" in text_of(console)  # of the run
    console = plain_console()
    with LiveRuns(console) as live:
        live.add("a", name="x", seed=0, rounds=3)
        live.update("a", record(1, **shown, notes={"faults": {"2": "no reply in time"}}))
    assert "failed clients 1 of 4" in console.file.getvalue()


def test_quiet_says_failures_only():
    console = plain_console()
    with LiveRuns(console, quiet=True) as live:
        live.add("a", name="x", seed=0, rounds=2)
        live.update("a", record(1))
        live.fail("a", "round 2: client 3: no memory")
        live.add("c", name="z", seed=0, rounds=2)
        live.fail("c", "its attack-free twin failed: round 2: client 3: no memory")
        live.add("b", name="y", seed=0, rounds=2)
        live.finish("b", {})
    assert console.file.getvalue().splitlines() == [
        "x seed 0  FAILED in round 2: client 3: no memory",
        "z seed 0  FAILED before its first round: its attack-free twin failed: round 2: client 3: no memory",
    ]


def test_one_run_in_a_terminal_ends_with_every_round():
    console = terminal(height=15)
    with LiveRuns(console) as live:
        live.add("a", name="quickstart", seed=7, rounds=30)
        for number in range(25):
            live.update("a", record(number, attackers=[1, 2]))
        live.finish("a", {})
    last = text_of(console).rpartition("attackers")[2]
    assert [int(row.split()[0]) for row in last.splitlines()[1:26]] == list(range(25))
    assert "24/30" in text_of(console)


def test_many_runs_have_a_row_each_and_failures_their_reason():
    console = terminal()
    with LiveRuns(console) as live:
        for seed in range(3):
            live.add(str(seed), name="krum", seed=seed, rounds=4)
            live.update(str(seed), record(seed + 1))
        live.fail("1", "client 3: [no] memory")
        live.finish("2", {})
        live.finish("0", {"collapsed": True})
    rows = [line.split() for line in text_of(console).splitlines() if line.startswith("krum")]
    found = {row[1]: (row[2], row[-1]) for row in rows[-4:-1]}
    assert found == {"0": ("1/4", "collapsed"), "1": ("2/4", "failed"), "2": ("3/4", "done")}
    assert "krum seed 1 failed: client 3: [no] memory" in text_of(console)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_numbers_are_never_cut_short(width):
    console = terminal(width)
    with LiveRuns(console) as live:
        live.add("a", name="a-scenario-with-a-rather-long-name", seed=0, rounds=1000)
        cleanup = {"rnp": {"mode": "in_loop", "after": {"clean_accuracy": 0.1, "attack_success": 0, "collapsed": True}}}
        live.update("a", record(100, clean_accuracy=0.8125, cleanup=cleanup))
    text = text_of(console)
    assert all(number in text for number in ("81.2", "98.7", "100/1000", "10.0!"))
    assert "…" not in text


def test_an_empty_show_does_not_fail():
    with LiveRuns(terminal()):
        pass


def test_red_is_a_working_backdoor_and_a_collapsed_model_has_no_color():
    assert success_style(0.5) == "bold red"
    assert success_style(0.2, 0.05) == "yellow"
    assert success_style(0.2, 0.15) == "green"
    assert success_style(1.0, 0.1, True) == "dim"
    assert success_style(None) == "dim"


def test_numbers_for_people():
    assert (percent(0.98765), percent(None), percent(0.0)) == ("98.8", "-", "0.0")
    assert [duration(s) for s in (None, 0.4, 59, 61, 3725)] == ["-", "0s", "59s", "1m01s", "1h02m"]


def test_starts_without_torch_and_matplotlib():
    script = "import sys, fedbd.report.console; assert not {'torch', 'matplotlib', 'numpy', 'flwr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_a_method_found_is_shown_in_place_of_what_it_repaired():
    console = plain_console()
    with LiveRuns(console) as live:
        live.add("a", name="x", seed=3, rounds=10)
        found = {"acted": True, "before": None, "after": None}
        cleanup = {
            "label": {**found, "notes": {"target": 7}},
            "trigger": {**found, "notes": {}},
            "linf": {"acted": False, "after": {"clean_accuracy": 0.9, "attack_success": 0.9}},
            "clp": {"acted": False, "after": {"clean_accuracy": 0.9}, "notes": {"acted": True, "rolled_back": True}},
        }
        live.update("a", record(4, cleanup=cleanup))
    assert "cleaned CA/ASR label label 7, trigger done, linf did not act, clp rolled back" in console.file.getvalue()


def test_a_round_without_measurements_leaves_the_last_ones_on_the_screen():
    console = terminal()
    with LiveRuns(console) as live:
        live.add("a", name="x", seed=0, rounds=9)
        live.add("b", name="y", seed=0, rounds=9)  # two runs: no table of rounds below
        live.update("a", record(4, clean_accuracy=0.456))
        live.update("a", round_record(round=5, seconds={"total": 1.0}))
    last = text_of(console).rpartition("CA %")[2]
    assert "45.6" in last
    assert "5/9" in last
