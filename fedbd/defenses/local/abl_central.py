"""Anti-backdoor learning on a single data set, in the schedules of its authors.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, https://arxiv.org/abs/2110.11571; code https://github.com/bboylyg/ABL.

Differs from the paper and its code:

- Where these differ both can be had: ``control``, ``objective`` and ``unlearn_optimizer`` are fields, and
  ``ABLCentral.authors_code``, ``paper`` and ``quick_demo`` are the three published schedules.
- The paper's rates in the second stage are not given with its schedule here: ``paper`` takes the code's.
- Every epoch has a fresh order; the code keeps one order under the loss control and in the demo, which ruins the
  training on a set that is sorted by class.
- The code's "5" epochs of ascent are 4, as its first only tests; its demo's 5 are 5.
- Losses are ranked in float64; float32 cross-entropy ties at 0.
- How a step of the joint objective is drawn, and by default its weight, is ours (``objectives.joint_epoch``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch user reads
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray
from torch import nn

from fedbd.defenses.local.central_state import CentralState, momentum_of, restore_momentum
from fedbd.defenses.local.cutout import crop_flip_cutout
from fedbd.defenses.local.isolate import most_suspicious, sample_losses
from fedbd.defenses.local.isolation import isolation_count
from fedbd.defenses.local.objectives import AUGMENTS, CONTROLS, ascent, joint_epoch
from fedbd.errors import MethodRefused
from fedbd.method_fields import checks_fields
from fedbd.training import OnBatch, TrainingPlan, momentum_problems, sgd, train_epoch
from fedbd.types import Notes, Samples

_AUGMENTS: dict[str, OnBatch | None] = {**AUGMENTS, "crop_flip_cutout": crop_flip_cutout}


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of a schedule.

    Attributes:
        stage: ``tuning`` (loss control), ``finetune``, ``unlearn`` (ascent on the isolated samples) or ``joint``.
        lr: Its learning rate.
        fresh: Whether it starts with a new optimizer, without momentum.
    """

    stage: Literal["tuning", "finetune", "unlearn", "joint"]
    lr: float
    fresh: bool


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ABLCentral:
    """Train a clean model on a poisoned set: loss control, isolation, then fine-tuning and unlearning.

    The defaults are the authors' code's. ``fedbd train`` carries it out with a checkpoint an epoch (``defense`` in the
    file of a central training). By hand, keep weights and state of an epoch together, in one file: a kill between two
    would leave weights that do not belong to the state (``fedbd.models.checkpoint.save_tensors`` replaces it in one
    step)::

        def keep(state):
            weights = {f"model.{name}": entry for name, entry in model.state_dict().items()}
            save_tensors(weights | {f"state.{name}": entry for name, entry in state.tensors().items()}, path, {})

        model, notes = ABLCentral().fit(model, data, rng, on_epoch=keep)

        kept, _ = read_tensors(path)  # in another process
        part = lambda start: {n.removeprefix(start): t for n, t in kept.items() if n.startswith(start)}
        model.load_state_dict(part("model."))
        state = CentralState.from_tensors(part("state."))
        model, notes = ABLCentral().fit(model, data, rng, on_epoch=keep, state=state)

    Attributes:
        control: ``flooding`` (the code's default) or ``lga`` (the paper's), both on the mean loss of a batch; with the
            same ``gamma`` they give the same weights.
        gamma: The loss that the control holds a batch at.
        tuning_epochs: Epochs under the loss control, without augmentation, at ``lr``; the isolation follows them.
        ratio: Share of the samples to isolate, rounded down, at least one.
        score: What the lowest of is isolated: ``loss`` as in the paper, or ``class_rank`` (``isolate.Score``).
        objective: ``sequential``: fine-tuning, then ascent, as in the code. ``joint``: the loss of kept minus that of
            isolated samples, as in the paper, for ``finetune_epochs``; of the ``unlearn_`` fields only the weight is
            then read.
        unlearn_weight: ``joint``: factor on the isolated samples' mean loss. null: their number over that of the kept,
            so that every sample counts once. 1: each set counts once, the paper's difference of expectations as it
            reads; it has no lower bound and diverges (on a backdoored WRN-16-1 within two epochs of 20 steps at a rate
            of 0.01, where 0.1 and the null of 2 % isolated samples did not).
        finetune_epochs: Epochs on all but the isolated samples, or of the joint objective.
        unlearn_epochs: Epochs of gradient ascent on the isolated samples, in train mode, without augmentation.
        lr: Learning rate, up to ``late_from`` epochs into the second stage.
        late_lr: Learning rate of the second stage's later epochs.
        late_from: The second stage's first epoch (from 0) at ``late_lr``.
        unlearn_lr: Learning rate of the ascent.
        unlearn_optimizer: ``carry``: the ascent goes on with the momentum of the fine-tuning, as the code's one
            optimizer does. ``fresh``: it starts without.
        batch_size: Images per step (the authors' until August 2022: 64).
        momentum: Momentum of SGD, 0 for none.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty.
        augment: What fine-tuning and joint training do to the kept samples: ``none``, ``crop_flip`` or
            ``crop_flip_cutout``.
    """

    control: Literal["lga", "flooding"] = "flooding"
    gamma: Annotated[float, Gt(0)] = 0.5
    tuning_epochs: Annotated[int, Ge(0)] = 10
    ratio: Annotated[float, Gt(0), Le(0.5)] = 0.01
    score: Literal["loss", "class_rank"] = "loss"
    objective: Literal["sequential", "joint"] = "sequential"
    unlearn_weight: Annotated[float, Gt(0)] | None = None
    finetune_epochs: Annotated[int, Ge(0)] = 60
    unlearn_epochs: Annotated[int, Ge(0)] = 4
    lr: Annotated[float, Gt(0)] = 0.1
    late_lr: Annotated[float, Gt(0)] = 0.01
    late_from: Annotated[int, Ge(0)] = 40
    unlearn_lr: Annotated[float, Gt(0)] = 5e-4
    unlearn_optimizer: Literal["carry", "fresh"] = "carry"
    batch_size: Annotated[int, Ge(1)] = 128
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    augment: Literal["none", "crop_flip", "crop_flip_cutout"] = "crop_flip_cutout"

    @classmethod
    def authors_code(cls) -> Self:
        """Return the released code's schedule: 10 epochs of flooding, 60 of fine-tuning, 4 of ascent."""
        return cls()

    @classmethod
    def paper(cls) -> Self:
        """Return the paper's schedule: 100 epochs, the first 20 of local gradient ascent, then the joint objective.

        Its rates are the code's, and the joint objective has the weight of ``unlearn_weight: null``, not the paper's 1.
        """
        return cls(control="lga", tuning_epochs=20, objective="joint", finetune_epochs=80)

    @classmethod
    def quick_demo(cls) -> Self:
        """Return the code's demo: 5 epochs of ascent on a backdoored model, with an isolated set that is given."""
        return cls(tuning_epochs=0, finetune_epochs=0, unlearn_epochs=5, batch_size=64, unlearn_optimizer="fresh")

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        found = momentum_problems(self.nesterov, self.momentum)
        return found if self.schedule else [*found, ("finetune_epochs", "must be above 0 where no stage has an epoch")]

    @property
    def needs_isolated(self) -> bool:
        """Whether ``start`` must be told what to unlearn: there are no epochs to find it in."""
        return self.tuning_epochs == 0

    @property
    def schedule(self) -> tuple[Epoch, ...]:
        """All epochs in their order."""
        joint = self.objective == "joint"
        tuning = [Epoch(stage="tuning", lr=self.lr, fresh=i == 0) for i in range(self.tuning_epochs)]
        second = [
            Epoch(
                stage="joint" if joint else "finetune",
                lr=self.lr if i < self.late_from else self.late_lr,
                fresh=i == 0,
            )
            for i in range(self.finetune_epochs)
        ]
        anew = self.unlearn_optimizer == "fresh" or not second
        unlearn = [
            Epoch(stage="unlearn", lr=self.unlearn_lr, fresh=anew and i == 0)
            for i in range(0 if joint else self.unlearn_epochs)
        ]
        return (*tuning, *second, *unlearn)

    def fit(
        self,
        model: nn.Module,
        data: Samples,
        rng: torch.Generator,
        on_epoch: Callable[[CentralState], Any] | None = None,
        state: CentralState | None = None,
        isolated: NDArray[np.int64] | None = None,
    ) -> tuple[nn.Module, Notes]:
        """Train ``model`` in place through the schedule, or what is left of it.

        Args:
            model: Freshly initialized, with the weights that belong to ``state``, or for ``quick_demo`` backdoored;
                left in train mode.
            data: The poisoned set, N samples.
            rng: Draws orders and augmentation; to go on, its state is set to that of ``state``.
            on_epoch: Called after each epoch.
            state: Where an earlier training stood; None: start.
            isolated: (k,) int64, the samples to unlearn in place of those that the isolation would find; needed where
                ``tuning_epochs`` is 0. Read at the start only, as a state has its own.

        Returns:
            The model, and notes: under each stage's name the losses of its epochs (what the stage trains on, averaged
            over its batches; of the ascent the cross-entropy that it raises), ``isolated`` (indices, most suspicious
            first), ``isolated_loss`` and ``other_loss`` (null where the set was given).

        Raises:
            MethodRefused: If ``isolated`` is missing or no subset, there are fewer than 2 samples, the model diverged,
                or the state is another training's (as far as sizes and stages tell).
        """
        state = self.start(data, rng, isolated) if state is None else state
        for now in self.epochs(model, data, rng, state):
            state = now
            if on_epoch is not None:
                on_epoch(now)
        return model, self.notes(state)

    def start(self, data: Samples, rng: torch.Generator, isolated: NDArray[np.int64] | None = None) -> CentralState:
        """Return the state before the first epoch; arguments and errors as in ``fit``."""
        if isolated is None and self.tuning_epochs == 0:
            raise MethodRefused(
                "abl: without tuning_epochs nothing is isolated; give isolated, for example from isolate(model, data)"
            )
        if len(data) < 2:
            raise MethodRefused(f"abl: {len(data)} samples leave nothing to isolate; give at least 2")
        if isolated is not None:
            isolated = _subset(isolated, len(data))
        return CentralState(
            samples=len(data),
            losses=np.empty(0, dtype=np.float64),
            isolated=isolated,
            isolation_losses=None,
            momentum={},
            generator=rng.get_state(),
        )

    def epochs(
        self, model: nn.Module, data: Samples, rng: torch.Generator, state: CentralState
    ) -> Iterator[CentralState]:
        """Train one epoch after the other in place, from ``state`` on, and yield the state after each.

        The caller may stop at any of them. Arguments and errors as in ``fit``.
        """
        schedule = self.schedule
        _refuse_other_training(state, len(data), self.tuning_epochs, len(schedule))
        rng.set_state(state.generator.cpu())
        optimizer = sgd(model, self._plan(self.lr))
        restore_momentum(model, optimizer, state.momentum)
        for number in range(state.done, len(schedule)):
            epoch = schedule[number]
            if epoch.fresh:
                optimizer = sgd(model, self._plan(epoch.lr))
            isolated = np.empty(0, np.int64) if state.isolated is None else state.isolated
            loss = self._train(epoch, model, optimizer, data, isolated, rng)
            state = replace(
                state,
                losses=np.append(state.losses, loss),
                momentum=momentum_of(model, optimizer),
                generator=rng.get_state(),
            )
            if number + 1 == self.tuning_epochs and state.isolated is None:
                state = self._isolated(model, data, state)
            yield state

    def notes(self, state: CentralState) -> Notes:
        """Return what ``fit`` notes, for a training that stands at ``state``."""
        found: dict[str, Any] = {}
        for epoch, loss in zip(self.schedule, state.losses.tolist(), strict=False):
            found.setdefault(epoch.stage, []).append(loss)
        means = state.isolation_losses or (None, None)
        isolated = [] if state.isolated is None else state.isolated.tolist()
        return {**found, "isolated": isolated, "isolated_loss": means[0], "other_loss": means[1]}

    def _plan(self, lr: float) -> TrainingPlan:
        return TrainingPlan(
            epochs=1,
            batch_size=self.batch_size,
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )

    def _train(
        self,
        epoch: Epoch,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        data: Samples,
        isolated: NDArray[np.int64],
        rng: torch.Generator,
    ) -> float:
        """Train one epoch in place; return the mean over its batches of what its stage trains on."""
        plan = self._plan(epoch.lr)
        if epoch.stage == "tuning":
            control = CONTROLS[self.control]
            losses = train_epoch(
                model, optimizer, data, plan, 0, rng, objective=lambda out, y: control(out, y, self.gamma)
            )
            return float(losses.mean())
        if epoch.stage == "unlearn":
            return -float(train_epoch(model, optimizer, data.subset(isolated), plan, 0, rng, objective=ascent).mean())
        kept = data.subset(np.setdiff1d(np.arange(len(data), dtype=np.int64), isolated))
        augment = _AUGMENTS[self.augment]
        if epoch.stage == "joint":
            own, weight = data.subset(isolated), self.unlearn_weight
            losses = joint_epoch(model, optimizer, kept, own, plan, 0, rng, augment, weight)
        else:
            losses = train_epoch(model, optimizer, kept, plan, 0, rng, on_batch=augment, objective=F.cross_entropy)
        return float(losses.mean())

    def _isolated(self, model: nn.Module, data: Samples, state: CentralState) -> CentralState:
        """Return the state with what the model learned best."""
        losses = sample_losses(model, data)
        count = isolation_count(len(data), self.ratio, 1)
        found = most_suspicious(losses, data.labels.cpu().numpy(), count, self.score)
        return replace(
            state,
            isolated=found,
            isolation_losses=(float(losses[found].mean()), float(np.delete(losses, found).mean())),
        )


def _refuse_other_training(state: CentralState, samples: int, tuning_epochs: int, epochs: int) -> None:
    unfinished = state.isolated is None and state.done >= tuning_epochs
    if state.samples != samples or state.done > epochs or unfinished:
        raise MethodRefused(
            f"abl: the state is another training's: {state.done} epochs on {state.samples} samples, "
            f"{'nothing' if state.isolated is None else len(state.isolated)} isolated; this one has {epochs} epochs, "
            f"{tuning_epochs} of them before the isolation, on {samples} samples"
        )


def _subset(isolated: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Return the indices as int64 if they are some, but not all, of so many samples."""
    indices = np.asarray(isolated)
    whole = np.issubdtype(indices.dtype, np.integer) and indices.ndim == 1
    distinct = len(np.unique(indices)) if whole else 0
    if not whole or distinct != len(indices) or not 0 < distinct < samples:
        raise MethodRefused(f"abl: isolated must be distinct indices of some of the {samples} samples, not of all")
    if indices.min() < 0 or indices.max() >= samples:
        raise MethodRefused(f"abl: isolated must be indices from 0 to {samples - 1}")
    return indices.astype(np.int64)
