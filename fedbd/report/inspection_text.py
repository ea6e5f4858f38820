"""What ``fedbd inspect`` prints: a model's measures, the channels that a trigger shifts, the verdict on the claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.report.console import percent, success_style

if TYPE_CHECKING:
    from fedbd.central.inspection import Shifts

TITLES = {"l1": "l1", "l2": "l2", "linf": "l-inf"}


def render_measures(console: Console, measures: Mapping[str, Any]) -> None:
    """Print CA and, where there is a trigger, ASR and RA in one line."""
    text = Text(f"CA {percent(measures['clean_accuracy'])} %")
    if measures["collapsed"]:
        text.append(" collapsed", "bold magenta")
    if measures["attack_success"] is not None:
        success = measures["attack_success"]
        text.append("   ASR ").append(f"{percent(success)} %", success_style(success, None, measures["collapsed"]))
        text.append(f"   RA {percent(measures['robust_accuracy'])} %")
    console.print(text)


def render_shifts(console: Console, found: Shifts, count: int, *, every_class: bool = False) -> None:
    """Print the channels that the trigger shifts most, and whether the paper's claim is reproduced.

    Args:
        console: Where to.
        found: The shifts.
        count: So many channels.
        every_class: The inputs are of all classes, as all-to-all; else without the target class.
    """
    from fedbd.central.inspection import FAR, judge_claim, top_channels  # noqa: PLC0415 - this module needs no torch

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("channel", *(f"{title}: clean" for title in TITLES.values()), *TITLES.values()):
        table.add_column(title if title == "channel" or ":" in title else f"{title} x", justify="right", no_wrap=True)
    for channel in top_channels(found.ratios, count):
        clean = [f"{found.clean[name][channel]:.3g}" for name in TITLES]
        ratios = [f"{found.ratios[name][channel]:.2f}" for name in TITLES]
        table.add_row(str(channel), *clean, *ratios)
    console.print(table)
    claim = judge_claim(found.ratios)
    largest = ", ".join(f"{title} {claim.largest[name]:.2f}" for name, title in TITLES.items())
    factor = "with no shift of the others" if claim.factor is None else f"{claim.factor:.1f} times that of the others"
    lines = [
        f"x: norm of the channel's map on triggered over clean inputs, mean over {found.inputs} test images"
        f"{'' if every_class else ' without the target class'}; inf where the channel is silent on clean ones.",
        f"Largest ratios over {len(found.clean['linf'])} channels: {largest}; the l-inf excess over 1 is {factor}.",
    ]
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False)
    word, style = ("reproduced", "green") if claim.reproduced else ("not reproduced", "yellow")
    if claim.most and not claim.reproduced:
        word = "reproduced in direction, not in size,"
    text = Text("Claim of arXiv 2002.12162 (the trigger shifts l-inf far more than l1 and l2): ")
    text.append(word, f"bold {style}").append(
        f" on this model; 'far more' is {FAR:g} times here, the paper names none."
    )
    console.print(text)
