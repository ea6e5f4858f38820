"""The controls of federated ABL: how much poison, who defends, how skewed the data are, and what the start knows.

    python benchmarks/abl_controls.py OUT [--seeds 1 2 3] [--arms none abl] [--rounds 20]

Runs variants of scenarios/mnist-abl.yaml (MNIST under FEDBD_DATA), writes OUT/controls.csv and prints a table. Finished
runs are taken as they are, so a killed study goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from studies import carry_on, folder_of, is_done, percent

from fedbd.config.scenario import Scenario, load_scenario
from fedbd.records.record import read_rounds
from fedbd.report.rows import write_rows
from fedbd.summary import mean

BASE = Path(__file__).resolve().parents[1] / "scenarios" / "mnist-abl.yaml"
PARTITIONS = {
    "iid": "{name: iid, clients: 10}",
    "dirichlet 0.5": "{name: dirichlet, alpha: 0.5, clients: 10}",
    "dirichlet 0.1": "{name: dirichlet, alpha: 0.1, clients: 10}",
}
SHARES = (0.0, 0.01, 0.05, 0.1)
NONE, UNTESTED, WARM = "local_defense=null", "local_defense.confidence=null", "start={warm_up: 10}"
HALF = "attacks[0].clients={ids: [0, 1, 2, 3, 4]}"
DEFENSES: dict[str, tuple[tuple[float, ...], list[str]]] = {
    "none": (SHARES, [NONE]),
    "abl": (SHARES, []),
    "abl, no test": (SHARES, [UNTESTED]),
    "abl at 3 of 10": ((0.1,), [UNTESTED, "local_defense_clients={count: 3}"]),
    "none, warm": ((0.0, 0.1), [NONE, WARM]),
    "abl, no test, warm": ((0.0, 0.1), [UNTESTED, WARM]),
    "none, half polluted": ((0.1,), [NONE, HALF]),
    "abl, no test, at the clean half": ((0.1,), [UNTESTED, HALF, "local_defense_clients={ids: [5, 6, 7, 8, 9]}"]),
}
"""Of each defense the shares of poison at which it is tried, and what it sets."""


def variants(seeds: Sequence[int], arms: Sequence[str], rounds: int) -> Iterator[tuple[dict[str, Any], Scenario]]:
    for split, partition in PARTITIONS.items():
        for share in SHARES:
            for defense, (shares, settings) in DEFENSES.items():
                if defense not in arms or share not in shares:
                    continue
                for seed in seeds:
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
        "precision": mean([notes.get("isolation_precision") for notes in isolated]),
        "recall": mean([notes.get("isolation_recall") for notes in isolated]),
        "passed": mean([float((notes.get("confidence") or {}).get("passed", False)) for notes in isolated]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(DEFENSES), choices=list(DEFENSES))
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    wanted = list(variants(given.seeds, given.arms, given.rounds))
    status = carry_on([scenario for _, scenario in wanted], given.out)
    rows = [{**where, **measured(folder_of(given.out, s))} for where, s in wanted if is_done(given.out, s)]
    write_rows(given.out / "controls.csv", rows)
    for key in dict.fromkeys((row["partition"], row["poison"], row["defense"]) for row in rows):
        own = [row for row in rows if (row["partition"], row["poison"], row["defense"]) == key]
        cells = [", ".join(percent(row[name]) for row in own) for name in ("clean_accuracy", "attack_success")]
        means = [percent(mean([row[name] for row in own])) for name in ("precision", "recall", "passed")]
        print("| " + " | ".join([*map(str, key), *cells, *means]) + " |")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
