"""Every cleanup on a backdoored model: the table of the source papers, over seeds, with the twin's floor.

    python benchmarks/central_table.py run  MODELS OUT --seeds 1 2 3 [--arms rnp nad]
    python benchmarks/central_table.py show OUT

MODELS is a folder that ``fedbd train scenarios/central/cifar10-badnets.yaml -o runs`` wrote, with
``seed-N/model.safetensors`` and ``seed-N-twin/model.safetensors``. Each result is a file in OUT; what is there is not
computed again, so a killed study goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedbd.central.plan import (
    CentralData,
    CentralPlan,
    assemble_central,
    draw_trusted,
    load_central,
    new_model,
    twin_of,
)
from fedbd.central.repair import Truth, judge, repair_all, stamped_inputs
from fedbd.config.schema import parse
from fedbd.errors import Problem
from fedbd.models.checkpoint import load_checkpoint
from fedbd.registry import resolve
from fedbd.summary import gave_up_target
from fedbd.types import Clues

PLAN = Path(__file__).resolve().parents[1] / "scenarios" / "central" / "cifar10-badnets.yaml"


@dataclass(frozen=True)
class Arm:
    """A row of the table: a chain of methods, and the clean data that it gets."""

    chain: tuple[dict[str, Any], ...]
    trusted: int = 500
    validate_share: float = 0.2


RNP = {"name": "rnp", "augment": "crop_flip"}
RECOVERY = {"name": "trigger_recovery"}
ARMS = {
    "finetune": Arm(({"name": "finetune"},), 2500),
    "nad": Arm(({"name": "nad"},), 2500),
    "fine_pruning": Arm(({"name": "fine_pruning"},), 2500),
    "rnp": Arm((RNP,), 500),
    "rnp, threshold 0.2": Arm(({**RNP, "threshold": 0.2},), 500),
    "rnp, threshold 0.3": Arm(({**RNP, "threshold": 0.3},), 500),
    "rnp, mask rate 0.05, within 0.1": Arm(({**RNP, "recover_lr": 0.05, "keep_within": 0.1},), 500),
    "finetune, 500": Arm(({"name": "finetune"},), 500),
    "rnp > finetune unlearned": Arm((RNP, {"name": "finetune", "start": "unlearned"}), 2500),
    "rnp > nad unlearned": Arm((RNP, {"name": "nad", "start": "unlearned"}), 2500),
    "rnp > finetune recovered": Arm((RNP, {"name": "finetune", "start": "recovered"}), 2500),
    "rnp > nad recovered": Arm((RNP, {"name": "nad", "start": "recovered"}), 2500),
    "clp": Arm(({"name": "clp"},), 500),
    "label > trigger > linf": Arm(
        ({"name": "rnp_label", "augment": "crop_flip"}, RECOVERY, {"name": "linf_pruning"}), 500
    ),
    "linf, real trigger": Arm(({"name": "linf_pruning", "knowledge": "real", "oracle": True},), 500),
    "linf, triggered inputs": Arm(({"name": "linf_pruning", "knowledge": "inputs", "oracle": True},), 500),
    "flain": Arm(({"name": "flain"},), 500),
    # Chosen by cleanup_tuning.py. Fine-tuning's and Fine-Pruning's choices are the arms above.
    "nad, tuned": Arm(({"name": "nad", "lr": 0.03, "teacher_lr": 0.03, "lr_drop_epoch": 10},), 2500),
    "finetune, at that rate": Arm(({"name": "finetune", "lr": 0.03, "lr_drop_epoch": 10},), 2500),
    "rnp, tuned": Arm(({**RNP, "unlearn_lr": 0.003, "recover_lr": 0.02, "keep_within": 0.1},), 500),
    "clp, tuned": Arm(({"name": "clp", "u": 2.5},), 500),
    "linf, real trigger, tuned": Arm(
        ({"name": "linf_pruning", "knowledge": "real", "oracle": True, "keep_within": 0.04},), 500
    ),
    "flain, tuned": Arm(({"name": "flain", "bound": 0.08},), 500),
}


def build(kind: str, fields: dict[str, Any]) -> Any:
    """Return a method from its name and fields, as a scenario holds them."""
    problems: list[Problem] = []
    own = {key: value for key, value in fields.items() if key != "name"}
    impl = parse(resolve(kind, fields["name"], fields["name"]), own, fields["name"], problems)
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    return impl


def models(plan: CentralPlan, data: CentralData, folder: Path) -> list[torch.nn.Module]:
    """Return the backdoored model and, where there is one, its twin."""
    found = []
    for name in (f"seed-{plan.seed}", f"seed-{plan.seed}-twin"):
        file = folder / name / "model.safetensors"
        if file.exists():
            model = new_model(plan, data.dataset)
            load_checkpoint(model, file)
            found.append(model.eval())
    return found


def study(folder: Path, out: Path, seeds: list[int], arms: dict[str, Arm]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        todo = {name: arm for name, arm in arms.items() if not place(out, name, seed).exists()}
        if todo:
            plan = load_central(PLAN, [f"seed={seed}"])
            one_seed(plan, assemble_central(plan), folder, out, todo)


def one_seed(plan: CentralPlan, data: CentralData, folder: Path, out: Path, arms: dict[str, Arm]) -> None:
    both = models(plan, data, folder)
    if not both or plan.poison is None:
        print(f"seed {plan.seed}: no model in {folder}")
        return
    trigger, target = plan.poison.trigger.impl, plan.poison.target
    pool = data.dataset.train.subset(data.held_out)

    def judged(model: torch.nn.Module) -> Any:
        return judge(model, data.dataset.test, data.dataset.classes, trigger, target)

    for name, arm in arms.items():
        trusted, taken = draw_trusted(pool, data.dataset.classes, arm.trusted, arm.validate_share, plan.seed)
        rest = pool.subset(np.setdiff1d(np.arange(len(pool)), taken))  # an oracle's inputs come without clean originals
        rows = repair_all(
            both[0],
            {f"step {i}": build("cleanup", fields) for i, fields in enumerate(arm.chain)},
            trusted,
            Clues(reference=new_model(twin_of(plan), data.dataset).eval()),
            plan.seed,
            judged,
            truth=Truth(trigger=trigger, target=target, triggered=stamped_inputs(rest, trigger, target)),
            twin=both[1] if len(both) > 1 else None,
            chain=len(arm.chain) > 1,
        )
        lines = [{**row.flat(), "notes": row.repaired.notes} for row in rows]
        file = place(out, name, plan.seed)
        text = json.dumps({"arm": asdict(arm), "steps": lines}, default=str)
        file.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        file.with_suffix(".part").rename(file)  # a killed study leaves no half result
        last = lines[-1]
        print(
            f"{plan.seed} {name}: {last['clean_accuracy_after']:.4f} / {last['attack_success_after']:.4f}", flush=True
        )


def place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '_').replace('>', 'then').replace(',', '')}-{seed}.json"


def results_of(out: Path, arms: dict[str, Arm]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return by arm and seed what its last step left, with what its first one was given and the seconds of all.

    A file of another chain or budget than the arm's is no result of it.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, arm in arms.items():
        prefix = place(out, name, 0).stem.removesuffix("0")
        for file in sorted(out.glob(f"{prefix}*.json")):
            seed = file.stem.removeprefix(prefix)
            if not seed.isdecimal():
                continue
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["arm"] != json.loads(json.dumps(asdict(arm))):
                raise SystemExit(
                    f"{file} is of another arm than '{name}' is now: remove it, or run it into another folder"
                )
            steps = held["steps"]
            first = {key: value for key, value in steps[0].items() if key.endswith("_before")}
            whole = {"seconds": sum(step["seconds"] for step in steps), **first}
            found.setdefault(name, {})[int(seed)] = {**steps[-1], **whole}
    return {name: dict(sorted(lines.items())) for name, lines in found.items()}


def show(out: Path) -> None:
    titles = ["arm", "clean data", "seeds", "acted", "CA %", "without target class", "target class", "ASR %", "floor %"]
    titles += ["CA change, points", "s"]
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    results = results_of(out, ARMS)
    for name, lines in results.items():
        print(row(name, ARMS[name], list(lines.values())))
    for first, second in (("nad", "finetune"), ("nad, tuned", "finetune, at that rate"), ("nad, tuned", "finetune")):
        paired(results, first, second)


def row(name: str, arm: Arm, lines: list[dict[str, Any]]) -> str:
    def spread(key: str, factor: float = 100.0) -> str:
        values = [factor * line[key] for line in lines if line[key] is not None]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    change = [100 * (line["clean_accuracy_after"] - line["clean_accuracy_before"]) for line in lines]
    lost = sum(lost_target(line) for line in lines)
    mark = " †" if any(line["oracle"] for line in lines) else ""
    cells = [
        name + mark,
        "none" if name.startswith("clp") else str(arm.trusted),
        str(len(lines)),
        f"{sum(line['acted'] for line in lines)} of {len(lines)}",
        spread("clean_accuracy_after"),
        spread("clean_accuracy_without_target_after"),
        spread("target_class_accuracy_after") + (f" ‡ {lost} of {len(lines)}" if lost else ""),
        spread("attack_success_after"),
        spread("attack_success_floor"),
        f"{statistics.mean(change):+.1f}",
        f"{statistics.mean(line['seconds'] for line in lines):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def lost_target(line: dict[str, Any]) -> bool:
    """Say whether a repair gave the target class up."""
    key = "target_class_accuracy"
    return gave_up_target({key: line[f"{key}_before"]}, {key: line[f"{key}_after"]})


def paired(results: dict[str, dict[int, dict[str, Any]]], first: str, second: str) -> None:
    """Print the mean paired difference of two arms with its 95 % interval (Student's t over seeds)."""
    from scipy.stats import t  # noqa: PLC0415

    seeds = sorted(set(results.get(first, {})) & set(results.get(second, {})))
    if len(seeds) < 2:
        return
    for key in ("clean_accuracy_after", "attack_success_after"):
        d = [100 * (results[first][seed][key] - results[second][seed][key]) for seed in seeds]
        half = t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / len(d) ** 0.5
        mean = statistics.mean(d)
        interval = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        print(f"\n{first} less {second}, {key}, {len(d)} seeds: {mean:+.2f} points {interval}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("models", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--seeds", type=int, nargs="+", default=[1])
    run.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    run.add_argument("--threads", type=int, default=1)
    shown = commands.add_parser("show")
    shown.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        show(given.out)
        return
    torch.set_num_threads(given.threads)
    study(given.models, given.out, given.seeds, {name: ARMS[name] for name in given.arms})


if __name__ == "__main__":
    main()
