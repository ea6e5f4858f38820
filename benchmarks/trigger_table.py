"""Every trigger, learned by one model from one poisoned data set: all-to-one, all-to-all and with clean labels.

    python benchmarks/trigger_table.py run  OUT [--seeds 1] [--plan scenarios/central/digits-triggers.yaml]
    python benchmarks/trigger_table.py show OUT

Each result is a file in OUT; what is there is not computed again, so a killed study goes on. The floor is the same
trigger on a model of the same seed that was trained on the clean data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from fedbd.central.plan import CentralPlan, assemble_central, load_central, measure, new_model
from fedbd.config.scenario_file import dump_yaml
from fedbd.models.checkpoint import load_checkpoint, save_safetensors
from fedbd.registry import METHODS
from fedbd.seeding import torch_rng
from fedbd.training import train

PLAN = Path(__file__).resolve().parents[1] / "scenarios" / "central" / "digits-triggers.yaml"
TRIGGERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in METHODS["trigger"]},
    "object_overlay, sticker": {"name": "object_overlay", "object": "sticker"},
    "sig, delta 40/255": {"name": "sig", "delta": 40 / 255},
    "low_frequency, delta 40/255": {"name": "low_frequency", "delta": 40 / 255},
    "blend, alpha 0.5": {"name": "blend", "alpha": 0.5},
}
MODES: dict[str, dict[str, Any]] = {
    "all-to-one": {"share": 0.1},
    "all-to-all": {"share": 0.2, "target": "all_to_all"},
    "clean labels": {"share": 0.8, "labels": "clean"},
}
NOISE = {"cover": 2}
"""WaNet's noise mode, where labels are dirty."""


def plan_of(file: Path, seed: int, trigger: dict[str, Any], mode: str) -> CentralPlan:
    """Return the plan with a trigger and a mode."""
    own = MODES[mode] | (NOISE if trigger["name"] == "wanet" and mode != "clean labels" else {})
    settings = {"seed": seed, "poison.trigger": trigger, **{f"poison.{key}": value for key, value in own.items()}}
    return load_central(file, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def clean_model(plan: CentralPlan, out: Path) -> torch.nn.Module:
    """Return the model trained on the clean data of a seed, from the file if it is there."""
    data = assemble_central(plan)
    model, file = new_model(plan, data.dataset), out / f"clean-{plan.seed}.safetensors"
    if file.exists():
        load_checkpoint(model, file)
        return model.eval()
    clean = data.dataset.train.subset(torch.as_tensor(sorted(set(range(len(data.dataset.train))) - set(data.held_out))))
    train(model, clean, plan.training, torch_rng(plan.seed, "central", 0))
    save_safetensors(model, file)
    return model.eval()


def run(out: Path, seeds: list[int], file: Path) -> None:
    """Compute what is not there yet."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for mode in MODES:
            for name, trigger in TRIGGERS.items():
                result = out / f"{mode}-{name}-{seed}.json".replace("/", "_")
                if result.exists():
                    continue
                plan = plan_of(file, seed, trigger, mode)
                data = assemble_central(plan)
                model = new_model(plan, data.dataset)
                train(model, data.train, plan.training, torch_rng(plan.seed, "central", 0))
                line = {"mode": mode, "trigger": name, "seed": seed, "poisoned": len(data.poisoned)}
                line |= measure(plan, data, model.eval())
                line["floor"] = measure(plan, data, clean_model(plan, out))["attack_success"]
                part = result.with_suffix(".part")
                part.write_text(json.dumps(line), encoding="utf-8")
                part.replace(result)
                print(dump_yaml(line).replace("\n", "  "), flush=True)


def show(out: Path) -> None:
    """Print the table as Markdown: CA and ASR, and the floor behind it; means over seeds."""
    lines = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    print("| trigger | " + " | ".join(MODES) + " |\n" + "|---" * (len(MODES) + 1) + "|")
    for name in TRIGGERS:
        cells = []
        for mode in MODES:
            own = [line for line in lines if (line["trigger"], line["mode"]) == (name, mode)]
            means = [
                100 * statistics.mean(line[key] for line in own) if own else float("nan")
                for key in ("clean_accuracy", "attack_success", "floor")
            ]
            cells.append("{:.1f} / {:.1f} ({:.1f})".format(*means) if own else "-")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--plan", type=Path, default=PLAN)
    asked = parser.parse_args()
    if asked.action == "run":
        run(asked.out, asked.seeds, asked.plan)
    else:
        show(asked.out)
