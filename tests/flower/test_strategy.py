"""DefendedStrategy with a toy app: what it sums, whom it refuses, and that it is FedAvg where nothing is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedYogi

from fedbd.crypto.agent_client import start_agent
from fedbd.crypto.ckks import Ckks
from fedbd.defenses.aggregation.mean import Mean
from fedbd.defenses.aggregation.median import Median
from fedbd.errors import ClientFailed, SecureSumFailed, UserError
from fedbd.flower.arrays import pack_all, view_all
from fedbd.flower.executors import SerialExecutor
from fedbd.flower.local_grid import LocalGrid
from fedbd.flower.mods import CIPHERTEXT, SECURE, protocol_mod
from fedbd.flower.outcome import Outcome, Replacement
from fedbd.flower.strategy import DefendedStrategy
from fedbd.weighing import Weighing

CLIENTS = 6
START = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.zeros(5, np.float32),
    "count": np.array(7, np.int64),
}


def step_of(client: int) -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.PCG64(client)).normal(0, 0.3, (3, 4)).astype(np.float32)


Change = Callable[[int, dict[str, Any], dict[str, Any]], None]


def app(change: Change | None = None) -> ClientApp:
    """A client adds its own step to ``w`` and counts up the integer buffer; ``change`` spoils its reply."""
    toy = ClientApp(mods=[protocol_mod])

    @toy.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        arrays = {name: array.copy() for name, array in view_all(message.content["arrays"]).items()}
        arrays["w"] += step_of(client)
        arrays["count"] += 1
        metrics: dict[str, Any] = {"num-examples": 10 * (client + 1)}
        if change is not None:
            change(client, arrays, metrics)
        content = RecordDict({"arrays": pack_all(arrays), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return toy


def rounds(
    strategy: DefendedStrategy, toy: ClientApp, count: int = 2, start: dict[str, Any] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    with SerialExecutor(lambda: toy) as executor:
        grid = LocalGrid(executor, CLIENTS)
        result = strategy.start(grid, pack_all(start or START), num_rounds=count, timeout=30)
    return {name: array.copy() for name, array in view_all(result.arrays).items()}


def fedavg() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def test_the_mean_is_the_mean() -> None:
    final = rounds(DefendedStrategy(fedavg(), Mean()), app())
    expected = START["w"] + 2 * np.mean([step_of(client) for client in range(CLIENTS)], axis=0)
    np.testing.assert_allclose(final["w"], expected, atol=2 * 2**-24)
    assert final["count"] == 7  # integer buffers keep the global model's value
    assert final["count"].dtype == np.int64
    assert final["w"].dtype == np.float32


def test_frozen_entries_stay_whatever_clients_send() -> None:
    def move(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        arrays["b"] += 1 + client

    free = rounds(DefendedStrategy(fedavg(), Mean()), app(move))
    np.testing.assert_allclose(free["b"], 2 * np.mean([1 + client for client in range(CLIENTS)]))
    frozen = rounds(DefendedStrategy(fedavg(), Mean(), frozen=("b",)), app(move))
    assert frozen["b"].tobytes() == START["b"].tobytes()
    assert frozen["w"].tobytes() == free["w"].tobytes()


def test_weights_by_examples() -> None:
    weighing = Weighing(weighting="examples", average_examples=35.0)
    final = rounds(DefendedStrategy(fedavg(), Mean(), weighing=weighing), app(), 1)
    weights = np.arange(1, CLIENTS + 1) / np.arange(1, CLIENTS + 1).sum()
    expected = START["w"] + sum(w * step_of(client) for client, w in enumerate(weights))
    np.testing.assert_allclose(final["w"], expected, atol=1e-6)


def test_a_claim_of_1e9_examples_is_capped() -> None:
    def boast(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        metrics["num-examples"] = 10**9 if client == 0 else 35

    weighing = Weighing(weighting="examples", average_examples=35.0, largest=2.0)
    final = rounds(DefendedStrategy(fedavg(), Mean(), weighing=weighing), app(boast), 1)
    weights = np.array([2, 1, 1, 1, 1, 1]) / 7
    expected = START["w"] + sum(w * step_of(client) for client, w in enumerate(weights))
    np.testing.assert_allclose(final["w"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "inner",
    [
        fedavg,
        lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=0.5, server_momentum=0.9),
        lambda: FedAdam(fraction_evaluate=0.0, eta=0.1),
        lambda: FedYogi(fraction_evaluate=0.0, eta=0.1),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam", "FedYogi"],
)
def test_wrapping_changes_nothing_but_the_grid(inner: Callable[[], FedAvg]) -> None:
    def equal_examples(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        metrics["num-examples"] = 1

    toy = app(equal_examples)
    wrapped = rounds(DefendedStrategy(inner(), Mean()), toy, 3)
    with SerialExecutor(lambda: toy) as executor:
        result = inner().start(LocalGrid(executor, CLIENTS), pack_all(START), num_rounds=3, timeout=30)
    plain = view_all(result.arrays)
    np.testing.assert_allclose(wrapped["w"], plain["w"], atol=2e-4)
    assert wrapped["w"].dtype == np.float32


def test_server_rate_scales_the_step() -> None:
    final = rounds(DefendedStrategy(fedavg(), Mean(), server_rate=0.25), app(), 1)
    expected = START["w"] + 0.25 * np.mean([step_of(client) for client in range(CLIENTS)], axis=0)
    np.testing.assert_allclose(final["w"], expected, atol=2**-24)


@pytest.mark.parametrize("rate", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(
    "inner",
    [
        fedavg,
        lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.9),
        lambda: FedAdam(fraction_evaluate=0.0, eta=0.5),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdam"],
)
def test_running_statistics_follow_the_clients_and_no_optimizer(inner: Callable[[], FedAvg], rate: float) -> None:
    def halve(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        arrays["norm.running_var"] *= np.float32(0.5)
        arrays["norm.running_mean"] += np.float32(client)

    start = {**START, "norm.running_var": np.ones(2, np.float32), "norm.running_mean": np.zeros(2, np.float32)}
    final = rounds(DefendedStrategy(inner(), Mean(), server_rate=rate), app(halve), 4, start=start)
    way = min(rate, 1.0)
    np.testing.assert_allclose(final["norm.running_var"], (1 - way / 2) ** 4, atol=1e-6)  # FedAvgM alone: below 0
    mean = np.mean(range(CLIENTS))
    np.testing.assert_allclose(final["norm.running_mean"], 4 * way * mean, atol=1e-6)


def test_a_strategy_over_single_updates_is_refused() -> None:
    with pytest.raises(UserError, match=r"must work on the mean of updates .* got FedMedian"):
        DefendedStrategy(FedMedian(), Mean())


def test_the_median_of_updates() -> None:
    final = rounds(DefendedStrategy(fedavg(), Median(), bucket_size=1), app(), 1)
    expected = START["w"] + np.median([step_of(client) for client in range(CLIENTS)], axis=0)
    np.testing.assert_allclose(final["w"], expected, atol=2 * 2**-24)


def test_the_median_of_bucket_means() -> None:
    seen: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        seen.append(outcome)

    strategy = DefendedStrategy(fedavg(), Median(), bucket_size=2, secure_sum=None, after_round=keep)
    final = rounds(strategy, app(), 1)
    means = [total[:-1] / total[-1] for total in seen[0].totals.values()]
    assert len(means) == 3
    assert [int(total[-1]) for total in seen[0].totals.values()] == [2 * 2**24] * 3
    np.testing.assert_allclose(
        final["w"].reshape(-1), START["w"].reshape(-1) + np.median(means, axis=0)[:12], atol=1e-6
    )


def nan(arrays: dict[str, Any]) -> None:
    arrays["w"][0, 0] = np.nan


def infinite(arrays: dict[str, Any]) -> None:
    arrays["w"][0, 0] = np.inf


def huge(arrays: dict[str, Any]) -> None:
    arrays["w"][0, 0] = 1e30


def shape(arrays: dict[str, Any]) -> None:
    arrays["w"] = arrays["w"][0]


def renamed(arrays: dict[str, Any]) -> None:
    arrays["v"] = arrays.pop("w")


def integers(arrays: dict[str, Any]) -> None:
    arrays["w"] = arrays["w"].astype(np.int64)


SPOILED = {
    nan: "cannot be summed exactly: expected finite",
    infinite: "finite",
    huge: "magnitude",
    shape: r"'w' must be \(3, 4\), got \(4,\)",
    renamed: r"missing \['w'\], unknown \['v'\]",
    integers: r"missing \['w'\]",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_reply_ends_the_run_or_is_left_out(spoil: Callable[[dict[str, Any]], None]) -> None:
    def change(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        if client == 3:
            spoil(arrays)

    with pytest.raises(ClientFailed, match=f"round 1: client 3: .*({SPOILED[spoil]})"):
        rounds(DefendedStrategy(fedavg(), Mean()), app(change), 1)
    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), on_client_failure="skip", after_round=seen.append)
    final = rounds(strategy, app(change), 1)
    others = [step_of(client) for client in range(CLIENTS) if client != 3]
    np.testing.assert_allclose(final["w"], START["w"] + np.mean(others, axis=0), atol=2**-23)
    assert list(seen[0].faults) == [3]
    assert seen[0].accepted == (0, 1, 2, 4, 5)


def test_an_extra_metric_or_array_record_name_does_no_harm() -> None:
    def change(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        if client == 2:
            metrics["surprise"] = 1.0

    np.testing.assert_array_equal(
        rounds(DefendedStrategy(fedavg(), Mean()), app(change))["w"],
        rounds(DefendedStrategy(fedavg(), Mean()), app())["w"],
    )


def test_a_client_that_raises_is_named_with_its_reason() -> None:
    def change(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        if client == 5:
            raise RuntimeError("out of battery")

    with pytest.raises(ClientFailed, match=r"round 1: client 5: .*out of battery"):
        rounds(DefendedStrategy(fedavg(), Mean()), app(change), 1)


def test_nobody_left_fails_even_when_failures_are_skipped() -> None:
    def change(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        raise RuntimeError("no")

    with pytest.raises(ClientFailed, match="no client is left of 6"):
        rounds(DefendedStrategy(fedavg(), Mean(), on_client_failure="skip"), app(change), 1)


def test_the_cohort_is_ours_to_draw() -> None:
    seen: list[Outcome] = []
    strategy = DefendedStrategy(
        fedavg(),
        Mean(),
        cohort=lambda round_: (1, 4) if round_ == 1 else (0, 2, 5),
        after_round=seen.append,
    )
    rounds(strategy, app())
    assert [outcome.participants for outcome in seen] == [(1, 4), (0, 2, 5)]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with start_agent(Ckks()) as process:
        monkeypatch.setenv("FEDBD_KEY_AGENT", process.handle)
        yield


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("bucket_size", [None, 1, 2, 4])
def test_encrypted_is_plain_to_the_last_bit(bucket_size: int | None) -> None:
    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=bucket_size, after_round=seen.append)
    np.testing.assert_array_equal(rounds(strategy, app())["w"], rounds(DefendedStrategy(fedavg(), Mean()), app())["w"])
    expected = {None: [6], 1: [1] * 6, 2: [2] * 3, 4: [6]}[bucket_size]
    assert [len(group) for group in seen[0].buckets] == expected
    assert len(seen[0].decryptors) == 2
    assert seen[0].noise is not None
    assert seen[0].noise < 2**-25


@pytest.mark.usefixtures("agent")
def test_an_encrypted_reply_holds_one_blob_and_nothing_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    original = DefendedStrategy._on_reply

    def watch(self: DefendedStrategy, client: int, reply: Message) -> Message:
        contents.append({name: list(record) for name, record in reply.content.items()})
        return original(self, client, reply)

    monkeypatch.setattr(DefendedStrategy, "_on_reply", watch)
    rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=None), app(), 1)
    assert contents == [{CIPHERTEXT: ["row"]}] * CLIENTS


@pytest.mark.usefixtures("agent")
def test_median_over_encrypted_buckets() -> None:
    encrypted = rounds(DefendedStrategy(fedavg(), Median(), secure_sum=Ckks(), bucket_size=2), app())
    plain = rounds(DefendedStrategy(fedavg(), Median(), bucket_size=2), app())
    np.testing.assert_array_equal(encrypted["w"], plain["w"])


@pytest.mark.usefixtures("agent")
def test_a_client_with_another_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbd.flower import mods

    with start_agent(Ckks()) as other:
        ours = mods._handle

        def handle(context: Context) -> str:
            return other.handle if context.node_config["partition-id"] == 4 else ours(context)

        monkeypatch.setattr(mods, "_handle", handle)
        with pytest.raises(SecureSumFailed, match=r"differently|another key"):
            rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=None), app(), 1)


@pytest.mark.usefixtures("agent")
def test_decryptors_that_disagree_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbd.flower import mods

    answer, lied = mods._answer, []

    def lie(content: RecordDict, context: Context) -> RecordDict:
        reply = answer(content, context)
        if content[mods.PROTOCOL]["kind"] == "decrypt" and not lied:
            lied.append(True)
            rows = {name: row.copy() for name, row in view_all(reply[CIPHERTEXT]).items()}
            rows["0"][3] += 1
            reply[CIPHERTEXT] = pack_all(rows)
        return reply

    monkeypatch.setattr(mods, "_answer", lie)
    with pytest.raises(SecureSumFailed, match=r"round 1: clients \d and \d decrypt sum 0 differently"):
        rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=None), app(), 1)


def test_without_a_key_agent_the_client_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDBD_KEY_AGENT", raising=False)
    with pytest.raises(ClientFailed, match="this client has no key agent"):
        rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=None), app(), 1)


def test_the_request_says_how_to_encrypt_and_no_more() -> None:
    sent: list[ConfigRecord] = []
    toy = ClientApp()

    @toy.train()
    def train(message: Message, context: Context) -> Message:
        sent.append(message.content[SECURE])
        raise RuntimeError("enough")

    with pytest.raises(ClientFailed):
        rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=None), toy, 1)
    assert dict(sent[0]) == {
        "round": 1,
        "weighting": "equal",
        "average-examples": 1.0,
        "largest-weight": 10.0,
        "largest": Ckks().largest(CLIENTS),
        "grid-bits": 24,
    }


def test_arrays_round_trip_like_flowers_own() -> None:
    arrays = {"f": START["w"], "i": START["count"], "e": np.zeros((0, 3), np.float32), "t": START["w"].T}
    ours, theirs = pack_all(arrays), ArrayRecord({})
    for name, array in arrays.items():
        from flwr.app import Array

        theirs[name] = Array(array)
        np.testing.assert_array_equal(view_all(ours)[name], array)
        np.testing.assert_array_equal(view_all(theirs)[name], array)
        np.testing.assert_array_equal(ours[name].numpy(), array)


@pytest.mark.usefixtures("agent")
def test_a_sum_that_drop_outs_leave_with_one_client_stays_closed() -> None:
    seen: list[Outcome] = []
    first = DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), bucket_size=2, after_round=seen.append)
    rounds(first, app(), 1)
    gone, alone = seen[0].buckets[0]

    def change(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        if client == gone:
            raise RuntimeError("gone")

    strategy = DefendedStrategy(
        fedavg(), Mean(), secure_sum=Ckks(), bucket_size=2, after_round=seen.append, on_client_failure="skip"
    )
    final = rounds(strategy, app(change), 1)
    assert seen[1].buckets == seen[0].buckets[1:]
    assert set(seen[1].faults) == {gone, alone}
    assert "left alone in its sum" in seen[1].faults[alone]
    others = [step_of(client) for client in range(CLIENTS) if client not in (gone, alone)]
    np.testing.assert_allclose(final["w"], START["w"] + np.mean(others, axis=0), atol=2**-23)


@pytest.mark.parametrize(
    "inner",
    [
        fedavg,
        lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=0.5, server_momentum=0.9),
        lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.9),
        lambda: FedAdam(fraction_evaluate=0.0, eta=0.1),
        lambda: FedYogi(fraction_evaluate=0.0, eta=0.1),
    ],
    ids=["FedAvg", "FedAvgM, rate 0.5", "FedAvgM", "FedAdam", "FedYogi"],
)
def test_a_repair_in_the_loop_stands(inner: Callable[[], FedAvg]) -> None:
    """Nobody moves, the hook sets all weights to 5 after round 1: they are 5 from then on."""

    def rest(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        arrays["w"] -= step_of(client)

    seen: list[Outcome] = []

    def repair(outcome: Outcome) -> Any:
        seen.append(outcome)
        return Replacement(weights=np.full_like(outcome.weights, 5.0)) if outcome.round == 1 else None

    rounds(DefendedStrategy(inner(), Mean(), after_round=repair), app(rest), 3)
    for outcome in seen[1:]:
        np.testing.assert_allclose(outcome.weights, 5.0, atol=1e-4)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.9),
        lambda: FedAdam(fraction_evaluate=0.0, eta=0.1),
    ],
    ids=["FedAvgM", "FedAdam"],
)
def test_after_a_repair_the_server_optimizer_keeps_or_forgets(inner: Callable[[], FedAvg], reset: bool) -> None:
    """Everybody moves up in round 1, which the hook undoes, and rests in round 2: only kept momentum moves then."""
    turn = 0

    def once(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        arrays["w"] += (1.0 if turn == 0 else 0.0) - step_of(client)

    seen: list[Outcome] = []

    def repair(outcome: Outcome) -> Any:
        nonlocal turn
        turn += 1
        seen.append(outcome)
        return Replacement(weights=outcome.start, reset_optimizer=reset) if outcome.round == 1 else None

    rounds(DefendedStrategy(inner(), Mean(), after_round=repair), app(once), 2)
    moved = np.abs(seen[1].weights - seen[1].start).max()
    assert moved < 1e-6 if reset else moved > 0.01


@pytest.mark.usefixtures("agent")
def test_weights_are_the_same_in_the_clear_and_encrypted() -> None:
    def boast(client: int, arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
        metrics["num-examples"] = 3500 if client == 0 else 35

    weighing = Weighing(weighting="examples", average_examples=35.0, largest=2.0)
    plain = rounds(DefendedStrategy(fedavg(), Mean(), weighing=weighing), app(boast), 1)
    encrypted = rounds(DefendedStrategy(fedavg(), Mean(), weighing=weighing, secure_sum=Ckks()), app(boast), 1)
    np.testing.assert_array_equal(plain["w"], encrypted["w"])


@pytest.mark.usefixtures("agent")
def test_under_encryption_the_default_is_one_sum() -> None:
    seen: list[Outcome] = []
    rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), after_round=seen.append), app(), 1)
    assert seen[0].buckets == ((0, 1, 2, 3, 4, 5),)


def test_a_grid_too_fine_for_the_noise_is_refused() -> None:
    with pytest.raises(SecureSumFailed, match=r"secure_sum\.grid_bits: half a grid step"):
        rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(grid_bits=32)), app(), 1)


def header(shape: str, order: str = "False", version: int = 1) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


HOSTILE = {
    "a broken header": b"\x93NUMPY\x01\x00\x04\x00{{((",
    "a huge shape": header("(10000000000,)"),
    "a huge shape in Fortran order": header("(10000000000, 2)", "True"),
    "a huge shape, version 2": header("(10000000000,)", version=2),
    "more than fits an integer": header("(10**30,)".replace("10**30", "1" + "0" * 30)),
    "a negative shape": header("(-1, 4)"),
    "a boolean shape": header("(True, 12)") + bytes(44),
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_bytes_that_lie_are_the_clients_failure(data: bytes) -> None:
    from flwr.app import Array

    original = view_all

    def lie(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["arrays"]["w"] = Array("float32", (3, 4), "numpy.ndarray", data)
        return reply

    toy = ClientApp(mods=[lie])

    @toy.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array.copy() for name, array in original(message.content["arrays"]).items()}
        content = RecordDict({"arrays": pack_all(arrays), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    seen: list[Outcome] = []
    rounds(DefendedStrategy(fedavg(), Mean(), on_client_failure="skip", after_round=seen.append), toy, 1)
    assert list(seen[0].faults) == [2]
    assert "no npy array" in seen[0].faults[2]


@pytest.mark.parametrize("claim", [[1, 2], 10**400, float("nan"), -1.0, 0])
def test_a_claim_that_is_no_number_is_the_clients_failure(claim: Any) -> None:
    from flwr.clientapp.typing import ClientAppCallable

    def claiming(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            dict.__setitem__(reply.content["metrics"]._data, "num-examples", claim)  # type: ignore[attr-defined]
        return reply

    toy = app()
    spoiled = ClientApp(mods=[claiming])
    spoiled.train()(toy)
    weighing = Weighing(weighting="examples", average_examples=35.0)
    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), weighing=weighing, on_client_failure="skip", after_round=seen.append)
    rounds(strategy, spoiled, 1)
    assert list(seen[0].faults) == [2]


@pytest.mark.usefixtures("agent")
def test_a_ciphertext_of_another_length_does_not_push_the_others_out() -> None:
    from fedbd.crypto.agent_client import KeyAgent

    def longer(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 0:
            with KeyAgent(os.environ["FEDBD_KEY_AGENT"]) as agent:
                blob = agent.encrypt(np.zeros(20, np.int64))
            reply.content[CIPHERTEXT] = pack_all({"row": np.frombuffer(blob, np.uint8)})
        return reply

    toy = app()
    wrapped = ClientApp(mods=[longer])
    wrapped.train()(toy)
    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), on_client_failure="skip", after_round=seen.append)
    rounds(strategy, wrapped, 1)
    assert list(seen[0].faults) == [0]
    assert "must hold 18 values, got 20" in seen[0].faults[0]


LIES = {
    "noise that is no number": lambda reply: reply.update({"noise": MetricRecord({"largest": float("nan")})}),
    "no rows": lambda reply: reply.pop(CIPHERTEXT),
    "rows of other buckets": lambda reply: reply.update({CIPHERTEXT: pack_all({"7": np.zeros(18, np.int64)})}),
    "rows of another type": lambda reply: reply.update({CIPHERTEXT: pack_all({"0": np.zeros(18)})}),
}


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
def test_a_decryptor_is_not_believed(lie: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbd.flower import mods

    answer, liars = mods._answer, []

    def lying(content: RecordDict, context: Context) -> RecordDict:
        reply = answer(content, context)
        if content[mods.PROTOCOL]["kind"] == "decrypt" and not liars:
            liars.append(context.node_config["partition-id"])
            lie(reply)
        return reply

    monkeypatch.setattr(mods, "_answer", lying)
    with pytest.raises(SecureSumFailed, match=r"round 1: client \d, asked to decrypt, sent no sums"):
        rounds(DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks()), app(), 1)
    liars.clear()
    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), secure_sum=Ckks(), on_client_failure="skip", after_round=seen.append)
    rounds(strategy, app(), 1)  # another client is asked in its place
    assert len(seen[0].decryptors) == 2
    assert liars[0] not in seen[0].decryptors


def test_what_flower_says_for_a_lost_node_is_put_down_to_its_client() -> None:
    from flwr.app import Error

    from fedbd.flower.proxies import OrderedGrid

    class Losing(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            for reply in super().pull_messages(message_ids):
                if self.partition_of(reply.metadata.src_node_id) == 3:
                    request = Message(RecordDict(), dst_node_id=1, message_type="train")  # Flower's SuperLink is node 1
                    request.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
                    yield Message(Error(5, "Node Unavailable"), reply_to=request)
                    continue
                yield reply

    seen: list[Outcome] = []
    strategy = DefendedStrategy(fedavg(), Mean(), on_client_failure="skip", after_round=seen.append)
    toy = app()
    with SerialExecutor(lambda: toy) as executor:
        grid = OrderedGrid(Losing(executor, CLIENTS), CLIENTS)
        strategy.start(grid, pack_all(START), num_rounds=1, timeout=30)
    assert seen[0].faults == {3: "Node Unavailable"}
