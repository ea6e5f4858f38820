"""``fedbd detect``: try sample detectors on a model from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbd.cli.arguments import TABLES, Checkpoint, Data, Model, Target, TriggerWord, terminal, unwritable
from fedbd.cli.models import methods_of, say_data
from fedbd.errors import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from fedbd.central.holdings import Holdings
    from fedbd.central.subject import Subject
    from fedbd.types import Detector, Evasion, Notes

HEADING = "nothing was detected:"


def detect(
    checkpoint: Checkpoint,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="YAML",
            help="A detector, e.g. strip or '{name: lid, pool: average}' (repeatable).",
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    trusted: Annotated[
        int | None,
        typer.Option(min=0, help="Clean training samples for the detectors; default: the run's own, else up to 500."),
    ] = None,
    validate_share: Annotated[
        float | None, typer.Option(help="Share of them to validate on; default: the run's own, else 0.5.")
    ] = None,
    trigger: TriggerWord = None,
    target: Target = None,
    adversarial: Annotated[
        list[str] | None,
        typer.Option("--adversarial", metavar="YAML", help="Adversarial inputs, too: fgsm, pgd or cw (repeatable)."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="So many clean and so many triggered test images.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the trusted samples, the inputs and the detectors' randomness.")] = 0,
    scores: Annotated[Path | None, typer.Option(help="Write each input's scores to this .csv file.")] = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table to this .csv or .json file.")] = None,
) -> None:
    """Score inputs of a model from anywhere and print how well that tells triggered from clean ones.

    CHECKPOINT is as for clean. The inputs are test images with the labels that the model gives them; detectors get
    trusted samples of the training part and know neither trigger nor target. Without a trigger there is nothing to
    measure, and only the scores are written (--scores).
    """
    import torch  # noqa: PLC0415

    from fedbd.central.holdings import admit  # noqa: PLC0415
    from fedbd.central.subject import Asked  # noqa: PLC0415
    from fedbd.report.detection_table import render_detectors, write_detectors  # noqa: PLC0415

    torch.set_num_threads(1)  # the same bits on any machine
    console = terminal()
    problems = unwritable("--scores", scores, (".csv",)) + unwritable("--table", table, TABLES)
    detectors = methods_of("detection", "--method", method or [], problems)
    evasions = methods_of("evasion", "--adversarial", adversarial, problems) if adversarial else {}
    asked = Asked(checkpoint=checkpoint, data=data, model=model, trigger=trigger, target=target)
    subject, held = admit(asked, detectors, trusted, validate_share, seed, problems, heading=HEADING)
    problems = _attack_problems(subject, evasions, scores, table)
    if problems:
        raise UserError(problems, HEADING)
    say_data(console, subject, held)
    lines: dict[str, Notes] = {}
    columns: dict[str, NDArray[Any]] = {}
    with console.status("scoring") as status:
        for label, detector in detectors.items():
            lines[label] = _try(subject, held, label, detector, evasions, samples, seed, columns)
            status.update(f"{len(lines)} of {len(detectors)} detectors done")
    render_detectors(console, lines)
    if table is not None:
        write_detectors(table, lines)
    if scores is not None:
        _write_scores(scores, columns)
        console.print(f"Scores: {scores}", markup=False, highlight=False, soft_wrap=True)
    if any(label not in columns for label in detectors):
        raise typer.Exit(1)


def _attack_problems(
    subject: Subject, evasions: Mapping[str, Evasion], scores: Path | None, table: Path | None
) -> list[Problem]:
    """Return what is asked for and cannot be: measures without a trigger, adversarial examples of no class."""
    problems, remedy, classes = [], "add --trigger and --target", subject.dataset.classes
    if subject.trigger is None:
        if evasions:
            expected = "needs a trigger, too: inputs of all kinds are told apart together"
            problems.append(Problem(path="--adversarial", expected=expected, remedy=remedy))
        if table is not None:
            problems.append(Problem(path="--table", expected="needs a trigger to measure with", remedy=remedy))
        if scores is None:
            expected = "is required where there is no trigger to measure with"
            problems.append(Problem(path="--scores", expected=expected, remedy=f"or {remedy}"))
    for label, evasion in evasions.items():
        wanted = getattr(evasion, "target", None)
        if isinstance(wanted, int) and wanted >= classes:
            expected = f"target must be below the number of classes ({classes})"
            problems.append(Problem(path=f"--adversarial {label}", expected=expected, got=str(wanted)))
    return problems


def _try(
    subject: Subject,
    held: Holdings,
    label: str,
    detector: Detector,
    evasions: Mapping[str, Evasion],
    samples: int,
    seed: int,
    columns: dict[str, NDArray[Any]],
) -> Notes:
    """Return one detector's record; its scores become a column beside what the inputs are, the same for all."""
    import torch  # noqa: PLC0415

    from fedbd.sample_detection import Served, incoming, three_ways, tried  # noqa: PLC0415
    from fedbd.seeding import numpy_rng, torch_rng  # noqa: PLC0415

    served = Served(model=subject.model, test=subject.dataset.test, trusted=held.trusted)
    attacks = [] if subject.trigger is None or subject.target is None else [(subject.trigger, subject.target)]
    inputs, triggered, places = incoming(served, attacks, samples, torch_rng(seed, "incoming"))
    rng, shuffle = torch_rng(seed, "detection"), numpy_rng(seed, "shuffled")
    found, line = tried(served, detector, inputs, triggered, rng, shuffle)
    if found is None:
        return line
    columns |= {"test_image": places, "triggered": triggered.astype(int), "label": inputs.labels.numpy(), label: found}
    if evasions:
        line["adversarial"] = three_ways(
            served,
            detector,
            evasions,
            inputs.images[torch.as_tensor(triggered)],
            samples,
            torch_rng(seed, "adversarial"),
            lambda name: torch_rng(seed, f"evasion/{name}"),
        )
    return line


def _write_scores(path: Path, columns: Mapping[str, NDArray[np.generic]]) -> None:
    """Write a row per input, in the order of the test images, the untriggered copy first."""
    from fedbd.report.rows import write_rows  # noqa: PLC0415

    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    rows.sort(key=lambda row: (row["test_image"], row["triggered"]))
    write_rows(path, rows, empty=["test_image"])
