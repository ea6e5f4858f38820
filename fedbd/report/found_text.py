"""What a cleanup found or did to a model, in one sentence out of its notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedbd.report.console import percent

Notes = Mapping[str, Any]


def found_text(notes: Notes) -> str:
    """Return what a method's notes say of what it found: ``a; b``, empty where they say nothing of the kind.

    Args:
        notes: Of ``Cleanup.clean``; names that several methods share (``target``, ``size``, ``pruned`` ...) are read,
            whichever are there.
    """
    return "; ".join([*_label(notes), *_trigger(notes), *_channels(notes)])


def _label(notes: Notes) -> Iterator[str]:
    if notes.get("target") is None:
        return
    text = f"target label {notes['target']}"
    if notes.get("target_share") is not None:
        text += f", {percent(notes['target_share'])} % of the unlearned model's answers"
    if notes.get("declared") is not None:
        text += ", a backdoor declared" if notes["declared"] else ", no backdoor declared"
    if notes.get("anomaly_index") is not None:
        text += f", anomaly index {notes['anomaly_index']:.1f}"
    yield text


def _trigger(notes: Notes) -> Iterator[str]:
    if notes.get("size") is None:
        return
    text = f"trigger of {notes['size']:.1f} pixels"
    if notes.get("size_share") is not None:
        text += f" ({percent(notes['size_share'])} % of the image)"
    if notes.get("success") is not None:
        text += f", {percent(notes['success'])} % success"
    if notes.get("success_without") is not None:
        text += f" ({percent(notes['success_without'])} % without it)"
    yield text


def _channels(notes: Notes) -> Iterator[str]:
    if notes.get("masked") == "convolution" and notes.get("pruned") is not None:
        yield "no BatchNorm: masks on the convolutions' output channels"
    for count, whole, verb, thing in (
        ("pruned", "channels", "pruned", "channels"),
        ("flipped", "neurons", "flipped", "neurons"),
    ):
        if isinstance(notes.get(count), int):
            text = f"{notes[count]} of {notes[whole]} {thing}" if notes.get(whole) else f"{notes[count]} {thing}"
            threshold = notes.get("threshold")
            yield f"{text} {verb}" + (f" at threshold {threshold:g}" if threshold is not None else "")
