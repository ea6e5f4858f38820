"""A strategy that is built anew and given what an earlier one had goes on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy

from fedbd.defenses.aggregation.mean import Mean
from fedbd.flower.arrays import pack_all, view_all
from fedbd.flower.executors import SerialExecutor
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.saving import records_from, records_state, restore_strategy, strategy_state
from fedbd.flower.strategy import DefendedStrategy
from fedbd.records.saved_state import Arrays, Unsaveable, decode, encode

CLIENTS = 3
START = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "counter": np.array(7, np.int64)}


def through_a_file(value: Any) -> Any:
    held: Arrays = {}
    return decode(json.loads(json.dumps(encode(value, held), allow_nan=False)), {k: v.copy() for k, v in held.items()})


def toy() -> ClientApp:
    """Clients that answer by the round, their number and what they remember."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = int(context.state.config_records.get("seen", ConfigRecord({"times": 0}))["times"]) + 1  # type: ignore[arg-type]
        context.state["seen"] = ConfigRecord({"times": seen})
        arrays = {name: array.copy() for name, array in view_all(message.content["arrays"]).items()}
        shift = np.sin(float(message.content["config"]["server-round"])) + int(context.node_config["partition-id"])  # type: ignore[arg-type]
        arrays["w"] = (arrays["w"] * np.float32(0.9) + np.float32(shift * seen / 7)).astype(np.float32)
        content = {"arrays": pack_all(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


class Remembering(Mean):
    """The mean, and a memory that counts rounds and shifts the result by it."""

    def aggregate(self, cohort: Any, memory: Any, rng: Any) -> Any:
        aggregate, _, notes = super().aggregate(cohort, memory, rng)
        rounds = int(memory.get("rounds", np.array(0))) + 1
        shifted = type(aggregate)(delta=aggregate.delta + np.float32(rounds / 100))
        return shifted, {"rounds": np.array(rounds)}, notes


INNER: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(fraction_evaluate=0.0),
    "fedavgm": lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=0.7, server_momentum=0.9),
    "fedadagrad": lambda: FedAdagrad(fraction_evaluate=0.0, eta=0.1),
    "fedadam": lambda: FedAdam(fraction_evaluate=0.0, eta=0.1),
    "fedyogi": lambda: FedYogi(fraction_evaluate=0.0, eta=0.1),
    "fedprox": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("done", [1, 3])
def test_a_run_in_two_parts_is_the_run_in_one(name: str, done: int) -> None:
    app, rounds = toy(), 5
    with SerialExecutor(lambda: app) as executor:
        whole = DefendedStrategy(INNER[name](), Remembering()).start(
            LocalGrid(executor, CLIENTS), pack_all(START), num_rounds=rounds, timeout=30
        )
        first, grid = DefendedStrategy(INNER[name](), Remembering()), LocalGrid(executor, CLIENTS)
        middle = first.start(grid, pack_all(START), num_rounds=done, timeout=30)
        saved = through_a_file(
            {
                "arrays": view_all(middle.arrays),
                "strategy": first.state_dict(),
                "clients": {client: records_state(state) for client, state in grid.client_states().items()},
            }
        )
        second, other = DefendedStrategy(INNER[name](), Remembering()), LocalGrid(executor, CLIENTS)
        second.load_state_dict(saved["strategy"], done)
        other.restore_client_states({client: records_from(state) for client, state in saved["clients"].items()})
        last = second.start(other, pack_all(saved["arrays"]), num_rounds=rounds - done, timeout=30)
    assert view_all(last.arrays)["w"].tobytes() == view_all(whole.arrays)["w"].tobytes()
    assert view_all(last.arrays)["counter"] == 7
    assert middle.arrays != whole.arrays
    assert int(second.memory["rounds"]) == rounds


def test_records_of_all_kinds_come_back() -> None:
    content = RecordDict(
        {
            "a": pack_all({"x": np.arange(3), "y": np.float64(2.5).reshape(())}),
            "c": ConfigRecord({"i": 1, "f": 0.1, "s": "ä", "b": True, "raw": b"\x00\xff", "list": [1.5, 2.5]}),
            "m": MetricRecord({"i": 3, "list": [1, 2]}),
            "none": ArrayRecord(),
        }
    )
    back = records_from(through_a_file(records_state(content)))
    assert list(back) == list(content)
    assert back["c"] == content["c"]
    assert back["m"] == content["m"]
    for name in ("a", "none"):
        one, other = back.array_records[name], content.array_records[name]
        assert {key: array.data for key, array in one.items()} == {key: array.data for key, array in other.items()}
        assert all(isinstance(array, Array) for array in one.values())


class Speaks(FedAvg):
    """A third party's strategy that says itself what it keeps."""

    mean_only = True

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = json.loads(state["rng"])


class Silent(FedAvg):
    """A third party's strategy with a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)


def test_what_a_strategy_says_of_itself_is_taken() -> None:
    one, other = Speaks(), Speaks()
    one.rng.random(5)
    restore_strategy(other, through_a_file(strategy_state(one)))
    assert other.rng.random() == one.rng.random()


def test_functions_are_built_again_and_all_else_is_refused() -> None:
    def mine(records: Any, key: str) -> MetricRecord:
        return MetricRecord()

    state = strategy_state(FedAvg(train_metrics_aggr_fn=mine))
    assert "train_metrics_aggr_fn" not in state
    assert state["fraction_train"] == ("value", 1.0)
    with pytest.raises(Unsaveable, match=r"Silent\.rng is a numpy\.random"):
        strategy_state(Silent())
