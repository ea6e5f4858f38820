from __future__ import annotations

import pytest
from scipy.stats import beta

from fedbd.summary import attack_course, binomial_interval, counted_rounds, lifespan_text, summarize


def line(number: int, success: float | None = None, **more) -> dict:
    return {"round": number, "attack_success": success, **more}


def course(successes: list[float | None], window: tuple[int, int] | None) -> dict:
    return attack_course([line(n, s) for n, s in enumerate(successes, start=1)], window)


@pytest.mark.parametrize(("hits", "trials"), [(0, 7), (3, 7), (7, 7), (1, 1000)])
def test_binomial_interval_is_clopper_pearson(hits, trials):
    low = 0.0 if hits == 0 else beta.ppf(0.025, hits, trials - hits + 1)
    high = 1.0 if hits == trials else beta.ppf(0.975, hits + 1, trials - hits)
    assert binomial_interval(hits, trials) == pytest.approx((low, high))


def test_no_trials_no_interval():
    assert binomial_interval(0, 0) is None


def test_counted_rounds_are_the_last_ten_attacked_ones_without_the_start():
    rounds = [line(n) for n in range(31)]
    assert [r["round"] for r in counted_rounds(rounds, (5, 20))] == list(range(11, 21))
    assert [r["round"] for r in counted_rounds(rounds, (18, 20))] == [18, 19, 20]
    assert [r["round"] for r in counted_rounds(rounds, None)] == list(range(21, 31))
    assert [r["round"] for r in counted_rounds(rounds[:4], None)] == [1, 2, 3]
    assert counted_rounds(rounds[:4], (5, 20)) == []


def test_course_of_an_attack_by_hand():
    found = course([0.0, 0.1, 0.4, 0.6, 0.8, 0.9, 0.5, 0.4, 0.7, 0.1], (2, 5))
    assert found["attack_success_area"] == pytest.approx((0.25 + 0.5 + 0.7) / 3)  # 0.1, 0.4, 0.6, 0.8
    assert found["peak_attack_success"] == 0.9  # after the window, too
    assert found["time_to_attack_success"] == 3  # round 4 is the third attacked one
    assert (found["lifespan"], found["lifespan_censored"]) == (3, False)  # rounds 6, 7 and 9
    assert found["attack_success_area"] <= 1


def test_a_backdoor_that_outlives_the_run_is_censored():
    assert lifespan(course([0.9, 0.9, 0.8, 0.7], (1, 2))) == (2, True)
    assert lifespan(course([0.9, 0.9], (1, 2))) == (0, True)
    assert lifespan(course([0.1, 0.1], (1, 2))) == (0, False)
    assert lifespan(course([0.9, 0.9], (1, 3))) == (None, None)  # the run ended before the attack
    assert [lifespan_text(*pair) for pair in ((12, True), (12, False), (None, None))] == [">= 12", "12", "-"]


def lifespan(found: dict) -> tuple[int | None, bool | None]:
    return found["lifespan"], found["lifespan_censored"]


def test_rounds_without_a_measurement():
    found = course([None, 0.6, None, 0.8, None, None, 0.7, None, 0.2, None], (1, 5))
    assert found["attack_success_area"] == pytest.approx(0.7)
    assert found["time_to_attack_success"] == 2
    assert lifespan(found) == (3, False)  # 6 counts as 4 did, 7 is measured, 8 counts as 7
    assert set(course([None, None], (1, 1)).values()) == {None}
    assert set(course([0.9, 0.9], None).values()) == {None}
    assert course([0.3], (1, 1))["attack_success_area"] == 0.3


def test_a_collapsed_round_is_no_point_of_the_course_and_nothing_lives_in_it():
    lines = [line(n, s) for n, s in enumerate([0.2, 1.0, 0.4, 0.6, 0.7, 1.0, 0.8, 0.9, 1.0, None], start=1)]
    for n in (2, 6, 9):
        lines[n - 1]["collapsed"] = True
    found = attack_course(lines, (1, 4))
    assert found["attack_success_area"] == pytest.approx((2 * 0.3 + 0.5) / 3)  # 0.2, -, 0.4, 0.6
    assert (found["peak_attack_success"], found["time_to_attack_success"]) == (0.9, 4)
    assert lifespan(found) == (3, False)  # rounds 5, 7, 8; round 10 counts as the collapsed one before it
    assert lifespan(attack_course([line(1, 0.9), line(2, 1.0, collapsed=True)], (1, 1))) == (0, False)
    assert set(attack_course([line(1, 1.0, collapsed=True)], (1, 1)).values()) == {None}


def test_what_a_collapsed_model_does_is_in_no_mean_but_its_accuracy_is():
    dead = {
        "collapsed": True,
        "clean_accuracy": 0.1,
        "robust_accuracy": 1.0,
        "attack_success_floor": 0.3,
        "per_attack": {"a": {"attack_success": 1.0, "evaluated_samples": 9}},
        "detection": {"d": {"auc": 1.0, "positives": 9}},
    }
    sound = {
        "collapsed": False,
        "clean_accuracy": 0.9,
        "robust_accuracy": 0.5,
        "attack_success_floor": 0.1,
        "per_attack": {"a": {"attack_success": 0.4, "evaluated_samples": 9}},
        "detection": {"d": {"auc": 0.6, "positives": 9}},
    }
    found = summarize([line(1, 1.0, **dead), line(2, 0.4, **sound), line(3, 0.4, **sound)], (1, 3), 3)
    assert (found["attack_success"], found["robust_accuracy"]) == (pytest.approx(0.4), 0.5)
    assert found["net_attack_success"] == pytest.approx(0.3)
    assert found["clean_accuracy"] == pytest.approx(1.9 / 3)
    assert found["attack_success_floor"] == pytest.approx(0.5 / 3)  # the twin's: it has its own collapses
    assert found["per_attack"] == {"a": {"attack_success": pytest.approx(0.4), "evaluated_samples": 9}}
    assert isinstance(found["per_attack"]["a"]["evaluated_samples"], int)
    assert found["detection"] == {"d": {"auc": pytest.approx(0.6), "positives": 9}}
    assert (found["collapsed"], found["collapsed_rounds"]) == (False, 1)
    dark = summarize([line(n, 1.0, **dead) for n in (1, 2)], (1, 2), 2)
    assert [dark[name] for name in ("attack_success", "net_attack_success", "robust_accuracy")] == [None] * 3


def test_rounds_whose_twin_collapsed_have_no_floor_and_no_net_success():
    floors = [None, 0.1, 0.3]
    found = summarize([line(n, 0.5, attack_success_floor=f) for n, f in enumerate(floors, 1)], (1, 3), 3)
    assert (found["attack_success"], found["attack_success_floor"]) == (0.5, pytest.approx(0.2))
    assert found["net_attack_success"] == pytest.approx(0.3)
    rounds = {"attack_success": 3, "attack_success_floor": 2, "net_attack_success": 2}
    assert found["attack_success_rounds"] == rounds


def test_an_attack_free_run_is_measured_over_the_rounds_of_the_attacked_one():
    rounds = [line(n, 0.9, clean_accuracy=n / 100) for n in range(21)]
    attacked, clean = summarize(rounds, (3, 8), 20, (3, 8)), summarize(rounds, None, 20, (3, 8))
    assert attacked["counted_rounds"] == clean["counted_rounds"] == [3, 8]
    assert attacked["clean_accuracy"] == clean["clean_accuracy"] == pytest.approx(0.055)
    assert (clean["attack_window"], clean["lifespan"], clean["peak_attack_success"]) == (None, None, None)
    assert clean["time_to_attack_success"] is None
    assert summarize(rounds, (3, 8), 20, (3, 20))["counted_rounds"] == [3, 8]  # of what really attacked
    assert summarize(rounds, None, 20)["counted_rounds"] == [11, 20]


def test_the_price_is_the_twins_accuracy_less_the_runs_over_the_counted_rounds():
    def of(number, own, twin):
        return line(number, clean_accuracy=own, notes={} if twin is None else {"twin": {"clean_accuracy": twin}})

    rounds = [of(1, 0.1, 0.9), of(2, 0.7, 0.8), of(3, 0.6, None), of(4, 0.5, 0.8)]
    assert summarize(rounds, (2, 4), 4)["clean_accuracy_price"] == pytest.approx((0.1 + 0.3) / 2)
    assert summarize([line(1, clean_accuracy=0.5)], (1, 1), 1)["clean_accuracy_price"] is None


def test_the_thinnest_sum_of_any_round_counts():
    def seen(*honest):
        lines = [line(n, server_saw={"kind": f"k{n}", "honest_per_sum_min": h}) for n, h in enumerate(honest, 1)]
        return summarize(lines, None, len(honest))["server_saw"]

    assert seen(4, 2, 5) == {"kind": "k3", "honest_per_sum_min": 2}
    assert seen(4, 0, None)["honest_per_sum_min"] == 4  # in round 2 there was nobody to protect
    assert seen(0, 0)["honest_per_sum_min"] == 0
    assert seen(None)["honest_per_sum_min"] is None


def full_run() -> list[dict]:
    rounds = []
    for n in range(0, 13):
        rounds.append(
            {
                "round": n,
                "participants": [0, 1, 2, 3],
                "attackers": [3] if n in (11, 12) else [],
                "polluted": [2] if n == 12 else [],
                "accepted": None if n < 11 else [0, 1, 2],
                "rejected": None if n < 11 else [3],
                "clean_accuracy": n / 100,
                "clean_accuracy_without_target": None,
                "attack_success": 0.5 + n / 100,
                "attack_success_floor": None if n < 12 else 0.02,
                "robust_accuracy": 0.1,
                "per_attack": {"dba": {"attack_success": n / 100, "robust_accuracy": None}},
                "collapsed": n < 4,
                "server_saw": {"kind": "sum", "clients_per_sum": [4]},
                "cleanup": {
                    "rnp": {
                        "mode": "in_loop",
                        "acted": n != 12,
                        "before": {"clean_accuracy": 0.9, "attack_success": 1.0},
                        "after": {"clean_accuracy": 0.8, "attack_success": n / 100, "collapsed": n == 5},
                        "twin_after": None,
                        "seconds": 2.0,
                    }
                }
                if n % 5 == 0 or n == 12
                else {},
                "detection": {"strip": {"where": "incoming", "auc": 0.9 if n < 12 else 0.7, "tpr_at_fpr_1": None}},
                "seconds": {"total": 1.0 if n else 100.0},
            }
        )
    return rounds


def test_repairs_that_gave_the_target_class_up_are_counted():
    lines = full_run()
    for n, left in ((0, 0.1), (5, 0.39), (10, 0.4), (12, None)):
        lines[n]["cleanup"]["rnp"]["before"]["target_class_accuracy"] = 0.8
        lines[n]["cleanup"]["rnp"]["after"]["target_class_accuracy"] = left
    rnp = summarize(lines, (2, 12), 20)["cleanup"]["rnp"]
    assert rnp["gave_up_target_rounds"] == 1  # round 5's; 0.4 is half, None was not measured, round 0 does not count
    assert rnp["before"]["target_class_accuracy"] == pytest.approx(0.8)


def test_summary_by_hand():
    found = summarize(full_run(), (2, 12), 20)
    assert (found["rounds"], found["planned_rounds"], found["attack_window"]) == (12, 20, [2, 12])
    assert found["clean_accuracy"] == pytest.approx(0.075)  # rounds 3..12
    assert found["counted_rounds"] == [3, 12]
    assert found["attack_success"] == pytest.approx(0.58)  # rounds 4..12: round 3 collapsed
    assert found["net_attack_success"] == pytest.approx(0.60)  # round 12 alone has a floor
    assert found["attack_success_floor"] == 0.02
    assert found["clean_accuracy_without_target"] is None
    assert (found["collapsed"], found["collapsed_rounds"]) == (False, 3)  # rounds 1, 2, 3; round 0 is the start
    assert found["per_attack"] == {"dba": {"attack_success": pytest.approx(0.08), "robust_accuracy": None}}
    assert found["detection"] == {"strip": {"auc": pytest.approx((8 * 0.9 + 0.7) / 9), "tpr_at_fpr_1": None}}
    rnp = found["cleanup"]["rnp"]
    assert (rnp["mode"], rnp["rounds"], rnp["acted"], rnp["collapsed_rounds"]) == ("in_loop", 3, 2, 1)
    assert rnp["gave_up_target_rounds"] == 0
    assert rnp["after"] == {
        "clean_accuracy": pytest.approx(0.8),
        "attack_success": pytest.approx(0.11),
    }  # not round 5's
    assert rnp["twin_after"] == {}
    assert (found["seconds_per_round"], found["server_saw"]["kind"]) == (1.0, "sum")


def test_without_an_attack_success_is_null_and_the_accuracy_that_of_the_last_ten():
    rounds = [{**r, "attack_success": None, "attackers": []} for r in full_run()]
    found = summarize(rounds, None, 12)
    assert found["clean_accuracy"] == pytest.approx(0.075)
    assert [found[k] for k in ("attack_success", "net_attack_success", "peak_attack_success", "lifespan")] == [None] * 4


def test_collapsed_means_the_last_counted_round_or_half_of_them():
    def run(flags):
        return summarize([{"round": n, "collapsed": f} for n, f in enumerate(flags, 1)], None, 4)["collapsed"]

    assert run([False, False, False, True]) is True
    assert run([True, True, False, False]) is True
    assert run([True, False, False, False]) is False
    assert run([None, None]) is None


def test_clients_rejected_are_pooled_over_the_rounds_that_judged():
    found = summarize(full_run(), (2, 12), 12)["client_detection"]
    assert found["attackers"] == {
        "rejected": 2,
        "of": 2,
        "rate": 1.0,
        "interval": pytest.approx(list(binomial_interval(2, 2))),
    }
    assert (found["polluted"]["rejected"], found["polluted"]["of"]) == (0, 1)
    assert (found["honest"]["rejected"], found["honest"]["of"]) == (0, 5)  # {0, 1, 2} and {0, 1}
    assert found["honest_without_attacker"] == {"rejected": 0, "of": 0, "rate": None, "interval": None}


def test_false_positives_without_an_attacker_stand_apart():
    rounds = [
        {"round": 1, "attackers": [], "accepted": [0], "rejected": [1]},
        {"round": 2, "attackers": [2], "accepted": [0, 2], "rejected": []},
    ]
    found = summarize(rounds, (2, 2), 2)["client_detection"]
    assert (found["honest"]["rate"], found["honest_without_attacker"]["rate"]) == (1 / 3, 1 / 2)
    assert found["attackers"]["rate"] == 0.0


def test_failures_are_counted_by_client_over_the_whole_run():
    faults = [{"10": "late", "2": "late"}, {"2": "it died"}, {}]
    rounds = [line(n, notes={"faults": found} if found else {}) for n, found in enumerate(faults, 1)]
    assert list(summarize(rounds, (3, 3), 3)["client_failures"].items()) == [("2", 2), ("10", 1)]


def test_nothing_at_all():
    found = summarize([], (1, 3), 3)
    assert (found["rounds"], found["collapsed_rounds"]) == (0, 0)
    numbers = {k: v for k, v in found.items() if k not in ("rounds", "collapsed_rounds", "planned_rounds")}
    assert numbers.pop("attack_window") == [1, 3]
    assert set(numbers.pop("attack_success_rounds").values()) == {0}
    assert [numbers.pop(k) for k in ("cleanup", "detection", "per_attack", "client_failures")] == [{}] * 4
    assert set(numbers.values()) == {None}


def test_figures_are_means_over_the_measured_rounds_of_the_last_ten():
    rounds = [line(0, 0.0, clean_accuracy=0.1)]
    rounds += [line(n, n / 20, clean_accuracy=n / 10) if n % 4 == 0 else line(n) for n in range(1, 13)]
    found = summarize(rounds, (1, 12), 12)
    assert found["counted_rounds"] == [3, 12]
    assert found["clean_accuracy"] == pytest.approx((0.4 + 0.8 + 1.2) / 3)
    assert found["attack_success"] == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    assert found["collapsed"] is None
