"""One model trained on one, possibly poisoned, data set: what the source papers' tables start from.

It checkpoints every epoch and goes on from there; a resumed training gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, MinLen
from numpy.typing import NDArray
from torch import nn

from fedbd.data.files import content_of
from fedbd.data.stratify import stratified
from fedbd.errors import Problem, ScenarioError, UserError
from fedbd.models.checkpoint import load_checkpoint, read_tensors, save_safetensors, save_tensors
from fedbd.plans import DataPlan
from fedbd.repair import judge
from fedbd.scenario_file import dump_yaml, override, read_yaml
from fedbd.schema import Kind, Method, parse, to_plain
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.training import TrainingPlan, sgd, train_epoch
from fedbd.types import AttackContext, Dataset, Notes, Samples, TrustedData

PLAN, STATE, LOG, MODEL = "central.yaml", "state.safetensors", "epochs.jsonl", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PoisonPlan:
    """How the data set is poisoned.

    Attributes:
        method: An attack that poisons a data set (``per: dataset``).
        target: Target label.
        trigger: The trigger.
        enabled: False gives the attack-free twin: the trigger is measured, nothing is poisoned.
    """

    method: Annotated[Method, Kind("attack")]
    target: Annotated[int, Ge(0)]
    trigger: Annotated[Method, Kind("trigger")]
    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class CentralPlan:
    """A central training.

    Attributes:
        name: Its name.
        data: The data set.
        model: The model family.
        training: Epochs, rates, batches, augmentation.
        seed: Decides initialization, order, poison and held-out data.
        held_out: Clean samples kept out of the training, for defenses; their poisoned form is never seen.
        poison: The poisoning, or None.
    """

    name: Annotated[str, MinLen(1)]
    data: DataPlan
    model: Annotated[Method, Kind("model")]
    training: TrainingPlan
    seed: int = 0
    held_out: Annotated[int, Ge(0)] = 2500
    poison: PoisonPlan | None = None


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
    heading = f"{path} is not a central training:"
    problems: list[Problem] = []
    plan = parse(CentralPlan, override(raw, list(settings)), "", problems)
    if plan is None or problems:
        raise ScenarioError(problems, heading)
    if plan.poison is not None and getattr(plan.poison.method.impl, "per", "dataset") != "dataset":
        expected = "must be dataset: a central training poisons its data set once"
        raise ScenarioError([Problem(path="poison.per", expected=expected, got="'batch'")], heading)
    return plan


def twin_of(plan: CentralPlan) -> CentralPlan:
    """Return the attack-free twin: the same draws and initialization, nothing poisoned."""
    return replace(plan, poison=plan.poison and replace(plan.poison, enabled=False))


def assemble_central(plan: CentralPlan) -> CentralData:
    """Load, hold out, and poison the rest."""
    root = Path(plan.data.root) if plan.data.root else None
    dataset: Dataset = plan.data.method.impl.load(root)
    out, rest = hold_out(plan.seed, plan.held_out, len(dataset.train))
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


def hold_out(seed: int, held_out: int, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which of so many training samples are kept out of the training, and the rest; both ascending.

    Raises:
        UserError: If nothing would be left to train on.
    """
    if held_out >= samples:
        expected = f"must leave samples to train on: less than {samples}"
        raise UserError([Problem(path="held_out", expected=expected, got=str(held_out))])
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


def train_central(
    plan: CentralPlan, data: CentralData, folder: Path, on_epoch: Callable[[Notes], None] | None = None
) -> nn.Module:
    """Train, or go on with, a model; finished epochs are never lost.

    Args:
        plan: What to train.
        data: Its data.
        folder: ``central.yaml`` (the plan), ``state.safetensors`` (weights, momentum, epoch), ``epochs.jsonl`` and at
            the end ``model.safetensors``.
        on_epoch: Called with each new epoch's line.

    Returns:
        The trained model, in eval mode.

    Raises:
        ScenarioError: If the folder holds another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, folder)
    model = new_model(plan, data.dataset)
    if (folder / MODEL).exists():
        load_checkpoint(model, folder / MODEL)
        return model.eval()
    optimizer = sgd(model, plan.training)
    done = _restore(plan, model, optimizer, folder)
    _keep_lines(folder / LOG, done)
    for epoch in range(done, plan.training.epochs):
        rng = torch_rng(plan.seed, "central", epoch)
        losses = train_epoch(model, optimizer, data.train, plan.training, epoch, rng)
        line = {"epoch": epoch + 1, "loss": float(losses.mean()), **measure(plan, data, model)}
        with open(folder / LOG, "a", encoding="utf-8") as file:  # first: a line too many is cut off, one less is lost
            file.write(json.dumps(line) + "\n")
        _save(plan, model, optimizer, folder, epoch + 1)
        if on_epoch is not None:
            on_epoch(line)
    save_safetensors(model, folder / MODEL)
    (folder / STATE).unlink(missing_ok=True)
    return model.eval()


def identity(plan: CentralPlan) -> str:
    """Return a hash of all that decides the weights."""
    plain: dict[str, Any] = dict(to_plain(plan))
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "root"}
    if plan.poison is not None and isinstance(plain["poison"]["trigger"].get("file"), str):
        plain["poison"]["trigger"]["file"] = content_of(plain["poison"]["trigger"]["file"])
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _claim(plan: CentralPlan, folder: Path) -> None:
    """Write down what is trained in a folder, or refuse one that holds something else."""
    held, remedy = "", "choose another folder, or remove this one"
    if (folder / PLAN).exists():
        held = "" if identity(load_central(folder / PLAN)) == identity(plan) else "holds another training"
    elif (folder / MODEL).exists():
        held = f"holds a model without {PLAN}, so that nothing says what it was trained on"
    if held:
        raise ScenarioError([Problem(path=str(folder), expected=held, remedy=remedy)])
    if not (folder / STATE).exists() and not (folder / MODEL).exists():
        part = folder / f".{PLAN}.part"
        part.write_text(dump_yaml(to_plain(plan)), encoding="utf-8")
        part.replace(folder / PLAN)


def _keep_lines(log: Path, epochs: int) -> None:
    """Cut off the lines of epochs that are trained again, and one that a kill left half written."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        part = log.with_name(f".{log.name}.part")
        part.write_text("".join(lines[:epochs]), encoding="utf-8")
        part.replace(log)


def _save(plan: CentralPlan, model: nn.Module, optimizer: torch.optim.SGD, folder: Path, epoch: int) -> None:
    tensors = {f"model.{name}": entry for name, entry in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    save_tensors(tensors, folder / STATE, {"epoch": str(epoch), "identity": identity(plan)})


def _restore(plan: CentralPlan, model: nn.Module, optimizer: torch.optim.SGD, folder: Path) -> int:
    """Fill model and optimizer with the last finished epoch's state; return how many are done."""
    if not (folder / STATE).exists():
        return 0
    tensors, marks = read_tensors(folder / STATE)
    if marks.get("identity") != identity(plan):
        remedy = "choose another folder, or remove this one"
        raise ScenarioError([Problem(path=str(folder), expected="holds another training", remedy=remedy)])
    state = {name.removeprefix("model."): entry for name, entry in tensors.items() if name.startswith("model.")}
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        buffer = tensors.get(f"momentum.{name}")
        if buffer is not None:
            optimizer.state[parameter]["momentum_buffer"] = buffer.to(memory_format=_format(parameter))
    return int(marks["epoch"])


def _format(parameter: torch.Tensor) -> torch.memory_format:
    last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
