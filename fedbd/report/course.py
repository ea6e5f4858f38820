"""How the attack went, as columns of a comparison: peak, area, time to 50 %, lifespan, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from fedbd.report.arms import Arm, Statistic
from fedbd.report.console import percent
from fedbd.report.seed_text import signed, spread_text
from fedbd.summary import lifespan_text

NONE = Statistic(values={})


def course_columns(arms: Sequence[Arm]) -> list[tuple[str, Callable[[Arm], Text]]]:
    """Return titles and cells; no columns where no arm has anything to say in them."""
    told = ("attack_success_area", "clean_accuracy_price")
    if not any(_found(arm, key).n for arm in arms for key in told) and not any(_collapsed_rounds(arm) for arm in arms):
        return []
    return [
        ("peak ASR %", lambda arm: _share(arm, "peak_attack_success")),
        ("area %", lambda arm: _share(arm, "attack_success_area")),
        ("rounds to\nASR 50 %", _time),
        ("lifespan,\nrounds", _lifespan),
        ("CA price,\npoints", _price),
        ("collapsed", _collapsed),
    ]


def _found(arm: Arm, key: str) -> Statistic:
    return arm.statistics.get(key, NONE)


def _nothing(arm: Arm) -> Text:
    return Text("collapsed", "bold magenta") if arm.collapsed else Text("-")


def _below(text: Text, found: Statistic, arm: Arm) -> Text:
    """Add the number of runs that count where others collapsed, and the spread."""
    text.append(f" (of {found.n})" if arm.collapsed else "", "magenta")
    return text.append(f"\n{spread_text(found)}" if spread_text(found) else "", "dim")


def _share(arm: Arm, key: str) -> Text:
    found = _found(arm, key)
    return _below(Text(percent(found.mean)), found, arm) if found.n else _nothing(arm)


def _range(texts: Sequence[str]) -> str:
    """Return the first and the last of some texts in order, or the one that they all are."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]}..{texts[-1]}"


def _time(arm: Arm) -> Text:
    """Return the range over the seeds that got there, and how many never did: a mean would leave those out."""
    attacked, found = _found(arm, "attack_success_area").n, _found(arm, "time_to_attack_success")
    if not attacked:
        return _nothing(arm)
    if not found.n:
        return Text("never")
    text = Text(_range([f"{value:.0f}" for value in sorted(found.values.values())]))
    return text.append(f"\n{attacked - found.n} never" if found.n < attacked else "", "dim")


def _lifespan(arm: Arm) -> Text:
    """Return the range over seeds: a mean of lifespans of which some are only known to be longer is none."""
    censored = _found(arm, "lifespan_censored").values
    found = sorted((value, bool(censored.get(seed))) for seed, value in _found(arm, "lifespan").values.items())
    if not found:
        return _nothing(arm)
    return Text(_range([lifespan_text(round(value), cut) for value, cut in found]))


def _price(arm: Arm) -> Text:
    found = _found(arm, "clean_accuracy_price")
    text = Text("-" if found.mean is None else signed(found.mean))
    return text.append(f"\n{spread_text(found)}" if spread_text(found) else "", "dim")


def _collapsed(arm: Arm) -> Text:
    """Return how many rounds collapsed, in words: a bare number would be read as that of a round."""
    counts = _collapsed_rounds(arm)
    if not counts:
        return Text("no round" if arm.seeds else "-")
    return Text(f"{counts} round{'s' * (counts != '1')}", "magenta")


def _collapsed_rounds(arm: Arm) -> str:
    """Return the range over seeds, or "" where no round collapsed."""
    counts = sorted(_found(arm, "collapsed_rounds").values.values())
    return _range([f"{count:.0f}" for count in counts]) if counts and counts[-1] else ""
