"""The commands about single models: ``fedbd train``, ``clean``. ``main`` registers them.

Everything slow is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedbd.cli.arguments import (
    MOST_SEEDS,
    TABLES,
    Checkpoint,
    Data,
    Model,
    Target,
    TriggerWord,
    say,
    terminal,
    unwritable,
)
from fedbd.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedbd.central.holdings import Holdings
    from fedbd.central.repair import Row
    from fedbd.central.subject import Subject
    from fedbd.types import Cleanup


def train(
    file: Annotated[Path, typer.Argument(help="A central training (YAML).", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override a field, e.g. -s seed=3 (repeatable)."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=MOST_SEEDS, help="Train with so many seeds, from the file's own on.")
    ] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all trainings.")] = Path("runs"),
    twin: Annotated[bool, typer.Option(help="Also train the attack-free twins (the floor of the ASR).")] = True,
    overwrite: Annotated[bool, typer.Option(help="Begin anew where the same or another training lies.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")] = False,
) -> None:
    """Train one model on one poisoned data set, and its attack-free twin.

    FILE is a central training (YAML), as in scenarios/central. Every epoch is kept: the same command goes on where it
    stopped. Models lie in OUT/NAME/seed-N and OUT/NAME/seed-N-twin.
    """
    import torch  # noqa: PLC0415

    from fedbd.central.plan import load_central  # noqa: PLC0415
    from fedbd.central.runs import carry_out, folder_problems, load_data, trainings  # noqa: PLC0415
    from fedbd.report.training_progress import LiveTraining, measures_text  # noqa: PLC0415

    torch.set_num_threads(1)  # the same bits on any machine
    plan = load_central(file, settings or [])
    wanted = trainings(plan, seeds, out, twin=twin)
    problems = folder_problems(wanted, overwrite=overwrite)
    if problems:
        raise UserError(problems, "nothing was started:")
    load_data(plan)
    console = terminal()
    try:
        with LiveTraining(console, quiet=quiet) as live:
            for training in wanted:
                lines = [] if overwrite else training.lines()
                last = lines[-1] if lines else None
                live.begin(training.title, epochs=plan.epochs, done=len(lines), line=last)
                carry_out(training, live.epoch, overwrite=overwrite)
    except KeyboardInterrupt as error:
        again = "the same command without --overwrite" if overwrite else "the same command"
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(f"interrupted; finished epochs are kept, and {again} goes on from there")
        raise typer.Exit(128 + getattr(error, "signal", signal.SIGINT)) from None
    if not quiet:
        for training in wanted:
            text = f"{training.title}  {measures_text(training.lines()[-1])}  {training.checkpoint}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def clean(
    checkpoint: Checkpoint,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", metavar="YAML", help="A cleanup, e.g. rnp or '{name: rnp, batch_size: 64}' (repeatable)."
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    trusted: Annotated[
        int | None,
        typer.Option(
            min=0, help="Clean training samples to fit and validate on; default: the run's own, else up to 500."
        ),
    ] = None,
    validate_share: Annotated[
        float | None, typer.Option(help="Share of them to validate on; default: the run's own, else 0.5.")
    ] = None,
    trigger: TriggerWord = None,
    target: Target = None,
    twin: Annotated[
        Path | None, typer.Option(help="The attack-free twin: floor of the ASR, price on a clean model.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The model that the training started from; default: a folder's own.")
    ] = None,
    chain: Annotated[
        bool, typer.Option("--chain", help="Each method goes on from what the one before it left.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the trusted samples and the methods' randomness.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the repaired model (.safetensors).")] = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table to this .csv or .json file.")] = None,
) -> None:
    """Repair a model from anywhere and print what that did to accuracy and backdoor.

    CHECKPOINT is a safetensors file, a PyTorch state dict (alone or under 'state_dict'), or the folder of a run or
    training, which names model, data and trigger by itself, as it does for a file in it
    (models/round-5.safetensors). Methods get trusted samples of the training part; the
    trigger only measures, but for a method with oracle: true.
    """
    import torch  # noqa: PLC0415

    from fedbd.central.holdings import admit, truth_of  # noqa: PLC0415
    from fedbd.central.repair import judge, repair_all  # noqa: PLC0415
    from fedbd.central.subject import Asked  # noqa: PLC0415
    from fedbd.central.twins import equal_problems, twin_problems  # noqa: PLC0415
    from fedbd.report.repair_table import render_repairs, write_repairs  # noqa: PLC0415
    from fedbd.types import Clues  # noqa: PLC0415

    torch.set_num_threads(1)  # the same bits on any machine
    console = terminal()
    problems = unwritable("--save", save, (".safetensors",)) + unwritable("--table", table, TABLES)
    methods: dict[str, Cleanup] = methods_of("cleanup", "--method", method or [], problems)
    if save is not None and len(methods) > 1 and not chain:
        problems.append(Problem(path="--save", expected="needs a single --method, or --chain"))
    asked = Asked(
        checkpoint=checkpoint,
        data=data,
        model=model,
        trigger=trigger,
        target=target,
        twin=twin,
        reference=reference,
    )
    problems += twin_problems(asked)
    subject, held = admit(asked, methods, trusted, validate_share, seed, problems, chain=chain)
    problems += equal_problems(subject)
    if problems:
        raise UserError(problems, "nothing was repaired:")
    test, classes = subject.dataset.test, subject.dataset.classes
    say_data(console, subject, held)
    rows = []
    with console.status("measuring the model") as status:
        for row in repair_all(
            subject.model,
            methods,
            held.trusted,
            Clues(reference=subject.reference),
            seed,
            lambda net: judge(net, test, classes, subject.trigger, subject.target),
            truth=truth_of(subject, held),
            twin=subject.twin,
            chain=chain,
        ):
            rows.append(row)
            status.update(f"{len(rows)} of {len(methods)} methods done")
    render_repairs(console, rows, chain=chain)
    if table is not None:
        write_repairs(table, rows)
    if save is not None:
        _save(console, save, rows)
    if any(row.repaired.refused for row in rows):
        raise typer.Exit(1)


def methods_of(
    kind: Literal["cleanup", "detection", "evasion"], option: str, words: list[str], problems: list[Problem]
) -> dict[str, Any]:
    """Return the methods of a repeatable option by their labels: the name, and the fields that were given."""
    from fedbd.central.subject import value_of  # noqa: PLC0415
    from fedbd.config.scenario_file import parse_yaml  # noqa: PLC0415
    from fedbd.registry import choice  # noqa: PLC0415

    if not words:
        problems.append(Problem(path=option, expected="is required", remedy=f"name {choice(kind)}"))
    found: dict[str, Any] = {}
    for number, word in enumerate(words):
        path = option if len(words) == 1 else f"{option}[{number}]"
        method = value_of(kind, word, path, problems)
        if method is None:
            continue
        raw = parse_yaml(word, path)
        given = raw if isinstance(raw, dict) else {}
        fields = [f"{key}={_word(value)}" for key, value in given.items() if key != "name"]
        label = " ".join([method.name, *fields])
        if label in found:
            problems.append(Problem(path=path, expected="must differ from the others", got=repr(label)))
        found[label] = method.impl
    return found


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def say_data(console: Console, subject: Subject, held: Holdings) -> None:
    """Print what a command measures on, and which trusted data there are."""
    from fedbd.targets import ALL_TO_ALL  # noqa: PLC0415

    dataset = subject.dataset
    shape = "x".join(map(str, dataset.shape))
    lines = [f"Measured on {len(dataset.test)} test images of {shape}, {dataset.classes} classes."]
    if subject.target is not None:
        wanted = "All-to-all: label + 1" if subject.target == ALL_TO_ALL else f"Target label {subject.target}"
        lines[0] += f" {wanted}; the trigger only measures."
    if held.trusted is not None:
        fit, validate = len(held.trusted.fit), len(held.trusted.validate)
        lines.append(f"Trusted: {fit} samples to fit and {validate} to validate on, out of {held.origin}.")
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False)


def _save(console: Console, path: Path, rows: list[Row]) -> None:
    from fedbd.models.checkpoint import save_safetensors  # noqa: PLC0415

    changed = any(row.repaired.acted and row.repairs for row in rows)
    if changed:
        save_safetensors(rows[-1].repaired.model, path)
    text = f"Repaired model: {path}" if changed else f"{path} was not written: nothing changed the model."
    console.print(text, markup=False, highlight=False, soft_wrap=True)
