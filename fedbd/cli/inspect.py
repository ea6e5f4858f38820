"""``fedbd inspect``: look inside of a model, or of every model that a run kept of its rounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbd.cli.arguments import Checkpoint, Data, Model, Target, TriggerWord, terminal
from fedbd.errors import MethodRefused, Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.central.inspection import Shifts
    from fedbd.central.subject import Subject


def inspect(
    checkpoint: Checkpoint,
    model: Model = None,
    data: Data = None,
    trigger: TriggerWord = None,
    target: Target = None,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="All models that a run kept of its rounds (evaluation.keep_models).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the pictures; default: the checkpoint's.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=32, help="Images in the Grad-CAM picture.")] = 8,
    channels: Annotated[int, typer.Option(min=1, help="Channels to print.")] = 8,
) -> None:
    """Look inside of a model: which channels a trigger shifts, and where on an image its answer comes from.

    CHECKPOINT is a safetensors file, a PyTorch state dict (alone or under 'state_dict'), or the folder of a run or
    training, which names model, data and trigger by itself, as it does for a file in it
    (models/round-5.safetensors). Pictures: norms.png and gradcam.png of a folder's model, NAME-norms.png and
    NAME-gradcam.png of a file NAME.safetensors and, with --rounds, of every round's.
    """
    import torch  # noqa: PLC0415

    from fedbd.central.subject import Asked, load_subject, with_weights  # noqa: PLC0415

    torch.set_num_threads(1)  # the same bits on any machine
    console = terminal()
    problems: list[Problem] = []
    files = _kept(checkpoint, problems) if rounds else [checkpoint]
    folder = out or (files[0] if files[0].is_dir() else files[0].parent)
    if folder.exists() and not folder.is_dir():
        problems.append(Problem(path="--out", expected="must be a folder", got=str(folder)))
    asked = Asked(checkpoint=files[0], data=data, model=model, trigger=trigger, target=target)
    first = load_subject(asked, problems)
    others = [] if first is None else [with_weights(first, file, "CHECKPOINT", problems) for file in files[1:]]
    subjects = [subject for subject in (first, *others) if subject is not None]
    if problems or first is None:
        raise UserError(problems, "nothing was inspected:")
    if checkpoint.is_dir():
        _render_stages(console, checkpoint)
    for file, subject in zip(files, subjects, strict=True):
        if rounds:
            console.print(f"{file.stem}:", style="bold", markup=False, highlight=False)
        _inspect(console, subject, folder, "" if file.is_dir() else f"{file.stem}-", images, channels)


ROUND = re.compile(r"round-(\d+)\.safetensors")


def _kept(checkpoint: Path, problems: list[Problem]) -> list[Path]:
    """Return the models that a run kept of its rounds, in their order; the checkpoint itself where there are none."""
    found = {int(match[1]): file for file in checkpoint.glob("models/*") if (match := ROUND.fullmatch(file.name))}
    if not found:
        problems.append(
            Problem(
                path="--rounds",
                expected="needs a run's folder with models/round-*.safetensors",
                got=str(checkpoint),
                remedy="run with evaluation.keep_models: [1, 5, ...]",
            )
        )
    return [found[number] for number in sorted(found)] or [checkpoint]


def _render_stages(console: Console, folder: Path) -> None:
    """Print the stages of a training, and what was isolated, where a defense trained."""
    from fedbd.central.runs import read_epochs  # noqa: PLC0415
    from fedbd.report.training_stages import stage_lines  # noqa: PLC0415

    for line in stage_lines(read_epochs(folder)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _inspect(console: Console, subject: Subject, folder: Path, prefix: str, images: int, channels: int) -> None:
    """Print one model's measures and channels, and draw its two pictures."""
    from fedbd.central.repair import judge  # noqa: PLC0415
    from fedbd.report.inspection_text import render_measures, render_shifts  # noqa: PLC0415
    from fedbd.targets import ALL_TO_ALL  # noqa: PLC0415

    dataset = subject.dataset
    render_measures(console, judge(subject.model, dataset.test, dataset.classes, subject.trigger, subject.target))
    norms, gradcam = folder / f"{prefix}norms.png", folder / f"{prefix}gradcam.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _norms(subject, norms)
        if found is not None:
            render_shifts(console, found, channels, every_class=subject.target == ALL_TO_ALL)
        _looks(subject, gradcam, images)
    except MethodRefused as refusal:  # of a model without maps: what it declares is known only now
        raise UserError([Problem(path="CHECKPOINT", expected=f"cannot be looked into: {refusal}")]) from None
    except OSError as error:
        raise UserError(
            [Problem(path="--out", expected="must be a folder that can be written", got=str(error))]
        ) from None
    for path in (norms, gradcam):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


INPUTS = 1000
"""Most test images that channel norms are taken over."""


def _norms(subject: Subject, path: Path) -> Shifts | None:
    """Draw the channels' norms; return how the trigger shifts them, None without one."""
    from fedbd.central.inspection import shifts, victims  # noqa: PLC0415
    from fedbd.defenses.cleanup.channel_norms import channel_norms  # noqa: PLC0415
    from fedbd.report.norms_picture import draw_norms  # noqa: PLC0415

    samples = victims(subject.dataset.test, subject.target, INPUTS)
    if subject.trigger is None:
        draw_norms(path, channel_norms(subject.model, samples), None)
        return None
    found = shifts(subject.model, samples, subject.trigger.stamp)
    draw_norms(path, found.clean, found.triggered)
    return found


def _looks(subject: Subject, path: Path, images: int) -> None:
    """Draw Grad-CAM maps of a few test images, clean and triggered."""
    from fedbd.central.inspection import looked_at, one_of_each, victims  # noqa: PLC0415
    from fedbd.report.gradcam_picture import Looks, draw_gradcam  # noqa: PLC0415

    test = subject.dataset.test
    chosen = one_of_each(victims(test, subject.target, len(test)), images)
    clean = chosen.images.float().div(255.0)
    kinds = {"clean": clean}
    if subject.trigger is not None:
        kinds["triggered"] = subject.trigger.stamp(clean)
    looks = []
    for name, pixels in kinds.items():
        maps, predicted = looked_at(subject.model, pixels)
        looks.append(Looks(name=name, images=pixels, maps=maps, predicted=predicted))
    draw_gradcam(path, looks, chosen.labels.tolist())
