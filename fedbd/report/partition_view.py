"""Who holds what, counted and told: what the picture and the table of ``fedbd show --partition`` are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbd.config.scenario import Scenario
from fedbd.config.schema import to_plain
from fedbd.data.assemble import Federation
from fedbd.report.console import percent
from fedbd.roles import assignment

Counts = NDArray[np.int64]
LISTED = 20
"""Most clients that the table names one by one."""

STYLES = {"attacker": "bold red", "polluted": "yellow"}


@dataclass(frozen=True, kw_only=True)
class PartitionView:
    """Who holds what.

    Attributes:
        title: Scenario, partition and seed in words.
        counts: (clients, classes) int64, samples.
        trusted: (classes,) int64, the server's samples; None: it holds none.
        nobody: How many samples are given to nobody: what whole groups in the trusted set leave over.
        groups: (clients,) int64, how many of the data's groups each client holds; None where the data have none.
        roles: ``attacker`` or ``polluted``, by client, of those that an attack has.
        attacks: The attack's name in the records, by client.
    """

    title: str
    counts: Counts
    trusted: Counts | None
    nobody: int
    groups: Counts | None
    roles: Mapping[int, str]
    attacks: Mapping[int, str]

    @property
    def sizes(self) -> Counts:
        """(clients,) int64, samples of each client."""
        sizes: Counts = self.counts.sum(axis=1)
        return sizes

    @property
    def distances(self) -> NDArray[np.float64]:
        """(clients,) float64 in [0, 1]: total variation between a client's class shares and those of all clients."""
        shares = self.counts / self.sizes[:, None]
        whole = self.counts.sum(axis=0) / self.counts.sum()
        apart: NDArray[np.float64] = np.abs(shares - whole).sum(axis=1) / 2
        return apart


def partition_view(scenario: Scenario, federation: Federation) -> PartitionView:
    """Count what each client of a federation holds."""
    data, parts = federation.dataset, federation.partitions
    labels, assigned = data.train.labels.numpy(), assignment(scenario)
    counts = np.array([np.bincount(labels[part], minlength=data.classes) for part in parts], dtype=np.int64)
    held = federation.trusted
    trusted = None if held is None else [*held.fit.labels.tolist(), *held.validate.labels.tolist()]
    fields = {k: v for k, v in to_plain(scenario.partition.method.impl).items() if v is not None}
    words = " ".join([scenario.partition.method.name, *(f"{name}={value}" for name, value in fields.items())])
    groups = None if data.groups is None else [len(np.unique(data.groups[part])) for part in parts]
    return PartitionView(
        title=f"{scenario.name}: {words}, {len(parts)} clients, seed {scenario.seed}",
        counts=counts,
        trusted=None if trusted is None else np.bincount(trusted, minlength=data.classes).astype(np.int64),
        nobody=len(labels) - int(counts.sum()) - (0 if trusted is None else len(trusted)),
        groups=None if groups is None else np.array(groups, dtype=np.int64),
        roles={client: attack.role for client, attack in assigned.items()},
        attacks={client: attack.key for client, attack in assigned.items()},
    )


def render_partition(console: Console, view: PartitionView) -> None:
    """Print a few lines on all clients, and up to ``LISTED`` clients one by one."""
    total = int(view.sizes.sum())
    server = "" if view.trusted is None else f", and {int(view.trusted.sum()):,} trusted samples at the server"
    console.print(Text(view.title, "bold"))
    console.print(f"{len(view.counts):,} clients hold {total:,} samples of {view.counts.shape[1]} classes{server}")
    if view.nobody:
        console.print(
            f"{view.nobody:,} samples are nobody's: of groups that the trusted set took and did not need whole"
        )
    table = Table("each client's", "least", "median", "most", box=None, pad_edge=False, header_style="bold")
    for name, values in _measures(view):
        table.add_row(name, *(_number(value) for value in (values.min(), np.median(values), values.max())))
    console.print(table)
    for label in dict.fromkeys(view.attacks.values()):
        console.print(_attack_line(view, label, total))
    if len(view.counts) <= LISTED:
        console.print()
        console.print(_clients(view))


def _measures(view: PartitionView) -> list[tuple[str, NDArray[np.float64]]]:
    shares = view.counts / view.sizes[:, None]
    rows = [
        ("samples", view.sizes.astype(np.float64)),
        ("classes", (view.counts > 0).sum(axis=1).astype(np.float64)),
        ("largest class, %", 100 * shares.max(axis=1)),
        ("distance from the whole, %", 100 * view.distances),
    ]
    return rows + ([] if view.groups is None else [("groups", view.groups.astype(np.float64))])


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _attack_line(view: PartitionView, label: str, total: int) -> Text:
    clients = sorted(client for client, attack in view.attacks.items() if attack == label)
    role = view.roles[clients[0]]
    held = sum(int(view.sizes[client]) for client in clients)
    named = _ids(clients)
    text = f"{label} ({role}): {len(clients)} clients with {percent(held / total)} % of the samples: {named}"
    return Text(text, STYLES[role])


def _ids(clients: Sequence[int]) -> str:
    shown = ", ".join(map(str, clients[:LISTED]))
    return shown if len(clients) <= LISTED else f"{shown} and {len(clients) - LISTED} more"


def _clients(view: PartitionView) -> Table:
    """Return one row for each client: its size and its largest classes."""
    grouped = view.groups is not None
    titles = ["client", "samples", *(["groups"] if grouped else []), "largest classes (samples) +others", "role"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        left = title in ("largest classes (samples) +others", "role")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for client, counts in enumerate(view.counts):
        order = np.argsort(-counts, kind="stable")[:3]
        classes = "  ".join(f"{label} ({counts[label]})" for label in order if counts[label])
        more = int((counts > 0).sum()) - len(order)
        cells = [
            str(client),
            f"{view.sizes[client]:,}",
            *([str(view.groups[client])] if view.groups is not None else []),
        ]
        table.add_row(
            *cells,
            classes + (f"  +{more}" if more > 0 else ""),
            view.roles.get(client, ""),
            style=STYLES.get(view.roles.get(client, "")),
        )
    return table


def plain_view(view: PartitionView) -> dict[str, Any]:
    """Return a view as JSON values."""
    return {
        "title": view.title,
        "counts": view.counts.tolist(),
        "trusted": None if view.trusted is None else view.trusted.tolist(),
        "nobody": view.nobody,
        "groups": None if view.groups is None else view.groups.tolist(),
        "roles": {str(client): role for client, role in sorted(view.roles.items())},
        "attacks": {str(client): attack for client, attack in sorted(view.attacks.items())},
    }
