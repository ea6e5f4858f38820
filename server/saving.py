"""Where a run stands, into a checkpoint after a round and out of it when the run is taken up again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedbd.config.scenario import Scenario
from fedbd.errors import RunFailed, UserError
from fedbd.flower.arrays import pack_all, view_all
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.saving import records_from, records_state
from fedbd.flower.strategy import DefendedStrategy
from fedbd.params import join, layout_of, sha256
from fedbd.records.checkpoint import Checkpoint, Stamp, differences, missing_lines, read_checkpoint, write_checkpoint
from fedbd.records.record import RunFolder, read_rounds
from fedbd.records.saved_state import Unsaveable

from .step import Rounds

APP_DIR = Path(__file__).resolve().parent.parent


def take_up(folder: RunFolder, stamp: Stamp, *, other_code: bool = False) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from, its folder cut back to it; None: it starts from its first round.

    Args:
        folder: The run's folder.
        stamp: Of this process.
        other_code: Also take up what other code or releases wrote.

    Raises:
        UserError: If the checkpoint is another scenario's or was written by other code, all are damaged, or lines of
            its rounds are missing.
    """
    found = read_checkpoint(folder.path)
    if found is not None:
        problems = differences(found.stamp, stamp, str(folder.path), other_code=other_code)
        problems += missing_lines(folder.path, found.round)
        if problems:
            raise UserError(problems)
    last = found.round if found is not None else -1
    folder.cut_back(last)
    folder.note_resumed(last, damaged=found.damaged if found is not None else (), threads=1)
    return found


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Saves and restores the parts of a run; called after each round of Flower's loop.

    Attributes:
        scenario: What runs.
        folder: The run's folder.
        grid: The engine's grid: a ``LocalGrid`` keeps what clients remember.
        strategy: Its strategy.
        rounds: Its lines, and what cleanups left behind.
        stamp: What this process would write a checkpoint as.
    """

    scenario: Scenario
    folder: RunFolder
    grid: Grid
    strategy: DefendedStrategy
    rounds: Rounds
    stamp: Stamp

    def save(self, round_: int, arrays: ArrayRecord) -> None:
        """Write a checkpoint if one is due after a round; Flower's ``evaluate_fn``, which measures nothing.

        Args:
            round_: Rounds of this process's loop; 0 before its first.
            arrays: What the next round starts from.
        """
        plan, number = self.scenario.checkpoint, round_ + self.strategy.done
        if plan is None or round_ == 0 or (number % plan.every and number != self.scenario.rounds):
            return
        try:
            strategy = self.strategy.state_dict()
        except Unsaveable as error:
            remedy = "set checkpoint: null, or give the strategy state_dict and load_state_dict"
            raise RunFailed(f"round {number}: no checkpoint can hold this: {error}; {remedy}") from None
        clients = self.grid.client_states() if isinstance(self.grid, LocalGrid) else {}
        state = {
            "arrays": view_all(arrays),
            "strategy": strategy,
            "rounds": self.rounds.state(),
            "clients": {client: records_state(records) for client, records in clients.items()},
        }
        write_checkpoint(self.folder.path, Checkpoint(round=number, stamp=self.stamp, state=state))

    def restore(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Put everything where it was; return what the next round starts from."""
        state = checkpoint.state
        lines = read_rounds(self.folder.path)
        weights = join(state["arrays"], layout_of(state["arrays"]))
        if lines[-1]["weights_sha256"] != sha256(self.rounds.recorded(weights)):
            raise RunFailed(f"round {checkpoint.round}: the checkpoint's weights are not those of the round's record")
        self.rounds.restore(lines, state["rounds"])
        self.strategy.load_state_dict(state["strategy"], checkpoint.round)
        if isinstance(self.grid, LocalGrid):
            states = {client: records_from(records) for client, records in state["clients"].items()}
            self.grid.restore_client_states(states)
        elif state["clients"]:
            raise RunFailed("clients remember something, and only engine local can give it back to them")
        return pack_all(state["arrays"])
