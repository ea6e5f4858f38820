"""A run's folder, read for people: what tables and curves are made of. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedbd.errors import DataError, Problem
from fedbd.records.record import SCENARIO, read_rounds, read_summary
from fedbd.report.console import percent
from fedbd.summary import summarize


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run, finished or not.

    Attributes:
        arm: What the run is compared as; runs of one arm differ in their seed.
        seed: The scenario's seed; runs of equal seed are paired across arms.
        scenario: The resolved scenario as plain values.
        rounds: The records of its rounds.
        summary: Its summary; for an unfinished run what ``summarize`` makes of the rounds there are.
        oracle: A method of it knows what no defender knows; marked in every table.
        finished: All planned rounds are there.
    """

    arm: str
    seed: int
    scenario: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    oracle: bool = False
    finished: bool = True


def load_run(folder: str | Path, arm: str | None = None) -> RunView:
    """Read a run's folder.

    Args:
        folder: What ``fedbd run`` wrote.
        arm: Its name in comparisons, default the scenario's name.

    Raises:
        DataError: If there is no run in the folder or a file in it is damaged.
    """
    refuse_no_run(Path(folder))
    scenario = _scenario(Path(folder) / SCENARIO)
    rounds = read_rounds(folder)
    planned = int(scenario.get("rounds") or 0)
    # What was measured comes anew from the rounds: a folder of any age gets the measures of this version.
    written = read_summary(folder) or {}
    summary = {**written, **summarize(rounds, _window(written, rounds), planned, _planned_window(scenario, planned))}
    return RunView(
        arm=arm or str(scenario.get("name", Path(folder).name)),
        seed=int(scenario.get("seed") or 0),
        scenario=scenario,
        rounds=rounds,
        summary=summary,
        oracle=is_oracle(scenario),
        finished=0 < planned <= summary["rounds"],
    )


def run_values(folder: str | Path, view: RunView) -> dict[str, Any]:
    """Return a run as JSON values, as ``--json`` prints it: {folder, name, seed, finished, oracle, rounds, summary}."""
    return {
        "folder": str(folder),
        "name": view.arm,
        "seed": view.seed,
        "finished": view.finished,
        "oracle": view.oracle,
        "rounds": len(view.rounds),
        "summary": dict(view.summary),
    }


def unfinished_text(folder: str | Path, view: RunView, *, running: bool) -> str:
    """Return how far a run has come that has not finished, why it ended, and how to go on.

    Args:
        folder: Its folder, as the user names it.
        view: What was read there.
        running: A living process writes it.
    """
    status, reason, done = (view.summary.get(name) for name in ("status", "reason", "rounds"))
    word = "still runs" if running else status or "was killed"
    last = view.rounds[-1] if view.rounds else None
    figures = last and f" (CA {percent(last.get('clean_accuracy'))}, ASR {percent(last.get('attack_success'))})"
    place = f"{done} of {view.summary['planned_rounds']} rounds are done{figures or ''}"
    text = f"{folder}: {word}; {place}{f': {reason}' if reason else ''}"
    if running:
        return text
    if done and view.scenario.get("checkpoint", {}) is None:
        return f"{text}\nIt kept no checkpoints; run it anew: fedbd run {Path(folder) / SCENARIO} --overwrite"
    return f"{text}\nGo on with: fedbd resume {folder}"


def refuse_no_run(folder: Path) -> None:
    """Refuse a folder that is no run's, and say what it is instead and what to name.

    Raises:
        DataError: If there is no scenario in it.
    """
    if (folder / SCENARIO).exists():
        return
    below = [file.parent for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/{SCENARIO}"))]
    got, remedy = f"a folder without {SCENARIO}", "name what `fedbd run` wrote, such as runs/NAME/seed-1"
    if (folder / "central.yaml").exists():
        got, remedy = "that of a training", f"look at its model with `fedbd inspect {folder}`"
    elif below:
        count = f"{len(below)} run{'s' if len(below) > 1 else ''}"
        got, remedy = f"a folder with {count} below it", f"name one of them, such as {below[0]}"
    elif not folder.is_dir():
        got = "no folder"
    raise DataError([Problem(path=str(folder), expected="must be a run's folder", got=got, remedy=remedy)])


def _scenario(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = Problem(
            path=str(path), expected="must be a run's scenario", got=str(error), remedy="name a run's folder"
        )
        raise DataError([problem]) from error
    if not isinstance(found, dict):
        raise DataError([Problem(path=str(path), expected="must be a mapping", got=type(found).__name__)])
    return found


def _window(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the attack window that the summary names; without a summary, from first to last round with a poisoner."""
    if "attack_window" in summary:
        window = summary["attack_window"]
        return None if window is None else (int(window[0]), int(window[1]))
    hit = [line["round"] for line in rounds if line.get("attackers") or line.get("polluted")]
    return (hit[0], hit[-1]) if hit else None


def _planned_window(scenario: Mapping[str, Any], rounds: int) -> tuple[int, int] | None:
    """Return what ``roles.planned_window`` does, from a resolved scenario as plain values (and without torch)."""
    spans = [attack.get("rounds") or {} for attack in scenario.get("attacks") or ()]
    windows = [(int(span.get("first") or 1), min(int(span.get("last") or rounds), rounds)) for span in spans]
    within = [window for window in windows if window[0] <= rounds]
    return (min(first for first, _ in within), max(last for _, last in within)) if within else None


def is_oracle(scenario: object) -> bool:
    """Return whether some method in a resolved scenario has ``oracle: true``, or is an oracle by its name."""
    if isinstance(scenario, Mapping):
        named = str(scenario.get("name", "")).startswith("oracle") and "rounds" not in scenario
        return named or scenario.get("oracle") is True or any(is_oracle(value) for value in scenario.values())
    return isinstance(scenario, list) and any(is_oracle(value) for value in scenario)
