"""One model for one, possibly poisoned, data set: what the source papers' tables start from.

What is to be trained, and on which data; ``fedbd.central.training`` trains it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, MinLen
from numpy.typing import NDArray
from torch import nn

from fedbd.attacks.poisoning import cover_problem
from fedbd.central.repair import judge
from fedbd.config.file_kinds import refuse_federated
from fedbd.config.plans import DataPlan
from fedbd.config.scenario_file import override, read_yaml
from fedbd.config.schema import Kind, Method, parse, to_plain
from fedbd.data.files import content_of
from fedbd.data.stratify import stratified
from fedbd.data.trusted_groups import draw_groups
from fedbd.errors import Problem, ScenarioError, UserError
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.targets import TargetField, target_problem
from fedbd.training import TrainingPlan
from fedbd.types import AttackContext, Dataset, Notes, Samples, TrustedData


@dataclass(frozen=True, kw_only=True)
class PoisonPlan:
    """How the data set is poisoned.

    Attributes:
        method: An attack that poisons a data set (``per: dataset``).
        target: Target label, or ``all_to_all``: of an image of class y class y + 1, and 0 of one of the last class.
        trigger: The trigger.
        enabled: False gives the attack-free twin: the trigger is measured, nothing is poisoned.
    """

    method: Annotated[Method, Kind("attack")]
    target: TargetField
    trigger: Annotated[Method, Kind("trigger")]
    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class CentralPlan:
    """A central training.

    Attributes:
        name: Its name.
        data: The data set.
        model: The model family.
        training: Epochs, rates, batches, augmentation of plain training; null where a defense trains.
        defense: A defense that trains the model itself, in a schedule of its own, in place of ``training``.
        seed: Decides initialization, order, poison and held-out data.
        held_out: Clean samples kept out of the training, for defenses; their poisoned form is never seen. Where the
            data have groups, whole ones are kept out.
        poison: The poisoning, or None.
    """

    name: Annotated[str, MinLen(1)]
    data: DataPlan
    model: Annotated[Method, Kind("model")]
    training: TrainingPlan | None = None
    defense: Annotated[Method | None, Kind("central_defense")] = None
    seed: int = 0
    held_out: Annotated[int, Ge(0)] = 2500
    poison: PoisonPlan | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        if (self.training is None) != (self.defense is None):
            given = self.defense is not None and self.defense.impl.needs_isolated
            expected = "must be above 0 here: without tuning nothing is isolated, and no file can name what to unlearn"
            return [("defense.tuning_epochs", expected)] if given else []
        found = "neither" if self.training is None else "both"
        return [("training", f"must be given, or a defense, which has a schedule of its own; there are {found}")]

    @property
    def epochs(self) -> int:
        """Epochs of the whole training, whoever trains."""
        if self.training is not None:
            return self.training.epochs
        return len(self.defense.impl.schedule) if self.defense is not None else 0


@dataclass(frozen=True, kw_only=True)
class CentralData:
    """The data of a central training.

    Attributes:
        dataset: The data set as it is.
        train: What is trained on, poisoned.
        poisoned: (k,) int64 ascending: which of ``train`` are poisoned (ground truth).
        held_out: (m,) int64 ascending indices into ``dataset.train`` that ``train`` leaves out.
    """

    dataset: Dataset
    train: Samples
    poisoned: NDArray[np.int64]
    held_out: NDArray[np.int64]

    def trusted(self, size: int, validate_share: float, seed: int) -> TrustedData:
        """Return so many clean samples out of the held-out ones, split as ``data.trusted.Trusted`` does."""
        pool = self.dataset.train.subset(self.held_out)
        return draw_trusted(pool, self.dataset.classes, size, validate_share, seed)[0]


def draw_trusted(
    pool: Samples, classes: int, size: int, validate_share: float, seed: int
) -> tuple[TrustedData, NDArray[np.int64]]:
    """Draw trusted data from clean samples; the same arguments give the same.

    Args:
        pool: What to draw from.
        classes: Number of classes of the task.
        size: How many samples.
        validate_share: Share of them to validate on; both parts get at least one.
        seed: Of the draw.

    Returns:
        The trusted data, and the drawn places in ``pool``, ascending.

    Raises:
        UserError: If the pool has too few.
    """
    if not 2 <= size <= len(pool):
        expected = f"must be from 2 to {len(pool)}, the clean samples that were kept out of the training"
        raise UserError([Problem(path="trusted", expected=expected, got=str(size))])
    rng = numpy_rng(seed, "trusted/central", size)
    chosen = np.sort(rng.permutation(len(pool))[:size]).astype(np.int64)
    count = min(max(1, round(size * validate_share)), size - 1)
    validate, fit = stratified(pool.labels.numpy()[chosen], count, rng)
    return TrustedData(pool.subset(chosen[fit]), pool.subset(chosen[validate]), classes), chosen


def load_central(path: str | Path, settings: Sequence[str] = ()) -> CentralPlan:
    """Read a central training's YAML file.

    Raises:
        ScenarioError: With every mistake in it.
    """
    raw = read_yaml(Path(path))
    refuse_federated(raw, Path(path))
    heading = f"{path} is not a central training:"
    problems: list[Problem] = []
    plan = parse(CentralPlan, override(raw, list(settings)), "", problems)
    if plan is None or problems:
        raise ScenarioError(problems, heading)
    if plan.poison is not None:
        problems = _poison_problems(plan.poison)
    if problems:
        raise ScenarioError(problems, heading)
    return plan


def _poison_problems(poison: PoisonPlan) -> list[Problem]:
    """Return what cannot work together in a poisoning."""
    attack, name = poison.method.impl, poison.method.name
    found = [
        target_problem(poison.target, name, attack, "poison.target"),
        cover_problem(attack, poison.trigger, "poison.cover"),
    ]
    if getattr(attack, "per", "dataset") != "dataset":
        expected = "must be dataset: a central training poisons its data set once"
        found.append(Problem(path="poison.per", expected=expected, got="'batch'"))
    return [problem for problem in found if problem is not None]


def twin_of(plan: CentralPlan) -> CentralPlan:
    """Return the attack-free twin: the same draws and initialization, nothing poisoned."""
    return replace(plan, poison=plan.poison and replace(plan.poison, enabled=False))


def assemble_central(plan: CentralPlan) -> CentralData:
    """Load, hold out, and poison the rest."""
    root = Path(plan.data.root) if plan.data.root else None
    dataset: Dataset = plan.data.method.impl.load(root)
    out, rest = hold_out(plan.seed, plan.held_out, len(dataset.train), dataset.groups)
    train, poisoned = dataset.train.subset(rest), np.empty(0, np.int64)
    if plan.poison is not None and plan.poison.enabled:
        ctx = AttackContext(
            trigger=plan.poison.trigger.impl,
            target=plan.poison.target,
            classes=dataset.classes,
            global_weights=np.empty(0, np.float32),
        )
        train, poisoned = plan.poison.method.impl.pollute(train, ctx, torch_rng(plan.seed, "pollute"))
    return CentralData(dataset=dataset, train=train, poisoned=poisoned, held_out=out)


def hold_out(
    seed: int, held_out: int, samples: int, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which of so many training samples are kept out of the training, and the rest; both ascending.

    Where the data have groups (tracks of near copies), whole ones are kept out; what is not wanted of the last one is
    in neither part.

    Raises:
        UserError: If nothing would be left to train on.
    """
    if held_out >= samples:
        expected = f"must leave samples to train on: less than {samples}"
        raise UserError([Problem(path="held_out", expected=expected, got=str(held_out))])
    if groups is not None and held_out:
        everything, wanted = np.zeros(samples, np.int64), np.array([held_out], dtype=np.int64)
        try:
            out, _, rest = draw_groups(everything, groups, wanted, 0, numpy_rng(seed, "held-out"))
        except UserError as error:
            raise UserError(
                [replace(problem, path="held_out", remedy="lower it") for problem in error.problems]
            ) from None
        return out, rest
    order = numpy_rng(seed, "held-out").permutation(samples).astype(np.int64)
    return np.sort(order[:held_out]), np.sort(order[held_out:])


def new_model(plan: CentralPlan, dataset: Dataset) -> nn.Module:
    """Return the initial model; poisoned training and twin start from the same."""
    model: nn.Module = plan.model.impl.build(dataset.shape, dataset.classes, torch_rng(plan.seed, "init"))
    return model


def measure(plan: CentralPlan, data: CentralData, model: nn.Module) -> Notes:
    """Return CA, ASR and the rest on the test set, null where there is no trigger."""
    poison, dataset = plan.poison, data.dataset
    trigger, target = (None, None) if poison is None else (poison.trigger.impl, poison.target)
    return judge(model, dataset.test, dataset.classes, trigger, target)


def identity(plan: CentralPlan) -> str:
    """Return a hash of all that decides the weights."""
    plain: dict[str, Any] = dict(to_plain(plan))
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "root"}
    if plan.poison is not None and isinstance(plain["poison"]["trigger"].get("file"), str):
        plain["poison"]["trigger"]["file"] = content_of(plain["poison"]["trigger"]["file"])
    if plan.defense is None:
        del plain["defense"]  # trainings from before there was such a field are what they were
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
