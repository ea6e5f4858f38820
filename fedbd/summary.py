"""What a whole run is worth: the measures of ``summary.json``, from the lines of ``rounds.jsonl`` alone.

Missing measurements stay missing: a mean is over what was measured, and over nothing it is None. What a collapsed model
does with a trigger counts as missing: it is nobody's success. No torch in here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Line = Mapping[str, Any]
"""One round's record."""

LAST_ROUNDS = 10
"""Figures of a run are means over so many rounds."""

ALIVE = 0.5
"""The attack success from which a backdoor counts as alive."""

TARGET_KEPT = 0.5
"""A repair that leaves the target class less than this share of its accuracy gave that class up."""

MEANINGLESS = ("attack_success", "robust_accuracy", "auc", "tpr_at_fpr_1", "tpr_at_fpr_5", "precision")
"""What says nothing where the model collapsed."""


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the Clopper-Pearson interval of a share, or None without trials.

    Args:
        successes: 0 .. trials.
        trials: Number of independent trials.
        confidence: The interval covers the true share at least this often.
    """
    if trials == 0:
        return None
    from scipy.stats import binomtest  # noqa: PLC0415 - scipy.stats takes a second; most summaries do without

    found = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is there, or None where nothing is."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def counted_rounds(rounds: Sequence[Line], window: tuple[int, int] | None) -> list[Line]:
    """Return the rounds that a run's figures are means of: the last ten of a window, or of the run without one.

    Round 0, the start, never counts.
    """
    kept = [line for line in rounds if line["round"] > 0]
    if window is not None:
        kept = [line for line in kept if window[0] <= line["round"] <= window[1]]
    return kept[-LAST_ROUNDS:]


def summarize(
    rounds: Sequence[Line],
    window: tuple[int, int] | None,
    planned_rounds: int,
    planned_window: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return a run's measures.

    Args:
        rounds: The run's lines in order, as ``record.read_rounds`` gives them.
        window: First and last attacked round, or None for a run without an attack. Between them every round counts as
            attacked, whether or not the draw brought an attacker into the cohort.
        planned_rounds: How many rounds the scenario asks for.
        planned_window: The same of the attacks that the scenario describes but has disabled: an attack-free run's
            figures are means over the rounds that the attacked ones' are.

    Returns:
        ``clean_accuracy``, ``clean_accuracy_price``, ``attack_success``, ``attack_success_floor``,
        ``net_attack_success``, ``robust_accuracy`` and ``cleanup``, ``detection``, ``per_attack`` by name, all means
        over ``counted_rounds`` (its first and last); of collapsed ones only the accuracies and the floor count.
        ``attack_success_rounds``: how many of them the success, its floor and the net success are means over.
        ``collapsed`` (the last of them, or half of them, are) and ``collapsed_rounds`` of the whole run; the course of
        the attack, see ``attack_course``; ``client_detection``, pooled over all rounds; ``client_failures`` (by client
        that failed, in how many rounds); ``server_saw`` of the last
        round, but the smallest ``honest_per_sum_min`` of all; ``seconds_per_round``; ``rounds``, ``planned_rounds`` and
        ``attack_window``.
    """
    counted = counted_rounds(rounds, window or planned_window)
    tail = [_believed(line) for line in counted]
    ran = [line for line in rounds if line["round"] > 0]
    collapsed = [line["collapsed"] for line in tail if line.get("collapsed") is not None]
    return {
        "rounds": len(ran),
        "planned_rounds": planned_rounds,
        "attack_window": None if window is None else list(window),
        "counted_rounds": [counted[0]["round"], counted[-1]["round"]] if counted else None,
        **{name: mean(line.get(name) for line in tail) for name in ("clean_accuracy", "clean_accuracy_without_target")},
        "clean_accuracy_price": mean(_price(line) for line in tail),
        **{name: mean(line.get(name) for line in tail) for name in ("attack_success", "attack_success_floor")},
        "net_attack_success": mean(_net(line) for line in tail),
        "attack_success_rounds": _success_rounds(tail),
        "robust_accuracy": mean(line.get("robust_accuracy") for line in tail),
        **attack_course(ran, window),
        "collapsed": (collapsed[-1] or 2 * sum(collapsed) >= len(collapsed)) if collapsed else None,
        "collapsed_rounds": sum(line.get("collapsed") is True for line in ran),
        "per_attack": _means(tail, "per_attack"),
        "cleanup": _cleanups(tail),
        "detection": _detections(tail),
        "client_detection": client_detection(ran),
        "client_failures": _client_failures(ran),
        "server_saw": _seen(ran),
        "seconds_per_round": mean((line.get("seconds") or {}).get("total") for line in ran),
    }


def _believed(line: Line) -> Line:
    """Return a round's line without what says nothing where its model collapsed."""
    if line.get("collapsed") is not True:
        return line
    groups = {
        group: {name: _blanked(entry) for name, entry in (line.get(group) or {}).items()}
        for group in ("per_attack", "detection")
    }
    return {**_blanked(line), **groups}


def _blanked(values: Line) -> Line:
    return {name: None if name in MEANINGLESS else value for name, value in values.items()}


def _price(line: Line) -> float | None:
    twin = ((line.get("notes") or {}).get("twin") or {}).get("clean_accuracy")
    own = line.get("clean_accuracy")
    return None if twin is None or own is None else twin - own


def _seen(rounds: Sequence[Line]) -> dict[str, Any] | None:
    """Return the last round's view, with the fewest honest clients behind a sum of any round."""
    views = [line.get("server_saw") or {} for line in rounds]
    if not views or not views[-1]:
        return None
    honest = [count for view in views if (count := view.get("honest_per_sum_min")) is not None]
    if not honest:
        return dict(views[-1])
    # 0: no sum of that round had an honest client in it, so there was nobody whose update it could show.
    return {**views[-1], "honest_per_sum_min": min((count for count in honest if count), default=0)}


def _net(line: Line) -> float | None:
    success, floor = line.get("attack_success"), line.get("attack_success_floor")
    return None if success is None or floor is None else success - floor


def failed_clients(line: Line) -> dict[str, str]:
    """Return the clients that failed in a round, by id, and what the server came to know."""
    return (line.get("notes") or {}).get("faults") or {}


def _client_failures(rounds: Sequence[Line]) -> dict[str, int]:
    """Return of each client that failed in how many rounds it did, in the order of their ids."""
    counted = Counter(client for line in rounds for client in failed_clients(line))
    return dict(sorted(counted.items(), key=lambda item: int(item[0])))


def _success_rounds(rounds: Sequence[Line]) -> dict[str, int]:
    """Return how many rounds have a success, a floor, and both: where these differ, net is no difference of means."""
    names = ("attack_success", "attack_success_floor")
    counted = {name: sum(line.get(name) is not None for line in rounds) for name in names}
    return {**counted, "net_attack_success": sum(_net(line) is not None for line in rounds)}


def attack_course(rounds: Sequence[Line], window: tuple[int, int] | None) -> dict[str, Any]:
    """Return how an attack went over the rounds; every value is None without an attack or a measured success.

    Collapsed rounds are left out, and no backdoor is alive in them.

    Returns:
        ``attack_success_area``: area under the attack success (trapezoids) over the window's measured rounds, per
        round, so in [0, 1]; ``peak_attack_success``: the largest from the window's first round on;
        ``time_to_attack_success``: attacked rounds until the success is 50 % (1: after the first one), None if it never
        is; ``lifespan``: rounds after the last attacked one with a success of at least 50 % (a round without a
        measurement counts as the one before it); ``lifespan_censored``: the run ended with the backdoor still alive,
        so read ``>= lifespan``. Both are None where the run ended before the attack did.
    """
    first, last = window or (0, -1)
    measured = [line for line in map(_believed, rounds) if line.get("attack_success") is not None]
    points = [(line["round"], line["attack_success"]) for line in measured]
    attacked = [(number, success) for number, success in points if first <= number <= last]
    ended = attacked and max(line["round"] for line in rounds) >= last
    lifespan, censored = _lifespan(rounds, points, last) if ended else (None, None)
    return {
        "attack_success_area": _area(attacked),
        "peak_attack_success": max(
            (success for number, success in points if attacked and number >= first), default=None
        ),
        "time_to_attack_success": next((number - first + 1 for number, success in attacked if success >= ALIVE), None),
        "lifespan": lifespan,
        "lifespan_censored": censored,
    }


def _area(points: Sequence[tuple[int, float]]) -> float | None:
    if len(points) < 2:
        return points[0][1] if points else None
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return area / (points[-1][0] - points[0][0])


def _lifespan(rounds: Sequence[Line], points: Sequence[tuple[int, float]], last: int) -> tuple[int, bool]:
    """Return the rounds after ``last`` with a live backdoor, and whether the run ended with it alive."""
    known = dict(points)
    alive, count = False, 0
    for line in rounds:
        kept = alive and line.get("collapsed") is not True
        alive = known[line["round"]] >= ALIVE if line["round"] in known else kept
        count += alive and line["round"] > last
    return count, alive


def lifespan_text(lifespan: int | None, censored: bool | None) -> str:
    """Return a lifespan as it is printed: ``12``, ``>= 12`` where the run ended first, ``-`` where there is none."""
    if lifespan is None:
        return "-"
    return f">= {lifespan}" if censored else str(lifespan)


def _named(rounds: Sequence[Line], group: str) -> dict[str, list[Line]]:
    """Return the entries of a group such as ``detection``, by name, in order of first appearance."""
    found: dict[str, list[Line]] = {}
    for line in rounds:
        for name, entry in (line.get(group) or {}).items():
            found.setdefault(name, []).append(entry)
    return found


def _numbers(entries: Sequence[Line]) -> dict[str, float | None]:
    """Return the means of all numeric values of equal name (not of flags), None where it was never measured.

    A count that is the same in every entry (``evaluated_samples``) stays a count.
    """
    named = (item for entry in entries for item in entry.items())
    names = dict.fromkeys(name for name, value in named if name != "notes" and _is_measure(value))
    return {name: _mean_or_count([entry.get(name) for entry in entries]) for name in names}


def _mean_or_count(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    constant = kept and isinstance(kept[0], int) and len(set(kept)) == 1
    return kept[0] if constant else mean(kept)


def _is_measure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _means(rounds: Sequence[Line], group: str) -> dict[str, dict[str, float | None]]:
    return {name: _numbers(entries) for name, entries in _named(rounds, group).items()}


def _detections(rounds: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Return the means per detector, and in ``adversarial`` those per evasion where one was asked for."""
    found: dict[str, dict[str, Any]] = {}
    for name, entries in _named(rounds, "detection").items():
        asked = [{"adversarial": entry["adversarial"]} for entry in entries if entry.get("adversarial")]
        plain = [{key: value for key, value in entry.items() if key != "adversarial"} for entry in entries]
        found[name] = {**_numbers(plain), **({"adversarial": _means(asked, "adversarial")} if asked else {})}
    return found


def _cleanups(rounds: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Return per cleanup its mode, how often it ran and acted, and the means of what it left behind.

    Of collapsed models only the accuracies count.
    """
    found = {}
    for name, entries in _named(rounds, "cleanup").items():
        after = {key: [entry.get(key) or {} for entry in entries] for key in ("before", "after", "twin_after")}
        believed = {key: [_believed(values) for values in those] for key, those in after.items()}
        found[name] = {
            "mode": entries[-1].get("mode"),
            "rounds": len(entries),
            "acted": sum(entry.get("acted") is True for entry in entries),
            "rolled_back": sum(was_rolled_back(entry) for entry in entries),
            **{key: _numbers(values) for key, values in believed.items()},
            "collapsed_rounds": sum(values.get("collapsed") is True for values in after["after"]),
            "gave_up_target_rounds": sum(gave_up_target(entry.get("before"), entry.get("after")) for entry in entries),
            "seconds": mean(entry.get("seconds") for entry in entries),
        }
    return found


def gave_up_target(before: Line | None, after: Line | None) -> bool:
    """Say whether a repair gave the target class up: its accuracy fell to less than half of what it was.

    Channels that carry a trigger often carry the class that it leads to. A model that no longer knows that class has
    a low attack success for this reason alone, and with many classes its clean accuracy hardly shows it. Half is
    fedbd's own bound. False where one of the two was not measured (all-to-all, no attack).
    """
    had, has = ((measures or {}).get("target_class_accuracy") for measures in (before, after))
    return had is not None and has is not None and bool(has < TARGET_KEPT * had)


def was_rolled_back(entry: Line) -> bool:
    """Return whether a cleanup's entry in a round is of a repair that was made and not kept."""
    return (entry.get("notes") or {}).get("rolled_back") is True


def client_detection(rounds: Sequence[Line]) -> dict[str, Any] | None:
    """Return how often an aggregation rule rejected whom, pooled over the rounds in which it judged.

    Returns:
        ``attackers`` (true positives), ``polluted``, ``honest`` (false positives) and ``honest_without_attacker`` (the
        same in rounds with no attacker in the cohort), each ``{rejected, of, rate, interval}`` with the 95 %
        Clopper-Pearson interval; None where no rule judged.
    """
    judged = [line for line in rounds if line.get("rejected") is not None]
    if not judged:
        return None
    quiet = [line for line in judged if not line.get("attackers")]
    return {
        "attackers": _rejections(judged, lambda line: set(line.get("attackers") or ())),
        "polluted": _rejections(judged, lambda line: set(line.get("polluted") or ())),
        "honest": _rejections(judged, _honest),
        "honest_without_attacker": _rejections(quiet, _honest),
    }


def _honest(line: Line) -> set[int]:
    """Return the clients that a rule judged and that are neither attacker nor polluted."""
    judged = {*(line.get("accepted") or ()), *line["rejected"]}
    return judged - {*(line.get("attackers") or ()), *(line.get("polluted") or ())}


def _rejections(rounds: Sequence[Line], chosen: Callable[[Line], set[int]]) -> dict[str, Any]:
    hits = trials = 0
    for line in rounds:
        rejected = set(line["rejected"])
        judged = chosen(line) & (rejected | set(line.get("accepted") or ()))
        hits, trials = hits + len(judged & rejected), trials + len(judged)
    interval = binomial_interval(hits, trials)
    rate = hits / trials if trials else None
    return {"rejected": hits, "of": trials, "rate": rate, "interval": interval and list(interval)}
