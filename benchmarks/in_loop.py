"""Every cleanup in the loop: the federation goes on from what it repaired, and the attackers go on, too.

    python benchmarks/in_loop.py run  OUT --seeds 1 2 [--arms finetune nad] [-s PATH=VALUE]
    python benchmarks/in_loop.py show OUT --seeds 1 2 [-s PATH=VALUE]

Runs scenarios/gtsrb-tracks.yaml (traffic signs by track, 20 clients of which two attack, one of them in each cohort
from round 11 on) for 60 rounds, once for each method, which repairs the global model after rounds 20, 30, 40 and 50.
Each has its attack-free twin, repaired in the same rounds. In the clear: encrypted sums are the same (tests/engines).
With torchvision's files of GTSRB absent, name others: -s 'data={name: npz, file: gtsrb32.npz, groups: track_train}'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import carry_on, folder_of, is_done, percent

from fedbd.config.scenario import Scenario, load_scenario
from fedbd.records.record import read_rounds, read_summary
from fedbd.summary import mean, was_rolled_back

BASE = Path(__file__).resolve().parents[1] / "scenarios" / "gtsrb-tracks.yaml"
REPAIRS = [20, 30, 40, 50]
ROUNDS = 60
LATER = 5
"""So many attacked rounds after a repair the table looks again."""

GENTLE = {"lr": 0.01}
ARMS: dict[str, dict[str, Any] | str] = {
    "none": {},
    "finetune": {"name": "finetune"},
    "nad": {"name": "nad"},
    "fine_pruning": {"name": "fine_pruning", "mask": "persist"},
    "finetune, rate 0.01": {"name": "finetune", **GENTLE},
    "nad, rate 0.01": {"name": "nad", "teacher_lr": 0.01, **GENTLE},
    "rnp, masks 0.05, within 0.1": {"name": "rnp", "recover_lr": 0.05, "keep_within": 0.1, "mask": "persist"},
    "clp": {"name": "clp", "mask": "persist"},
    "flain": {"name": "flain"},
    "linf, real trigger": {"name": "linf_pruning", "knowledge": "real", "oracle": True, "mask": "persist"},
    "masa": "masa",
}
"""A cleanup's fields, or the name of an aggregation rule, which acts in every round."""


def scenario_of(name: str, seed: int, settings: Sequence[str]) -> Scenario:
    arm = ARMS[name]
    own = [f"name=in-loop-{name.replace(',', '').replace(' ', '-')}", f"seed={seed}", f"rounds={ROUNDS}"]
    if isinstance(arm, str):
        own.append(f"aggregation={arm}")
    elif arm:
        own.append(f"cleanup={json.dumps([{**arm, 'mode': 'in_loop', 'rounds': REPAIRS}])}")
    return load_scenario(BASE, [*settings, *own])


def row(name: str, folders: Sequence[Path]) -> str:
    """Return a line of the table: each cell has all seeds."""
    cells = [_cells(folder) for folder in folders]
    oracle = isinstance(ARMS[name], dict) and "oracle" in ARMS[name]
    return "| " + " | ".join([name + (" †" if oracle else ""), *("; ".join(own) for own in zip(*cells, strict=True))])


def _cells(folder: Path) -> list[str]:
    lines, twin = read_rounds(folder), read_rounds(folder / str((read_summary(folder) or {})["twin"]))
    by_round = {line["round"]: line for line in lines}
    final = {name: mean([line[name] for line in lines[-10:]]) for name in ("clean_accuracy", "attack_success")}
    floor = mean([line["attack_success_floor"] for line in lines[-10:]])
    clean = {"clean_accuracy": mean([line["clean_accuracy"] for line in twin[-10:]]), "attack_success": floor}
    return [*(_repair(by_round, number) for number in REPAIRS), _pair(final), _pair(clean)]


def _repair(by_round: dict[int, dict[str, Any]], number: int) -> str:
    """Return the ASR before a repair, after it and some rounds later, and what it cost in CA."""
    entry = next(iter((by_round[number].get("cleanup") or {}).values()), None)
    later = percent(by_round[number + LATER]["attack_success"])
    if entry is None:
        return f"{percent(by_round[number]['attack_success'])}, -, {later}"
    before, after = entry["before"], entry["after"]
    if not entry["acted"]:
        why = "rolled back" if was_rolled_back(entry) else "no"
        return f"{percent(before['attack_success'])}, {why}, {later}"
    cost = 100 * (after["clean_accuracy"] - before["clean_accuracy"])
    return f"{percent(before['attack_success'])}, {percent(after['attack_success'])}, {later} (CA {cost:+.1f})"


def _pair(measures: dict[str, Any]) -> str:
    return f"{percent(measures['clean_accuracy'])} / {percent(measures['attack_success'])}"


def show(out: Path, seeds: Sequence[int], settings: Sequence[str]) -> None:
    titles = ["method", *(f"round {number}" for number in REPAIRS)]
    titles += [f"mean of rounds {ROUNDS - 9} to {ROUNDS}", "the same of the twin"]
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    for name in ARMS:
        scenarios = [scenario_of(name, seed, settings) for seed in seeds]
        done = [folder_of(out, scenario) for scenario in scenarios if is_done(out, scenario)]
        if done:
            print(row(name, done) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "show"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("-s", "--set", action="append", default=[], metavar="PATH=VALUE")
    given = parser.parse_args()
    wanted = [scenario_of(name, seed, given.set) for seed in given.seeds for name in given.arms]
    status = carry_on(wanted, given.out) if given.command == "run" else 0
    show(given.out, given.seeds, given.set)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
