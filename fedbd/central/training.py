"""Training one model on one data set, epoch by epoch: plainly, or by a defense that trains it itself.

Every epoch is checkpointed in one file; a resumed training gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from fedbd.central.plan import CentralData, CentralPlan, identity, load_central, measure, new_model
from fedbd.config.scenario_file import dump_yaml
from fedbd.config.schema import to_plain
from fedbd.data.digest import digest
from fedbd.defenses.local.central_state import CentralState, momentum_of, restore_momentum
from fedbd.errors import Problem, RunFailed, ScenarioError
from fedbd.metrics import is_finite
from fedbd.models.checkpoint import load_checkpoint, read_tensors, save_safetensors, save_tensors
from fedbd.records.whole_files import write_text
from fedbd.scores import isolation_quality
from fedbd.seeding import torch_rng
from fedbd.training import sgd, train_epoch
from fedbd.types import Notes

PLAN, STATE, LOG, MODEL = "central.yaml", "state.safetensors", "epochs.jsonl", "model.safetensors"
DATA = "data.json"
"""Which data the training is on, by hash."""
NOTES = "notes.json"
"""What a defense found, where one trained."""

Tensors = dict[str, Tensor]
Course = Iterator[tuple[Notes, Tensors]]
"""Per epoch that is trained: its line, and what the next one needs beside the weights."""

_MODEL, _REST = "model.", "rest."
FORM = "2"
"""Of the state file; raise it when its entries change."""


def train_central(
    plan: CentralPlan, data: CentralData, folder: Path, on_epoch: Callable[[Notes], None] | None = None
) -> nn.Module:
    """Train, or go on with, a model; finished epochs are never lost.

    Args:
        plan: What to train.
        data: Its data.
        folder: ``central.yaml`` (the plan), ``data.json`` (a hash of the data set), ``state.safetensors`` (weights, and
            all that the next epoch depends on), ``epochs.jsonl``, where a defense trains ``notes.json``, and at the
            end ``model.safetensors``.
        on_epoch: Called with each new epoch's line.

    Returns:
        The trained model, in eval mode.

    Raises:
        ScenarioError: If the folder holds another training, or one on other data.
        MethodRefused: If a defense cannot act.
        RunFailed: If the training diverged; the epochs before are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, json.dumps({"sha256": digest(data.dataset)}) + "\n", folder)
    model = new_model(plan, data.dataset)
    if (folder / MODEL).exists():
        load_checkpoint(model, folder / MODEL)
        return model.eval()
    done, rest = _restore(plan, model, folder)
    _keep_lines(folder / LOG, done)
    if plan.defense is None:
        course = _plain(plan, data, model, done, rest)
    else:
        course = _defended(plan, data, model, rest, folder)
    for number, (trained, now) in enumerate(course, start=done + 1):
        _refuse_diverged(plan, model, folder, number)
        line = {"epoch": number, **trained, **measure(plan, data, model)}
        with open(folder / LOG, "a", encoding="utf-8") as file:  # first: a line too many is cut off, one less is lost
            file.write(json.dumps(line) + "\n")
        _save(plan, model, now, folder, number)
        if on_epoch is not None:
            on_epoch(line)
    save_safetensors(model, folder / MODEL)
    (folder / STATE).unlink(missing_ok=True)
    return model.eval()


def _refuse_diverged(plan: CentralPlan, model: nn.Module, folder: Path, epoch: int) -> None:
    if not is_finite(model):
        rate = "training.lr" if plan.defense is None else "the defense's learning rates"
        raise RunFailed(
            f"{folder}: training diverged in epoch {epoch} of {plan.epochs}: the weights are not finite; "
            f"lower {rate} and train anew with --overwrite (the epochs before are kept until then)"
        )


def _plain(plan: CentralPlan, data: CentralData, model: nn.Module, done: int, rest: Tensors) -> Course:
    """Train the epochs that are left with SGD."""
    if plan.training is None:
        return
    optimizer = sgd(model, plan.training)
    restore_momentum(model, optimizer, rest)
    for epoch in range(done, plan.training.epochs):
        rng = torch_rng(plan.seed, "central", epoch)
        losses = train_epoch(model, optimizer, data.train, plan.training, epoch, rng)
        yield {"loss": float(losses.mean())}, momentum_of(model, optimizer)


def _defended(plan: CentralPlan, data: CentralData, model: nn.Module, rest: Tensors, folder: Path) -> Course:
    """Let the plan's defense train the epochs that are left, and write down what it found."""
    if plan.defense is None:
        return
    defense, rng = plan.defense.impl, torch_rng(plan.seed, "central-defense")
    before = CentralState.from_tensors(rest) if rest else defense.start(data.train, rng)
    told = before.isolated is not None
    for state in defense.epochs(model, data.train, rng, before):
        line = {"loss": float(state.losses[-1]), "stage": defense.schedule[state.done - 1].stage}
        if state.isolated is not None and not told:
            line |= isolation_quality(state.isolated, data.poisoned, len(data.train))
            told = True
        write_text(folder / NOTES, json.dumps(defense.notes(state)) + "\n")
        yield line, state.tensors()


def _claim(plan: CentralPlan, data: str, folder: Path) -> None:
    """Write down what is trained in a folder, or refuse one that holds something else."""
    held, remedy = "", "choose another folder, or remove this one"
    known = (folder / DATA).read_bytes().decode(errors="replace") if (folder / DATA).exists() else data
    if (folder / PLAN).exists():
        held = "" if identity(load_central(folder / PLAN)) == identity(plan) else "holds another training"
        held = held or ("" if known == data else "holds a training on other data than are there now")
    elif (folder / MODEL).exists():
        held = f"holds a model without {PLAN}, so that nothing says what it was trained on"
    if held:
        raise ScenarioError([Problem(path=str(folder), expected=held, remedy=remedy)])
    if not (folder / STATE).exists() and not (folder / MODEL).exists():
        write_text(folder / DATA, data)
        write_text(folder / PLAN, dump_yaml(to_plain(plan)))


def _keep_lines(log: Path, epochs: int) -> None:
    """Cut off the lines of epochs that are trained again, and one that a kill left half written."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(log, "".join(lines[:epochs]))


def _save(plan: CentralPlan, model: nn.Module, rest: Mapping[str, Tensor], folder: Path, epoch: int) -> None:
    tensors = {_MODEL + name: entry for name, entry in model.state_dict().items()}
    tensors |= {_REST + name: entry for name, entry in rest.items()}
    save_tensors(tensors, folder / STATE, {"epoch": str(epoch), "identity": identity(plan), "form": FORM})


def _restore(plan: CentralPlan, model: nn.Module, folder: Path) -> tuple[int, Tensors]:
    """Fill the model with the last finished epoch's weights; return how many are done, and what else was kept."""
    if not (folder / STATE).exists():
        return 0, {}
    tensors, marks = read_tensors(folder / STATE)
    same = marks.get("identity") == identity(plan)
    if not same or marks.get("form") != FORM:
        expected = "holds what another version of fedbd began" if same else "holds another training"
        remedy = "choose another folder, or remove this one"
        raise ScenarioError([Problem(path=str(folder), expected=expected, remedy=remedy)])
    model.load_state_dict(_under(tensors, _MODEL))
    return int(marks["epoch"]), _under(tensors, _REST)


def _under(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {name.removeprefix(start): entry for name, entry in tensors.items() if name.startswith(start)}
