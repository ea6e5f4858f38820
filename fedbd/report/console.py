"""Runs as they go, on the terminal: a live table where there is one, a line per round where there is none.

Red is a backdoor that works, magenta a model that collapsed. Starts in no time: neither torch nor matplotlib in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbd.summary import failed_clients, was_rolled_back

Record = Mapping[str, Any]

LINES = 100
"""About so many lines a run prints where there is no terminal."""

SOMETIMES = ("ASR %", "floor %", "cleaned CA/ASR %", "AUC", "failed clients")
"""Columns that go where no row has a value in them."""

HIGH, RAISED = 0.5, 0.1
"""Attack success that is red, and, above the floor, yellow."""


STATES = {"done": "green", "collapsed": "bold magenta", "failed": "bold red"}
"""How a run can end, with its color."""


@dataclass
class _Run:
    """What is known of a run so far."""

    name: str
    seed: int
    planned: int
    lines: list[Record] = field(default_factory=list)
    state: str = ""
    reason: str = ""

    @property
    def last(self) -> Record:
        return self.lines[-1] if self.lines else {}

    @property
    def measured(self) -> Record:
        """The last line with measurements: ``evaluation.every`` leaves some without."""
        return next((line for line in reversed(self.lines) if line.get("clean_accuracy") is not None), self.last)

    @property
    def done(self) -> int:
        return int(self.last.get("round", 0))

    @property
    def pace(self) -> float | None:
        """Seconds per round: the mean of the last ten, so that a slow first round does not last."""
        spent = [(line.get("seconds") or {}).get("total") for line in self.lines if line["round"] > 0][-10:]
        known = [seconds for seconds in spent if seconds is not None]
        return sum(known) / len(known) if known else None

    @property
    def eta(self) -> float | None:
        return None if self.pace is None or self.state else self.pace * max(0, self.planned - self.done)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent without the sign, ``-`` for an absent one."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return seconds as ``45s``, ``3m20s`` or ``2h05m``, ``-`` for none."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def success_style(success: float | None, floor: float | None = None, collapsed: bool | None = None) -> str:
    """Return the color of an attack success: red from 50 %, yellow 10 points above the floor, else green."""
    if success is None or collapsed:
        return "dim"  # the attack success of a collapsed model says nothing
    if success >= HIGH:
        return "bold red"
    return "yellow" if success >= (floor or 0.0) + RAISED else "green"


def _clean(line: Record, mark: str) -> Text:
    text = Text(percent(line.get("clean_accuracy")))
    return text.append(mark, "bold magenta") if line.get("collapsed") else text


def _success(line: Record) -> Text:
    success, floor = line.get("attack_success"), line.get("attack_success_floor")
    return Text(percent(success), success_style(success, floor, line.get("collapsed")))


def _cleaned(line: Record, mark: str) -> Text:
    """Return ``name CA/ASR`` per cleanup; a star marks those in the loop."""
    cells = []
    for name, entry in (line.get("cleanup") or {}).items():
        after = entry.get("after") or {}
        success, collapsed = after.get("attack_success"), after.get("collapsed")
        cell = Text(f"{name}{'*' if entry.get('mode') == 'in_loop' else ''} {percent(after.get('clean_accuracy'))}")
        if entry.get("acted") is False:
            cells.append(Text(f"{name} {'rolled back' if was_rolled_back(entry) else 'did not act'}", "yellow"))
            continue
        if not after:  # it repairs nothing, it found clues
            target = (entry.get("notes") or {}).get("target")
            cells.append(Text(f"{name} done" if target is None else f"{name} label {target}", "dim"))
            continue
        cell.append(mark if collapsed else "", "bold magenta").append("/")
        cells.append(cell.append(percent(success), success_style(success, None, collapsed)))
    return Text("\n").join(cells) if cells else Text("-", "dim")


def _detected(line: Record) -> str:
    found = {name: entry.get("auc") for name, entry in (line.get("detection") or {}).items()}
    return "\n".join(f"{name} {'-' if auc is None else format(auc, '.3f')}" for name, auc in found.items()) or "-"


def _failed(lines: Sequence[Record]) -> Text:
    """Return of how many replies of clients how many did not come, or were refused: ``1 of 6``, no client's number."""
    count = sum(len(failed_clients(line)) for line in lines)
    asked = sum(len(line.get("participants") or ()) for line in lines)
    return Text(f"{count} of {asked}", "yellow") if count else Text("-")


def _seconds(line: Record) -> float | None:
    total: float | None = (line.get("seconds") or {}).get("total")
    return total


def _per_round(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


LEGEND = "! collapsed: its ASR says nothing   * cleaned in the loop"


def _measures(line: Record, mark: str = "!") -> dict[str, Text | str]:
    return {
        "CA %": _clean(line, mark),
        "ASR %": _success(line),
        "floor %": percent(line.get("attack_success_floor")),
        "cleaned CA/ASR %": _cleaned(line, mark),
        "AUC": _detected(line),
        "failed clients": _failed([line]),
    }


class LiveRuns:
    """Shows runs while they go. A context manager; on leaving it the last state stays on the screen.

    With a terminal: a table with one row per run and, for a single run, the rounds below it. Without one (a file, a CI
    log): plain lines for rounds. Quiet: failures only.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, silent: bool = False, every: int | None = None
    ) -> None:
        """Write to a console.

        Args:
            console: Default: standard output.
            quiet: Only failures.
            silent: Not even these.
            every: Without a terminal: a line for every so many rounds, and for the first and the last; None: for as
                many as give some ``LINES`` lines.
        """
        self._console = console or Console()
        self._quiet = quiet or silent
        self._silent = silent
        self._every = every
        self._runs: dict[str, _Run] = {}
        self._lock = RLock()
        self._live: Live | None = None
        self._closing = False

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._console.is_interactive and not self._quiet:
            self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; every round of a single run is shown then, however many there are."""
        if self._live is not None:
            self._closing = True
            self._live.stop()

    def add(self, run_id: str, *, name: str, seed: int, rounds: int) -> None:
        """Announce a run: its id (any string), its scenario's name and seed, and the rounds planned."""
        with self._lock:
            self._runs[run_id] = _Run(name=name, seed=seed, planned=rounds)

    def update(self, run_id: str, record: Record) -> None:
        """Show a round's record."""
        with self._lock:
            run = self._runs[run_id]
            run.lines.append(record)
        every = self._every or -(-run.planned // LINES)
        if record["round"] in (0, 1, run.planned) or record["round"] % every == 0:
            self._say(self._line(run, record))

    def finish(self, run_id: str, summary: Record) -> None:
        """Show that a run came to its end, and its summary's figures."""
        with self._lock:
            run = self._runs[run_id]
            run.state = "collapsed" if summary.get("collapsed") else "done"
        ended = "done" if run.state == "done" else "done, COLLAPSED,"
        figures = f"CA {percent(summary.get('clean_accuracy'))}  ASR {percent(summary.get('attack_success'))}"
        self._say(f"{_title(run)}  {ended} after {run.done} rounds  {figures} (means over the last rounds counted)")

    def fail(self, run_id: str, reason: str) -> None:
        """Show that a run failed, and why; in quiet mode, too."""
        with self._lock:
            run = self._runs[run_id]
            run.state, run.reason = "failed", reason
        if self._live is None and not self._silent:
            begun = f"in round {run.done + 1}" if run.lines else "before its first round"
            self._plain(f"{_title(run)}  FAILED {begun}: {reason.removeprefix(f'round {run.done + 1}: ')}")

    def _say(self, text: str) -> None:
        if self._live is None and not self._quiet:
            self._plain(text)

    def _plain(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, run: _Run, record: Record) -> str:
        """Return one round as one line of text."""
        width = len(str(run.planned))
        clean, success, floor, cleaned, auc, failed = (
            str(cell).replace("\n", ", ") for cell in _measures(record, " collapsed").values()
        )
        parts = [f"{_title(run)}  round {record['round']:>{width}}/{run.planned}", f"CA {clean}", f"ASR {success}"]
        parts += [f"floor {floor}"] if floor != "-" else []
        parts += [f"cleaned CA/ASR {cleaned}"] if cleaned != "-" else []
        parts += [f"AUC {auc}"] if auc != "-" else []
        parts += [f"failed clients {failed}"] if failed != "-" else []
        return "  ".join([*parts, f"{_per_round(_seconds(record))}s", f"ETA {duration(run.eta)}"])

    def _draw(self) -> Group:
        with self._lock:
            runs = list(self._runs.values())
            parts: list[Any] = [_overview(runs, self._console.width)]
            parts += [Text(f"{_title(run)} failed: {run.reason}", "bold red") for run in runs if run.reason]
            if len(runs) == 1 and runs[0].lines:
                room = None if self._closing else max(3, self._console.height - 12)
                parts.append(_history(runs[0].lines, room, self._console.width))
            return Group(*parts, Text(LEGEND, "dim"))


def _title(run: _Run) -> str:
    return f"{run.name} seed {run.seed}"


def _overview(runs: list[_Run], width: int) -> Table:
    """Return one row per run."""
    rows = []
    for run in runs:
        end = Text(run.state, STATES[run.state]) if run.state else duration(run.eta)
        bar = ProgressBar(total=max(1, run.planned), completed=run.done, width=12)
        row = {"run": Text(run.name), "seed": str(run.seed), "round": f"{run.done}/{run.planned}", "": bar}
        failed = {"failed clients": _failed(run.lines)}
        rows.append(row | _measures(run.measured) | failed | {"s/round": _per_round(run.pace), "ETA": end})
    return _table(rows, width)


def _history(lines: list[Record], room: int | None, width: int) -> Table:
    """Return the rounds of one run, the latest ``room`` of them, or all."""
    shown = lines if room is None else lines[-room:]
    rows = []
    for line in shown:
        attackers = line.get("attackers")
        first = {"round": str(line["round"]), "attackers": "-" if attackers is None else str(len(attackers))}
        rows.append(first | _measures(line) | {"s": _per_round(_seconds(line))})
    table = _table(rows, width)
    hidden = len(lines) - len(shown)
    table.title = f"{hidden} earlier rounds are shown at the end" if hidden else None
    return table


def _table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Return a table whose numbers are never cut short: in a narrow terminal whole columns go, as do empty ones."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_style="dim", title_justify="left")
    dropped = [title for title, least in (("", 110), ("attackers", 100), ("floor %", 90), ("AUC", 90)) if width < least]
    dropped += [title for title in SOMETIMES if all(str(row.get(title, "-")) == "-" for row in rows)]
    titles = [title for title in rows[0] if title not in dropped] if rows else []
    for title in titles:
        text = title in ("run", "cleaned CA/ASR %", "AUC")
        table.add_column(title, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(row[title] for title in titles))
    return table
