"""Whether what a command calls the attack-free twin of a model can be that, by what lies in their folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fedbd.central.subject import Asked, Source, Subject, checkpoint_file, home_of, source_of, value_of
from fedbd.config.schema import to_plain
from fedbd.errors import Problem

REMEDY = "fedbd train leaves the twin in NAME/seed-N-twin, fedbd run in runs/twins"


def twin_problems(asked: Asked) -> list[Problem]:
    """Return why the named twin cannot be the model's; of a file of weights alone nothing can be told.

    Args:
        asked: The command's words about the model.
    """
    if asked.twin is None:
        return []
    expected = "must be the attack-free twin of the model"
    if _same_file(asked.checkpoint, asked.twin):
        return [Problem(path="--twin", expected=expected, got="the model itself", remedy=REMEDY)]
    home = home_of(asked.twin)
    if home is None:
        return []
    problems: list[Problem] = []
    theirs = source_of(str(home), "--twin", problems)
    if theirs is None:
        return problems
    if theirs.attacked:
        return [Problem(path="--twin", expected=expected, got=f"{asked.twin}, which was attacked", remedy=REMEDY)]
    other = _differences(asked, theirs)
    got = f"{asked.twin}, with another {' and '.join(other)}"
    return [Problem(path="--twin", expected=expected, got=got, remedy=REMEDY)] if other else []


def _same_file(one: Path, two: Path) -> bool:
    one, two = checkpoint_file(one), checkpoint_file(two)
    return one.exists() and two.exists() and one.samefile(two)


def _differences(asked: Asked, theirs: Source) -> list[str]:
    """Return what of a twin differs from what is known of the model."""
    home, unsaid = home_of(asked.checkpoint), list[Problem]()  # what is wrong with the model is said where it is loaded
    word = asked.data or (None if home is None else str(home))
    mine = None if word is None else source_of(word, "", unsaid)
    if mine is None:
        return []
    model = mine.model if asked.model is None else value_of("model", asked.model, "", unsaid)
    own = home is not None and asked.data is None and asked.model is None
    pairs: dict[str, tuple[Any, Any]] = {
        "data set": (to_plain(mine.data.method), to_plain(theirs.data.method)),
        "model": (model and to_plain(model), theirs.model and to_plain(theirs.model)),
    }
    names = [name for name, (here, there) in pairs.items() if here is not None and here != there]
    if not own:
        return names
    if (mine.held_out is None) != (theirs.held_out is None):
        names.append("kind of training")
    else:
        names += [f"'{name}'" for name, here in mine.course.items() if here != theirs.course[name]]
    if not names and _round(asked.checkpoint, mine) != _round(asked.twin or asked.checkpoint, theirs):
        names.append("round")  # a twin's run keeps its last model alone
    return names + ["seed"] * (mine.seed != theirs.seed)


def _round(checkpoint: Path, source: Source) -> int | None:
    """Return the round whose model a checkpoint of a run is: one that it kept, or its last."""
    kept = re.fullmatch(r"round-(\d+)\.safetensors", checkpoint.name)
    return int(kept[1]) if kept else source.course.get("rounds")


def equal_problems(subject: Subject) -> list[Problem]:
    """Return that the twin has the model's own weights, under whatever name they lie: nothing attack-free is in them.

    Args:
        subject: The model and, if one is named, its twin.
    """
    if subject.twin is None:
        return []
    own, others = subject.model.state_dict(), subject.twin.state_dict()
    if not all(torch.equal(own[name], others[name]) for name in own):
        return []
    expected = "must be the attack-free twin of the model"
    return [Problem(path="--twin", expected=expected, got="the model's own weights", remedy=REMEDY)]
