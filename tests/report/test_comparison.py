from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from fedbd.errors import DataError, UserError
from fedbd.records.record import RunFolder, round_record
from fedbd.report.arms import bootstrap_interval, measures_of, seen_text
from fedbd.report.comparison import (
    compare,
    comparison_rows,
    load_run,
    notes,
    render_comparison,
    write_comparison,
)
from fedbd.report.run_view import RunView, is_oracle
from fedbd.summary import summarize


def run(arm: str, seed: int, success: float, clean: float = 0.9, *, collapsed=False, done=3, **more) -> RunView:
    lines = [
        round_record(
            round=n,
            attackers=[0],
            clean_accuracy=clean,
            attack_success=success,
            attack_success_floor=0.01,
            robust_accuracy=0.2,
            collapsed=collapsed,
            seconds={"total": 1.5},
            server_saw={"kind": "bucket", "clients_per_sum": [5, 5, 6], "honest_per_sum_min": 3},
            **more,
        )
        for n in range(done + 1)
    ]
    summary = summarize(lines, (1, 3), 3)
    return RunView(arm=arm, seed=seed, scenario={}, rounds=lines, summary=summary, finished=done == 3)


def course_run(arm: str, seed: int, successes: list[float], **more) -> RunView:
    lines = [
        round_record(round=n, clean_accuracy=0.9, attack_success=s, collapsed=False, **more)
        for n, s in enumerate(successes)
    ]
    rounds = len(successes) - 1
    return RunView(arm=arm, seed=seed, scenario={}, rounds=lines, summary=summarize(lines, (1, 2), rounds))


def placed(view: RunView, **scenario) -> RunView:
    return RunView(**{**vars(view), "scenario": scenario})


def cleanup(mode: str, success: float, collapsed: bool = False) -> dict:
    after = {"clean_accuracy": 0.8, "attack_success": success, "collapsed": collapsed}
    return {"rnp": {"mode": mode, "acted": True, "after": after}}


def shown(arms, width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_comparison(console, arms)
    return console.file.getvalue()


def test_differences_are_paired_by_seed():
    base = [run("none", s, 0.5 + 0.1 * s) for s in range(3)]
    arms = compare([*base, *(run("krum", s, 0.1 * s) for s in (3, 2, 1))])
    found = arms[1].statistics["attack_success"]
    assert found.values == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert found.difference == pytest.approx(-0.5)  # seeds 1 and 2, each 0.5 lower
    assert found.interval == pytest.approx((-0.5, -0.5))
    assert (arms[0].statistics["attack_success"].difference, arms[1].seeds) == (None, (1, 2, 3))
    assert found.mean == pytest.approx(0.2)
    assert found.sd == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1))


def test_one_pair_has_no_interval_and_no_pair_no_difference():
    arms = compare([run("a", 0, 0.5), run("b", 0, 0.2), run("c", 1, 0.2)])
    assert arms[1].statistics["attack_success"].difference == pytest.approx(-0.3)
    assert arms[1].statistics["attack_success"].interval is None
    assert arms[2].statistics["attack_success"].difference is None


SHARED = {
    "data": {"name": "digits", "root": "here"},
    "partition": {"name": "iid", "clients": 10},
    "trusted": {"size": 300},
    "model": {"name": "cnn"},
    "cohort": {"size": None, "attackers_per_round": None},
    "rounds": 3,
    "attacks": [{"clients": {"count": 2}, "rounds": {"first": 1}}],
}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"partition": {"name": "iid", "clients": 20}}, "their partition differs"),
        ({"trusted": None, "rounds": 4}, "their trusted set and rounds differ"),
        ({"data": {"name": "mnist"}, "model": {"name": "mlp"}, "cohort": {"size": 5}}, "their data, model and cohort"),
    ],
)
def test_what_shares_no_draws_is_not_paired_and_says_so(changed, reason):
    base = [placed(run("none", s, 0.5), **SHARED) for s in range(2)]
    arms = compare([*base, *(placed(run("other", s, 0.2), **{**SHARED, **changed}) for s in range(2))])
    assert all(found.difference is None and found.interval is None for found in arms[1].statistics.values())
    assert arms[1].unpaired.startswith(reason)
    assert (arms[0].unpaired, comparison_rows(arms)[1]["unpaired"]) == ("", arms[1].unpaired)
    text = shown(arms)
    assert f"No difference of other to none: {arms[1].unpaired}." in text
    assert "paired by seed" not in text
    assert "-30.0" not in text


def test_the_folder_of_the_data_the_defense_and_the_attackers_do_not_part_a_pair():
    other = {
        **SHARED,
        "data": {"name": "digits", "root": "there"},
        "aggregation": {"name": "krum"},
        "attacks": [],
    }
    arms = compare([placed(run("none", 0, 0.5), **SHARED), placed(run("krum", 0, 0.2), **other)])
    assert (arms[1].unpaired, arms[1].statistics["attack_success"].difference) == ("", pytest.approx(-0.3))
    fixed = {"cohort": {"size": None, "attackers_per_round": 1}}  # then who attacks decides the cohorts
    arms = compare(
        [placed(run("none", 0, 0.5), **SHARED | fixed), placed(run("krum", 0, 0.2), **other | fixed)],
    )
    assert arms[1].unpaired == "their attackers differ"


def test_seeds_that_do_not_meet_are_no_pairs():
    arms = compare([run("a", 0, 0.5), run("b", 1, 0.2), run("c", 0, 0.5, done=2)])
    assert [arm.unpaired for arm in arms] == ["", "they have no seed in common", ""]
    assert "No difference of b to a: they have no seed in common." in notes(arms)


def test_means_over_different_rounds_are_named():
    arms = compare([course_run("a", 0, [0, 0.1, 0.2]), run("b", 0, 0.5)])
    assert "The figures are means over different rounds: a 1..2; b 1..3." in notes(arms)
    assert not any("different rounds" in note for note in notes(compare([run("a", 0, 0.1), run("b", 0, 0.2)])))


def test_a_net_success_over_other_rounds_than_the_success_is_named():
    def noted(floors, collapsed):
        lines = [
            round_record(round=n, attack_success=0.5, attack_success_floor=floor, collapsed=n in collapsed)
            for n, floor in enumerate(floors)
        ]
        view = RunView(arm="x", seed=0, scenario={}, rounds=lines, summary=summarize(lines, (1, 3), 3))
        return [note for note in notes(compare([view])) if "net ASR is not" in note]

    assert noted([None, None, 0.1, 0.1], collapsed=[1]) == noted([0.1] * 4, collapsed=[]) == []
    assert noted([None] * 4, collapsed=[]) == noted([0.1] * 4, collapsed=[3]) == []  # no floor; a collapsed run
    assert noted([None, None, 0.1, 0.1], collapsed=[2]) == [
        "x, rounds of the means: ASR over 2, floor over 2, net ASR over the 1 that have both; so net ASR is not ASR "
        "less floor."
    ]


def test_the_course_of_the_attack_has_a_table():
    long = course_run("long", 0, [0, 0.6, 0.8, 0.9, 0.9], notes={"twin": {"clean_accuracy": 0.95}})
    arms = compare(
        [long, course_run("short", 0, [0, 0.1, 0.7, 0.9, 0.2]), course_run("none", 0, [0, 0.1, 0.1, 0.1, 0])]
    )
    text = shown(arms)
    rows = {line.split()[0]: line.split() for line in text[text.index("peak ASR %") :].splitlines() if " seed" in line}
    assert rows["long"][3:] == ["90.0", "70.0", "1", ">=", "2", "+5.0", "no", "round"]
    assert rows["short"][3:] == ["90.0", "40.0", "2", "1", "-", "no", "round"]
    assert rows["none"][3:] == ["10.0", "10.0", "never", "0", "-", "no", "round"]


def test_times_and_lifespans_of_several_seeds_are_ranges_not_means():
    runs = [[0, 0.6, 0.8, 0.9, 0.9], [0, 0.1, 0.7, 0.9, 0.2], [0, 0.1, 0.1, 0.1, 0]]
    arms = compare([course_run(arm, seed, found) for arm in ("a", "b") for seed, found in enumerate(runs)])
    text = shown(arms)
    assert "1..2" in text
    assert "1 never" in text
    assert "0..>= 2" in text
    for key in ("lifespan", "time_to_attack_success", "lifespan_censored"):
        assert arms[1].statistics[key].difference is None
    assert arms[1].statistics["lifespan_censored"].values == {0: 1.0, 1: 0.0, 2: 0.0}
    assert arms[1].statistics["peak_attack_success"].difference == 0.0


def test_collapsed_rounds_are_counted_in_the_table_and_are_no_success():
    lines = [
        round_record(round=n, clean_accuracy=0.5, attack_success=s, collapsed=s == 1)
        for n, s in enumerate([0, 1, 0.2, 0.2])
    ]
    view = RunView(arm="x", seed=0, scenario={}, rounds=lines, summary=summarize(lines, (1, 3), 3))
    arms = compare([view])
    assert arms[0].collapsed == ()
    assert arms[0].statistics["collapsed_rounds"].values == {0: 1}
    text = shown(arms)
    assert "100.0" not in text
    assert "46.7" not in text
    assert "20.0" in text
    row = next(line for line in text[text.index("peak ASR %") :].splitlines() if " seed" in line)
    assert row.split()[-2:] == ["1", "round"]
    assert any(note.startswith("Collapsed rounds") for note in notes(arms))
    assert not any(note.startswith("Collapsed rounds") for note in notes(compare([run("y", 0, 0.1)])))


def test_a_collapsed_run_has_no_course():
    lost = run("x", 0, 1.0, 0.1, collapsed=True)
    found = measures_of(lost)
    assert [found[key] for key in ("peak_attack_success", "attack_success_area", "lifespan")] == [None] * 3
    assert found["collapsed_rounds"] == 3


def test_a_floor_that_a_collapsed_twin_does_not_give_is_absent():
    view = course_run("x", 0, [0.5, 0.5, 0.5], attack_success_floor=None)
    assert measures_of(view)["attack_success_floor"] is None
    assert measures_of(view)["net_attack_success"] is None
    assert " 50.0 " in shown(compare([view]))


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.normal(1.0, 1.0, 40))
        inside += low <= 1.0 <= high
    assert 88 <= inside <= 99
    # the exact bootstrap distribution of two values: a, b, and their mean with probability 1/4, 1/4, 1/2
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([1.0])) is None
    values = rng.normal(size=9)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1)


def test_a_collapsed_run_is_nobodys_success():
    low, high = run("x", 0, 0.0, 0.1, collapsed=True), run("y", 0, 1.0, 0.1, collapsed=True)
    arms = compare([low, high])
    assert arms[0].collapsed == (0,)
    for arm in arms:
        for name in ("attack_success", "net_attack_success", "robust_accuracy"):
            assert arm.statistics[name].mean is None
        assert arm.statistics["clean_accuracy"].mean == pytest.approx(0.1)
    text = shown(arms)
    assert "collapsed" in text
    assert "100.0" not in text
    assert " 0.0" not in text


def test_the_other_seeds_of_an_arm_with_a_collapsed_run_are_counted():
    arms = compare([run("x", 0, 0.0, 0.1, collapsed=True), run("x", 1, 0.3), run("x", 2, 0.3)])
    assert arms[0].statistics["attack_success"].n == 2
    text = shown(arms)
    assert "30.0 (of 2)" in text
    assert "1 collapsed" in text


def test_a_cleanup_that_destroys_the_model_has_no_attack_success():
    view = run("x", 0, 0.9, cleanup=cleanup("if_stopped_now", 0.0, collapsed=True))
    assert measures_of(view)["cleanup.rnp.if_stopped_now.attack_success"] is None
    assert measures_of(view)["cleanup.rnp.if_stopped_now.clean_accuracy"] == pytest.approx(0.8)
    assert "rnp 80.0 / collapsed" in shown(compare([view]))


def test_the_two_kinds_of_cleanup_are_apart():
    arms = compare(
        [run("x", 0, 0.9, cleanup=cleanup("in_loop", 0.03)), run("y", 0, 0.9, cleanup=cleanup("if_stopped_now", 0.04))]
    )
    x, y = ({k for k in arm.statistics if k.startswith("cleanup")} for arm in arms)
    assert x == {"cleanup.rnp.in_loop.clean_accuracy", "cleanup.rnp.in_loop.attack_success"}
    assert not x & y
    lines = shown(arms).splitlines()
    head = next(line for line in lines if "if stopped now" in line)
    in_loop, stopped = (next(line for line in lines if text in line) for text in ("80.0 / 3.0", "80.0 / 4.0"))
    assert in_loop.index("rnp") == head.index("in the loop")
    assert stopped.index("rnp") == head.index("if stopped now")


def test_columns_without_a_value_are_left_out():
    text = shown(compare([run("x", 0, 0.5), placed(run("y", 0, 0.5), rounds=9)]))  # y is no pair: its differences are -
    assert "net ASR %" in text
    assert not any(title in text for title in ("if stopped now", "in the loop", "sample AUC", "CA price"))
    clean = [round_record(round=n, clean_accuracy=0.9, seconds={"total": 1.0}) for n in range(3)]
    text = shown(compare([RunView(arm="z", seed=0, scenario={}, rounds=clean, summary=summarize(clean, None, 2))]))
    assert next(line for line in text.splitlines() if "arm" in line).split() == ["arm", "runs", "CA", "%", "s/round"]
    assert "CA %" in shown(compare([run("half", 0, 0.5, done=2)]))  # nothing is known of it


def test_marks_and_notes():
    single = run("none", 0, 0.9)
    oracle = RunView(**{**vars(run("filter", 0, 0.0)), "oracle": True})
    text = shown(compare([single, oracle, run("half", 0, 0.5, done=2)]))
    assert "filter †" in text
    assert "1 seed " in text
    assert "1 unfinished" in text
    assert "0 seeds" in text
    assert "Fewer than 5 seeds" in text
    assert "no defender has" in text
    assert "bucket" in text
    five = [run("none", s, 0.9) for s in range(5)]
    assert "5 seeds" in shown(compare(five))
    assert not any("Fewer" in note or "†" in note for note in notes(compare(five)))


@pytest.mark.parametrize("width", [80, 120, 300])
def test_numbers_are_whole_at_any_width(width):
    runs = [run("a" * 50, s, 0.1234 + s / 100, cleanup=cleanup("in_loop", 0.5)) for s in range(3)] + [
        run("b", s, 0.0234) for s in range(3)
    ]
    text = shown(compare(runs), width)
    assert "…" not in text
    assert "[-12.0, -10.0]" in text
    assert max(map(len, text.splitlines())) <= max(width, 110)


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(UserError, match="one run per seed"):
        compare([run("a", 1, 0.5), run("a", 1, 0.6)])


def test_rows_are_flat_equal_and_strict(tmp_path):
    detection = {"strip": {"auc": 0.75}}
    arms = compare([run("a", 0, 0.5), run("a", 1, 0.7), run("b", 0, 0.2, detection=detection)])
    rows = comparison_rows(arms)
    assert set(rows[0]) == set(rows[1])
    assert rows[0]["attack_success_mean"] == pytest.approx(0.6)
    assert (rows[0]["attack_success_min"], rows[0]["attack_success_max"]) == pytest.approx((0.5, 0.7))
    assert (rows[0]["detection.strip.auc_mean"], rows[0]["detection.strip.auc_n"]) == (None, 0)
    assert rows[1]["detection.strip.auc_mean"] == 0.75
    assert rows[1]["attack_success_difference"] == pytest.approx(-0.3)
    write_comparison(tmp_path / "c.json", arms)
    assert json.loads((tmp_path / "c.json").read_text()) == rows
    write_comparison(tmp_path / "c.csv", arms)
    with open(tmp_path / "c.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["arm"] for row in read] == ["a", "b"]
    assert (float(read[0]["attack_success_mean"]), read[0]["detection.strip.auc_mean"]) == (pytest.approx(0.6), "")


def test_what_the_server_saw_in_words():
    assert (
        seen_text({"kind": "bucket", "clients_per_sum": [5, 6], "honest_per_sum_min": 3})
        == "bucket, 5..6 per sum, >= 3 honest"
    )
    assert seen_text({"kind": "sum", "clients_per_sum": [20]}) == "sum, 20 per sum"
    assert seen_text(None) == "-"


def test_a_run_is_read_from_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_scenario("name: krum\nseed: 4\nrounds: 3\naggregation: {name: krum, oracle: true}\n")
    for line in run("x", 0, 0.5).rounds[:3]:
        folder.append_round(line)
    early = load_run(folder.path)
    assert (early.arm, early.seed, early.oracle, early.finished) == ("krum", 4, True, False)
    assert early.summary["attack_window"] == [0, 2]  # guessed from who attacked
    folder.append_round(run("x", 0, 0.5).rounds[3])
    folder.write_summary({"status": "finished", "attack_window": [2, 3], "seed": 4})
    view = load_run(folder.path, arm="mine")
    assert (view.arm, view.finished, view.summary["attack_window"]) == ("mine", True, [2, 3])
    assert view.summary["status"] == "finished"
    assert view.summary["attack_success"] == pytest.approx(0.5)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"scenario\.yaml"):
        load_run(tmp_path)


def test_oracles_are_found_wherever_they_stand():
    assert is_oracle({"cleanup": [{"name": "rnp"}, {"name": "nad", "oracle": True}]})
    assert is_oracle({"aggregation": {"name": "oracle_filter"}})
    assert not is_oracle({"aggregation": {"name": "krum", "oracle": False}, "cleanup": []})
    assert not is_oracle({"name": "oracle study", "rounds": 3, "aggregation": {"name": "krum"}})


def test_a_method_that_only_finds_clues_has_no_place_among_the_repairs():
    finder = {"label": {"mode": "if_stopped_now", "acted": True, "after": None}}
    text = shown(compare([run("x", 1, 0.5, cleanup={**cleanup("if_stopped_now", 0.1), **finder})]))
    assert "rnp 80.0 / 10.0" in text
    assert "label" not in text


def test_arms_measured_at_other_rounds_or_on_other_images_say_so_and_are_no_pairs():
    runs = [run("a", 0, 0.5), run("a", 1, 0.6), run("b", 0, 0.3), run("b", 1, 0.2)]
    same = {"evaluation": {"every": 1, "samples": None, "twin": True}}
    assert [arm.unpaired for arm in compare([placed(r, **same) if r.arm == "b" else r for r in runs])] == ["", ""]
    other = {"evaluation": {"every": 5, "samples": 500}}
    arms = compare([placed(r, **other) if r.arm == "b" else r for r in runs])
    assert arms[1].unpaired == "their measured rounds and test images differ"
    assert "b was measured every 5 rounds on 500 test images." in notes(arms)


def test_repairs_that_were_rolled_back_are_counted_apart():
    entry = {**cleanup("in_loop", 0.9)["rnp"], "acted": False, "notes": {"acted": True, "rolled_back": True}}
    arm = compare([run("a", 1, 0.9, cleanup={"rnp": entry})])[0]
    assert arm.cleaned_acted["rnp", "in_loop"].split("\n")[1].strip().endswith("rolled back)")


def test_repairs_that_gave_the_target_class_up_are_counted_beside_them():
    entry = cleanup("if_stopped_now", 0.1)["rnp"]
    lost = {key: {**entry["after"], "target_class_accuracy": left} for key, left in (("before", 0.8), ("after", 0.1))}
    arm = compare([run("a", 1, 0.9, cleanup={"rnp": {**entry, **lost}})])[0]
    assert "gave the target class up 3 of 3 times" in arm.cleaned_acted["rnp", "if_stopped_now"]
