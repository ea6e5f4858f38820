"""Any partitioner of the package flwr-datasets, by the name of its class.

Reference: Flower Labs, flwr-datasets (https://flower.ai/docs/datasets/). The package brings half a gigabyte and is no
dependency of fedbd; where it is not installed the scenario is refused. Its partitioners get a table with the columns
``idx``, ``label`` and, where the data have groups, ``group``, and no picture.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray

from fedbd.errors import Problem, UserError
from fedbd.method_fields import checks_fields
from fedbd.registry import near_miss

PACKAGE, MODULE = "flwr_datasets", "flwr_datasets.partitioner"
WHOLE = ("NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
"""The partitioners that keep what they split by whole."""


@dataclass(frozen=True, kw_only=True)
@checks_fields
class FlwrDatasets:
    """A partitioner of flwr-datasets; ``num_partitions`` is the number of clients, ``seed`` comes from the scenario's.

    Attributes:
        partitioner: Its class in ``flwr_datasets.partitioner``, as ``DirichletPartitioner``.
        arguments: Its constructor's other arguments; the columns for ``partition_by`` are ``label`` and ``group``.
    """

    partitioner: Annotated[str, MinLen(1)]
    arguments: dict[str, float | int | bool | str | list[float | int]] = field(default_factory=dict)
    takes_groups: ClassVar[bool] = True

    @property
    def keeps_groups(self) -> bool:
        """Whether it gives each group of the data to one client."""
        return self.partitioner in WHOLE and self.arguments.get("partition_by") == "group"

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong before the data are there: the package is missing, or an argument is not theirs."""
        found = []
        if importlib.util.find_spec(PACKAGE) is None:
            found.append(
                ("", "needs the package flwr-datasets: pip install flwr-datasets, or take a partition of fedbd's")
            )
        if "num_partitions" in self.arguments:
            found.append(("arguments.num_partitions", "must be left out: it is partition.clients"))
        return found

    def split(
        self,
        labels: NDArray[np.int64],
        clients: int,
        rng: np.random.Generator,
        groups: NDArray[np.int64] | None = None,
    ) -> list[NDArray[np.int64]]:
        """Return one ascending index array per client (see ``types.Partitioner``).

        Raises:
            UserError: If there is no such partitioner, it refuses its arguments or the data, or gives another number of
                parts.
        """
        theirs = self._theirs()
        given = dict(self.arguments)
        wanted = inspect.signature(theirs).parameters
        given |= {"num_partitions": clients} if "num_partitions" in wanted else {}
        if "seed" in wanted and "seed" not in given:
            given["seed"] = int(rng.integers(2**31))
        columns = {"idx": np.arange(len(labels)), "label": labels} | ({} if groups is None else {"group": groups})
        try:
            return self._parts(theirs(**given), columns, clients)
        except UserError:
            raise
        except Exception as error:  # the package raises what it likes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                [Problem(path="partition", expected=f"is refused by {self.partitioner}: {reason}")]
            ) from None

    def _parts(self, partitioner: Any, columns: dict[str, Any], clients: int) -> list[NDArray[np.int64]]:
        datasets = importlib.import_module("datasets")
        datasets.disable_progress_bars()
        partitioner.dataset = datasets.Dataset.from_dict({name: list(map(int, held)) for name, held in columns.items()})
        if partitioner.num_partitions != clients:
            expected = f"must be {partitioner.num_partitions}, the parts that {self.partitioner} makes"
            raise UserError([Problem(path="partition.clients", expected=expected, got=str(clients))])
        parts = [list(partitioner.load_partition(client)["idx"]) for client in range(clients)]
        return [np.sort(np.array(part, dtype=np.int64)) for part in parts]

    def _theirs(self) -> Callable[..., Any]:
        module = importlib.import_module(MODULE)
        found: Callable[..., Any] | None = getattr(module, self.partitioner, None)
        if not inspect.isclass(found):
            known = [
                name for name, entry in inspect.getmembers(module, inspect.isclass) if name.endswith("Partitioner")
            ]
            remedy = near_miss(self.partitioner, known) or f"there are {', '.join(known)}"
            expected = f"must be a class of {MODULE}"
            problem = Problem(
                path="partition.partitioner", expected=expected, got=repr(self.partitioner), remedy=remedy
            )
            raise UserError([problem])
        return found
