"""How long methods take on a WRN-16-1 with CIFAR-10 images: RNP, a NAD epoch, an ABL epoch, every detector.

    python benchmarks/methods.py CHECKPOINT [--threads 2]

CHECKPOINT is a backdoored model of ``fedbd train scenarios/central/cifar10-badnets.yaml``; data under FEDBD_DATA. Each
line has what bounds its figure from below: the bare training or inference that it cannot do without.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from central_table import PLAN, build
from detector_table import DETECTORS, mixed, stamped

from fedbd.central.plan import assemble_central, load_central, new_model
from fedbd.defenses.cleanup import NAD, RNP, FineTune
from fedbd.defenses.local import ABL
from fedbd.metrics import logits
from fedbd.models.checkpoint import load_checkpoint
from fedbd.training import TrainingPlan, train
from fedbd.types import Clues, Samples


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def timed(action: Callable[[], Any], turns: int = 3) -> float:
    """Return the median wall seconds of some turns."""
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def say(name: str, seconds: float, bound: float, of: str) -> None:
    print(f"{name:<44} {seconds:8.2f} s   {seconds / bound:5.2f} x {of} ({bound:.2f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = load_central(PLAN, ["seed=1"])
    data = assemble_central(plan)
    model = new_model(plan, data.dataset)
    load_checkpoint(model, given.checkpoint)
    model.eval()
    trusted, many = data.trusted(625, 0.2, 1), data.trusted(2500, 0.0004, 1)  # 500 and 2,499 to fit on
    epoch = TrainingPlan(epochs=1, batch_size=64, lr=0.01, augment="crop_flip")

    def bare(samples: Samples) -> float:
        return timed(lambda: train(copy.deepcopy(model), samples, epoch, rng()))

    say("RNP, 500 images to fit on", timed(lambda: RNP(augment="crop_flip").clean(model, trusted, Clues(), rng()), 1),
        40 * bare(trusted.fit), "40 training epochs on its 500")  # fmt: skip
    one, plain = bare(many.fit), FineTune(epochs=1)
    tuned = timed(lambda: plain.clean(model, many, Clues(), rng()))
    say("fine-tuning epoch, 2,500 images", tuned, one, "a bare epoch")
    two = timed(lambda: NAD(epochs=1, teacher_epochs=1).clean(model, many, Clues(), rng()))
    say("NAD epoch, 2,500 images (less the teacher's)", two - tuned, one, "a bare epoch")
    part = data.train.subset(np.arange(2000))
    control = TrainingPlan(epochs=1, batch_size=64, lr=0.01)
    least = timed(lambda: train(copy.deepcopy(model), part, control, rng()))
    least += timed(lambda: logits(model, part, threads=1))
    abl = timed(lambda: ABL().fit(copy.deepcopy(model), part, control, {}, rng()))
    say("ABL epoch, 2,000 images", abl, least, "plain training and one forward pass")
    test, trigger = data.dataset.test, plan.poison.trigger.impl if plan.poison is not None else None
    inputs, _ = mixed(model, [test.images[:1000], stamped(trigger, test.images[1000:2000])], 1)
    forward = timed(lambda: logits(model, inputs))
    for name, fields in DETECTORS.items():
        detector = build("detection", fields)
        seconds = timed(lambda score=detector.score: score(model, inputs, trusted, rng()), 1)  # type: ignore[misc]
        say(f"{name}, 2,000 inputs", seconds, forward, "one forward pass")


if __name__ == "__main__":
    main()
