"""Arms side by side: means over seeds, paired differences to the first arm, and what must not be misread.

An arm is a scenario, its runs differ in the seed. Differences are paired by seed, with percentile-bootstrap intervals
over the seeds; where the scenarios do not share the draws that make a pair, none are formed. Of a collapsed run only
the accuracies and what the twin gave count: neither its low nor its high attack success is anybody's success.
``if_stopped_now`` and ``in_loop`` are apart everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedbd.errors import Problem, UserError
from fedbd.report.pairing import unpaired_because
from fedbd.report.run_view import RunView

RESAMPLES = 10_000
COURSE = ("peak_attack_success", "attack_success_area", "time_to_attack_success", "lifespan", "lifespan_censored")
ATTACK = ("attack_success", "net_attack_success", "robust_accuracy", *COURSE)
ONLY_VALUES = ("time_to_attack_success", "lifespan", "lifespan_censored", "collapsed_rounds", "client_failures")
"""Without differences: of a time never reached or a lifespan cut short there is no number to subtract."""

MODES = ("if_stopped_now", "in_loop")


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One measure of one arm over its seeds.

    Attributes:
        values: By seed, of the runs that have the measure.
        difference: Mean of the paired differences to the first arm; None for that arm itself or without a pair.
        interval: Its 95 % bootstrap interval; None with fewer than two pairs.
    """

    values: Mapping[int, float]
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation of a sample (n - 1); None with fewer than two seeds."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of a comparison.

    Attributes:
        name: The arm.
        oracle: A method of it knows what no defender knows.
        seeds: Of its finished runs, ascending.
        unfinished: Number of runs left out because they did not come to their end.
        unpaired: Why there are no differences to the first arm, as a clause; "" where there are, and for that arm.
        counted: First and last round that the figures are means of, in words, one text per kind among the runs.
        collapsed: Seeds whose run collapsed.
        cleaned_collapsed: Seeds whose cleaned model collapsed, by (cleanup, mode).
        cleaned_acted: How often a cleanup changed the model, of how often it ran, in words, by (cleanup, mode); only
            where it did not always.
        server_saw: What the server saw in the last round, and the fewest honest clients behind a sum of any round; one
            text per kind of view among the runs.
        net: Over how many rounds ASR, floor and net ASR are means, in words, where these are not the same rounds.
        measured: When and on what its runs were measured, in words, if not in every round on the whole test set.
        statistics: By measure: ``clean_accuracy``, ``cleanup.rnp.in_loop.attack_success``, ``detection.strip.auc``.
    """

    name: str
    oracle: bool
    seeds: tuple[int, ...]
    unfinished: int
    unpaired: str
    counted: tuple[str, ...]
    collapsed: tuple[int, ...]
    cleaned_collapsed: Mapping[tuple[str, str], tuple[int, ...]]
    cleaned_acted: Mapping[tuple[str, str], str]
    server_saw: tuple[str, ...]
    statistics: Mapping[str, Statistic]
    measured: tuple[str, ...] = ()
    net: tuple[str, ...] = ()


def compare(runs: Sequence[RunView], *, seed: int = 0) -> list[Arm]:
    """Return the arms in order of first appearance.

    Args:
        runs: Every run of every arm; unfinished ones are counted and left out.
        seed: Of the bootstrap.

    Raises:
        UserError: If an arm has two runs of one seed.
    """
    arms: list[Arm] = []
    reference = [run for run in runs if run.arm == runs[0].arm and run.finished]
    for name in dict.fromkeys(run.arm for run in runs):
        own = sorted((run for run in runs if run.arm == name), key=lambda run: run.seed)
        done = [run for run in own if run.finished]
        _refuse_equal_seeds(name, done)
        unpaired = unpaired_because(done, reference)
        arms.append(_arm(name, own, unpaired, arms[0].statistics if arms and not unpaired else {}, seed))
    return arms


def _refuse_equal_seeds(name: str, done: Sequence[RunView]) -> None:
    seeds = [run.seed for run in done]
    if len(set(seeds)) < len(seeds):
        twice = sorted({s for s in seeds if seeds.count(s) > 1})
        remedy = "name each run once, or give one of them another name"
        raise UserError(
            [Problem(path=name, expected="must have one run per seed", got=f"{twice} twice", remedy=remedy)]
        )


def _arm(name: str, runs: Sequence[RunView], unpaired: str, reference: Mapping[str, Statistic], seed: int) -> Arm:
    done = [run for run in runs if run.finished]
    measured = {run.seed: measures_of(run) for run in done}
    statistics = {}
    for key in dict.fromkeys(key for found in measured.values() for key in found):
        values = {s: value for s, found in measured.items() if (value := found.get(key)) is not None}
        first = None if key in ONLY_VALUES else reference.get(key)
        statistics[key] = Statistic(values=values, **(_paired(values, first.values, seed) if first else {}))
    cleanups = dict.fromkeys((n, e["mode"]) for run in done for n, e in run.summary["cleanup"].items())
    return Arm(
        name=name,
        oracle=any(run.oracle for run in runs),
        seeds=tuple(run.seed for run in done),
        unfinished=len(runs) - len(done),
        unpaired=unpaired,
        counted=tuple(dict.fromkeys("{}..{}".format(*span) for run in done if (span := run.summary["counted_rounds"]))),
        collapsed=tuple(run.seed for run in done if run.summary["collapsed"]),
        cleaned_collapsed={key: tuple(run.seed for run in done if _cleaned_collapsed(run, *key)) for key in cleanups},
        cleaned_acted={key: text for key in cleanups if (text := _acted_text(done, *key))},
        server_saw=tuple(dict.fromkeys(seen_text(run.summary["server_saw"]) for run in done)),
        statistics=statistics,
        measured=tuple(dict.fromkeys(text for run in done if (text := _measured_text(run)))),
        net=tuple(dict.fromkeys(text for run in done if (text := _net_text(run)))),
    )


def _measured_text(run: RunView) -> str:
    evaluation = run.scenario.get("evaluation") or {}
    every, samples = evaluation.get("every", 1), evaluation.get("samples")
    parts = [f"every {every} rounds"] * (every > 1) + [f"on {samples} test images"] * (samples is not None)
    return " ".join(parts)


def _net_text(run: RunView) -> str:
    """Return over how many rounds ASR, floor and net ASR are means, or "" where net ASR is ASR less floor."""
    success, floor, net = run.summary["attack_success_rounds"].values()
    if run.summary["collapsed"] or not net or success == floor == net:
        return ""
    return f"ASR over {success}, floor over {floor}, net ASR over the {net} that have both"


def measures_of(run: RunView) -> dict[str, float | None]:
    """Return a run's measures by their names in a comparison; a collapsed run or cleanup has only its accuracies."""
    summary = run.summary
    lost = bool(summary["collapsed"])
    found = {name: summary[name] for name in ("clean_accuracy", "clean_accuracy_price", "collapsed_rounds")}
    found["client_failures"] = sum(summary["client_failures"].values())
    found |= {name: None if lost or summary[name] is None else float(summary[name]) for name in ATTACK}
    found["attack_success_floor"] = summary["attack_success_floor"]  # the twin's, over the rounds in which it is sound
    for name, entry in summary["cleanup"].items():
        gone = lost or _cleaned_collapsed(run, name, entry["mode"])
        key = f"cleanup.{name}.{entry['mode']}"
        found[f"{key}.clean_accuracy"] = entry["after"].get("clean_accuracy")
        found[f"{key}.attack_success"] = None if gone else entry["after"].get("attack_success")
    for name, entry in summary["detection"].items():
        found[f"detection.{name}.auc"] = None if lost else entry.get("auc")
    found["seconds_per_round"] = summary["seconds_per_round"]
    return found


def _acted_text(runs: Sequence[RunView], name: str, mode: str) -> str:
    found = [entry for run in runs if (entry := run.summary["cleanup"].get(name)) and entry["mode"] == mode]
    acted, ran = sum(entry["acted"] for entry in found), sum(entry["rounds"] for entry in found)
    undone = sum(entry.get("rolled_back", 0) for entry in found)
    lost = sum(entry.get("gave_up_target_rounds", 0) for entry in found)
    texts = [f"acted {acted} of {ran} times" if acted < ran else "", f"({undone} rolled back)" if undone else ""]
    texts += [f"gave the target class up {lost} of {ran} times" if lost else ""]
    return "\n  ".join(text for text in texts if text)


def _cleaned_collapsed(run: RunView, name: str, mode: str) -> bool:
    entry = run.summary["cleanup"].get(name)
    return bool(entry and entry["mode"] == mode and 2 * entry["collapsed_rounds"] >= entry["rounds"])


def seen_text(seen: Mapping[str, Any] | None) -> str:
    """Return what a server saw as a few words: ``sums of 5 (bucket), at least 3 honest``."""
    if not seen:
        return "-"
    sizes = seen.get("clients_per_sum") or []
    span = f"{min(sizes)}..{max(sizes)}" if sizes and min(sizes) < max(sizes) else f"{sizes[0]}" if sizes else "?"
    honest = seen.get("honest_per_sum_min")
    text = f"{seen.get('kind') or 'unknown'}, {span} per sum"
    return text if honest is None else f"{text}, >= {honest} honest"


def _paired(values: Mapping[int, float], reference: Mapping[int, float], seed: int) -> dict[str, Any]:
    """Return the mean paired difference over common seeds and its interval."""
    differences = np.array([values[s] - reference[s] for s in sorted(values) if s in reference])
    if differences.size == 0:
        return {}
    return {"difference": float(differences.mean()), "interval": bootstrap_interval(differences, seed)}


def bootstrap_interval(values: np.ndarray[Any, np.dtype[np.float64]], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of a mean, or None for fewer than two values.

    Args:
        values: (n,) independent values.
        seed: Of the resampling: the same values give the same interval.
    """
    if values.size < 2:
        return None
    rows = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
