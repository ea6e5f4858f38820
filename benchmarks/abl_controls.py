"""The controls of federated ABL: how much poison, who defends, and how skewed the data are.

    python benchmarks/abl_controls.py OUT [--seeds 3] [--rounds 20]

Runs variants of scenarios/mnist-abl.yaml (MNIST under FEDBD_DATA), writes OUT/controls.csv and prints a table. Finished
runs are taken as they are, so a killed study goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedbd.config.scenario import Scenario, load_scenario
from fedbd.records.environment import cores
from fedbd.records.record import FINISHED, read_rounds, read_summary
from fedbd.report.console import LiveRuns
from fedbd.report.rows import write_rows
from fedbd.running.jobs import run_all
from fedbd.running.runs import plan

BASE = Path(__file__).resolve().parents[1] / "scenarios" / "mnist-abl.yaml"
PARTITIONS = {
    "iid": "{name: iid, clients: 10}",
    "dirichlet 0.5": "{name: dirichlet, alpha: 0.5, clients: 10}",
    "dirichlet 0.1": "{name: dirichlet, alpha: 0.1, clients: 10}",
}
DEFENSES = {
    "none": ["local_defense=null"],
    "abl": [],
    "abl, no test": ["local_defense.confidence=null"],
    "abl at 3 of 10": ["local_defense.confidence=null", "local_defense_clients={count: 3}"],
}


def variants(seeds: int, rounds: int) -> Iterator[tuple[dict[str, Any], Scenario]]:
    for split, partition in PARTITIONS.items():
        for share in (0.0, 0.01, 0.05, 0.1):
            for defense, settings in DEFENSES.items():
                if share < 0.1 and defense == "abl at 3 of 10":
                    continue
                for seed in range(1, seeds + 1):
                    name = f"{defense} {share:g} {split}".replace(",", "").replace(" ", "-")
                    own = [f"seed={seed}", f"name={name}", f"rounds={rounds}", "evaluation.twin=false"]
                    own += [f"partition={partition}", f"attacks[0].share={share:g}", *settings]
                    where = {"partition": split, "poison": share, "defense": defense, "seed": seed}
                    yield where, load_scenario(BASE, own)


def measured(folder: Path) -> dict[str, Any]:
    """Return what a run came to: the last round's CA and ASR, and the isolation's quality over clients."""
    lines = read_rounds(folder)
    isolated = [
        notes
        for line in lines
        for notes in (line["notes"].get("clients") or {}).values()
        if notes.get("isolation_share") is not None
    ]
    last = lines[-1]
    return {
        "clean_accuracy": last["clean_accuracy"],
        "attack_success": last["attack_success"],
        "collapsed": last["collapsed"],
        "precision": _mean([notes.get("isolation_precision") for notes in isolated]),
        "recall": _mean([notes.get("isolation_recall") for notes in isolated]),
        "passed": _mean([float((notes.get("confidence") or {}).get("passed", False)) for notes in isolated]),
    }


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    wanted = list(variants(given.seeds, given.rounds))
    todo = [scenario for _, scenario in wanted if not _done(given.out, scenario)]
    with LiveRuns() as live:
        jobs = plan(todo, given.out, overwrite=True) if todo else []
        for job in jobs:
            live.add(str(job.folder), name=job.scenario.name, seed=job.scenario.seed, rounds=job.scenario.rounds)
        run_all(jobs, live, cores())
    rows = [{**where, **measured(_folder(given.out, s))} for where, s in wanted if _done(given.out, s)]
    write_rows(given.out / "controls.csv", rows)
    for key in dict.fromkeys((row["partition"], row["poison"], row["defense"]) for row in rows):
        own = [row for row in rows if (row["partition"], row["poison"], row["defense"]) == key]
        cells = [", ".join(_share(row[name]) for row in own) for name in ("clean_accuracy", "attack_success")]
        means = [_share(_mean([row[name] for row in own])) for name in ("precision", "recall", "passed")]
        print("| " + " | ".join([*map(str, key), *cells, *means]) + " |")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _folder(out: Path, scenario: Scenario) -> Path:
    return out / scenario.name / f"seed-{scenario.seed}"


def _done(out: Path, scenario: Scenario) -> bool:
    summary = read_summary(_folder(out, scenario)) or {}
    return summary.get("status") == FINISHED and summary["planned_rounds"] == scenario.rounds


if __name__ == "__main__":
    main()
