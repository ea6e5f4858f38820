"""DefendedStrategy: wraps a Flower strategy, and is one.

Clients send full local weights, as Flower's do. The strategy draws the cohort, folds the replies into exact sums
(encrypted ones by a key-less evaluator), asks key-holding clients for decryption, applies the aggregation rule, and
hands the inner strategy one synthetic reply: the global weights plus ``server_rate`` times the aggregate. What happens
after that (cleanup, detection, evaluation, the record) is the ``after_round`` hook's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Result, Strategy
from torch import nn

from fedbd.crypto.ckks import Evaluator
from fedbd.crypto.grid import GRID_BITS
from fedbd.errors import ClientFailed, Problem, RunFailed, SecureSumFailed, UserError
from fedbd.flower.arrays import pack_all, payload_bytes, view_all
from fedbd.flower.cohorts import cohort_of, sums_seen, verdict
from fedbd.flower.decryption import Opened, decrypted
from fedbd.flower.failures import NO_REPLY, named
from fedbd.flower.folding import Fold
from fedbd.flower.mods import SECURE
from fedbd.flower.outcome import Outcome, Replacement
from fedbd.flower.proxies import CohortGrid, OrderedGrid
from fedbd.flower.saving import restore_strategy, strategy_state
from fedbd.params import Layout, is_statistic, join, layout_of, split
from fedbd.seeding import numpy_rng, torch_rng
from fedbd.sums import bucket_of
from fedbd.types import Aggregate, Aggregator, Memory, Need, Notes, TrustedData, Vector
from fedbd.weighing import Weighing

MEAN_BASED = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)


MOMENTS = ("momentum_vector", "m_t", "v_t")
"""Where Flower's strategies keep momentum and moments; None before their first step."""

AfterRound = Callable[[Outcome], Replacement | None]
"""Called after each round; may return other weights for the next round to start from (a cleanup in the loop)."""


@dataclass
class _Round:
    number: int
    cohort: tuple[int, ...]
    arrays: dict[str, Any]
    layout: Layout
    fold: Fold
    grid: OrderedGrid
    started: float
    bytes_down: int = 0


@dataclass
class DefendedStrategy(Strategy):
    """A Flower strategy with secure sums, robust aggregation and a hook for what follows.

    Attributes:
        strategy: A mean-based Flower strategy (or a class that declares ``mean_only = True``).
        aggregation: The aggregation rule.
        secure_sum: The encryption's parameters (``fedbd.crypto.ckks.Ckks``); None: plain updates.
        bucket_size: Clients per bucket, 1 for single updates, None for one sum; 0: one sum under encryption, else
            single updates.
        server_rate: Factor on the aggregate.
        seed: Decides cohorts, buckets and decryptors.
        cohort: Round -> participating partitions; None: everybody.
        clients: Number of partitions to wait for; None: whoever is there.
        weighing: How much a client counts.
        on_client_failure: ``fail`` ends the run with the reason, ``skip`` goes on without the client.
        trusted: Trusted data for rules that need them.
        build: Makes a model of flat weights, for rules that need one; see ``Cohort.build``.
        after_round: See ``AfterRound``.
        timeout: Seconds for one exchange.
        frozen: Names of entries that stay as they are, whatever clients send (BatchNorm that is frozen).
        memory: What the aggregation rule remembers.
        done: Rounds that lie behind: Flower's ``start`` counts from 1, and a run that is taken up again goes on from
            here (``load_state_dict`` sets it).
    """

    strategy: Strategy
    aggregation: Aggregator
    secure_sum: Any = None
    bucket_size: int | None = 0
    server_rate: float = 1.0
    seed: int = 0
    cohort: Callable[[int], Sequence[int]] | None = None
    clients: int | None = None
    weighing: Weighing = field(default_factory=Weighing)
    on_client_failure: str = "fail"
    trusted: TrustedData | None = None
    build: Callable[[Vector], nn.Module] | None = None
    after_round: AfterRound | None = None
    timeout: float = 3600.0
    frozen: tuple[str, ...] = ()
    memory: Memory = field(default_factory=dict)
    done: int = 0
    _round: _Round | None = None

    def __post_init__(self) -> None:
        """Refuse an inner strategy that does not work on a mean."""
        kind = type(self.strategy)
        if kind not in MEAN_BASED and not getattr(self.strategy, "mean_only", False):
            known = ", ".join(cls.__name__ for cls in MEAN_BASED)
            problem = Problem(
                path="strategy",
                expected=f"must work on the mean of updates ({known}, or a class with mean_only = True)",
                got=kind.__name__,
                remedy="a rule over single updates belongs into aggregation",
            )
            raise UserError([problem])
        if self.bucket_size == 0:
            self.bucket_size = 1 if self.secure_sum is None else None
        for name, value in (("min_train_nodes", 1), ("min_available_nodes", 1), ("fraction_train", 1.0)):
            if hasattr(self.strategy, name):  # cohorts are ours to draw; the inner strategy takes all it is shown
                setattr(self.strategy, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on: values and arrays that ``fedbd.records.saved_state`` can save.

        Raises:
            Unsaveable: If the inner strategy keeps what no checkpoint can hold.
        """
        return {"memory": dict(self.memory), "strategy": strategy_state(self.strategy)}

    def load_state_dict(self, state: Mapping[str, Any], done: int) -> None:
        """Take up what ``state_dict`` returned after round ``done``; the next round of ``start`` is the one after."""
        self.memory = state["memory"]
        restore_strategy(self.strategy, state["strategy"])
        self.done = done

    def summary(self) -> None:
        """Log the inner strategy's summary."""
        self.strategy.summary()

    def start(  # noqa: D102 - Flower's own docstring
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        ordered = grid if isinstance(grid, OrderedGrid) else OrderedGrid(grid, self.clients)
        return super().start(ordered, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and let the inner strategy address it."""
        server_round += self.done
        ordered = grid if isinstance(grid, OrderedGrid) else OrderedGrid(grid, self.clients)
        nodes = ordered.nodes()
        cohort = tuple(self.cohort(server_round)) if self.cohort is not None else tuple(sorted(nodes))
        start = view_all(arrays)
        layout = layout_of(start)
        fold = self._new_fold(server_round, cohort, join(start, layout), layout)
        now = _Round(server_round, cohort, start, layout, fold, ordered, time.perf_counter())
        messages = list(
            self.strategy.configure_train(
                server_round, arrays, config, CohortGrid(ordered, [nodes[client] for client in cohort])
            )
        )
        for message in messages:
            if self.secure_sum is not None:
                message.content[SECURE] = self._secure_record(server_round, fold)
            now.bytes_down += payload_bytes(message.content)
        self._round = now
        ordered.on_reply = self._on_reply
        return sorted(messages, key=lambda message: ordered.partition(message.metadata.dst_node_id))

    def _new_fold(self, round_: int, cohort: tuple[int, ...], start: Vector, layout: Layout) -> Fold:
        order = numpy_rng(self.seed, "buckets", round_).permutation(len(cohort))
        size = self.bucket_size
        if self.secure_sum is None and Need.INDIVIDUAL not in self.aggregation.needs:
            size = None  # nobody looks at single rows: one running sum is enough
        bucket = {client: bucket_of(i, len(cohort), size, order) for i, client in enumerate(cohort)}
        evaluator = None
        if self.secure_sum is not None:
            for name, sentence in self.secure_sum.problems(max(Counter(bucket.values()).values())):
                raise SecureSumFailed(f"round {round_}: secure_sum.{name}: {sentence}")
            evaluator = Evaluator(self.secure_sum)
        return Fold(layout, start, bucket, self.weighing, evaluator, self._bits)

    @property
    def _bits(self) -> int:
        return int(self.secure_sum.grid_bits) if self.secure_sum is not None else GRID_BITS

    def _secure_record(self, round_: int, fold: Fold) -> ConfigRecord:
        most = max(Counter(fold.bucket.values()).values())
        record: dict[str, Any] = {
            "round": round_,
            "weighting": self.weighing.weighting,
            "average-examples": self.weighing.average_examples,
            "largest-weight": self.weighing.largest,
            "largest": self.secure_sum.largest(most),
            "grid-bits": self._bits,
        }
        return ConfigRecord(record)

    def _on_reply(self, client: int, reply: Message) -> Message:
        """Fold a train reply at once and keep only its envelope."""
        if self._round is None:
            return reply
        started = time.perf_counter()
        self._round.fold.add(client, reply)
        self._round.fold.seconds += time.perf_counter() - started
        if not reply.has_error():
            reply.content = RecordDict()
        return reply

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decrypt, aggregate, step the inner strategy, and call the hook.

        Raises:
            ClientFailed: If a client failed and ``on_client_failure`` is ``fail``, or nobody is left.
            SecureSumFailed: If the decryptions are not there or disagree.
        """
        server_round += self.done
        now = self._round
        if now is None or now.number != server_round:
            raise RunFailed("aggregate_train was called without its configure_train")
        now.grid.on_reply, self._round = None, None
        for reply in replies:  # a caller with a loop of its own: nothing is folded twice
            now.fold.add(now.grid.partition_of_reply(reply), reply)
        self._check(now)
        trained = time.perf_counter()
        totals, answered, failed, noise, extra = self._opened(now)
        opened = time.perf_counter()
        aggregate, notes = self._aggregate(now, totals)
        accepted, rejected = verdict(now.fold, totals, aggregate)
        arrays = self._step(server_round, now, aggregate.delta)
        weights = join(view_all(arrays), now.layout)
        seconds = {
            "train": trained - now.started - now.fold.seconds,
            "decrypt": opened - trained,
            "aggregate": time.perf_counter() - opened + now.fold.seconds,
        }
        outcome = Outcome(
            round=server_round,
            participants=now.cohort,
            accepted=accepted,
            rejected=rejected,
            faults=dict(sorted({**now.fold.rejected, **failed}.items())),
            buckets=sums_seen(now.fold),
            decryptors=answered,
            asked=tuple(sorted([*answered, *failed])),
            start=now.fold.start,
            weights=weights,
            seconds=seconds,
            bytes_up=now.fold.bytes_up + extra[0],
            bytes_down=now.bytes_down + extra[1],
            ciphertext_bytes=now.fold.ciphertext_bytes,
            noise=noise,
            totals=totals,
            notes=notes,
        )
        replaced = self.after_round(outcome) if self.after_round is not None else None
        if replaced is not None:
            arrays = self._replaced(now, replaced)
        return arrays, MetricRecord({"accepted": len(accepted)})

    def _replaced(self, now: _Round, replaced: Replacement) -> ArrayRecord:
        """Make the inner strategy go on from a repaired model."""
        arrays = self._arrays(now, replaced.weights)
        if isinstance(getattr(self.strategy, "current_arrays", None), ArrayRecord):
            # FedAvgM steps from the weights that it made itself, and would undo the repair.
            self.strategy.current_arrays = arrays  # type: ignore[attr-defined]
        if replaced.reset_optimizer:
            for name in MOMENTS:
                if hasattr(self.strategy, name):
                    setattr(self.strategy, name, None)
        return arrays

    def _opened(self, now: _Round) -> Opened:
        if self.secure_sum is not None:
            largest = max(Counter(now.fold.bucket[client] for client in now.fold.accepted).values())
            bound = float(self.secure_sum.noise_bound(largest))
            patient = self.on_client_failure == "skip"
            return decrypted(now.grid, now.fold, now.number, self.seed, self.timeout, bound, others=patient)
        return Opened(dict(sorted(now.fold.totals.items())), (), {}, None, (0, 0))

    def _check(self, now: _Round) -> None:
        fold = now.fold
        for client in sorted(set(now.cohort).difference(fold.accepted, fold.rejected)):
            fold.rejected[client] = f"{NO_REPLY}\nwaited for {self.timeout:g} s"
        if fold.rejected and self.on_client_failure == "fail":
            client, reason = min(fold.rejected.items())
            more = f" (and {len(fold.rejected) - 1} more clients)" if len(fold.rejected) > 1 else ""
            first, below, frames = reason.partition("\n")  # a client's own code brings the frames of its error
            raise ClientFailed(f"round {now.number}: client {client}: {first}{more}{below}{frames}")
        if self.secure_sum is not None and self.bucket_size != 1:
            fold.leave_singles_closed()
        if not fold.accepted:
            raise ClientFailed(f"round {now.number}: no client is left of {len(now.cohort)}{named(fold.rejected)}")

    def _aggregate(self, now: _Round, totals: dict[int, Any]) -> tuple[Aggregate, Notes]:
        individual = Need.INDIVIDUAL in self.aggregation.needs
        if individual and len(totals) < self.aggregation.minimum_rows:
            few = f"{len(totals)} rows are left, the rule needs {self.aggregation.minimum_rows}"
            raise ClientFailed(f"round {now.number}: {few}{named(now.fold.rejected)}")
        stable = individual and self.bucket_size == 1
        cohort = cohort_of(now.fold, totals, rows=individual, ids=stable, trusted=self.trusted, build=self.build)
        rng = torch_rng(self.seed, "aggregation", now.number)
        aggregate, self.memory, notes = self.aggregation.aggregate(cohort, self.memory, rng)
        return aggregate, notes

    def _arrays(self, now: _Round, weights: Vector) -> ArrayRecord:
        named: dict[str, Any] = dict(split(weights, now.layout))
        return pack_all({name: named.get(name, array) for name, array in now.arrays.items()})

    def _step(self, server_round: int, now: _Round, delta: Vector) -> ArrayRecord:
        """Hand the inner strategy one synthetic reply; integer buffers keep the global model's values.

        BatchNorm's running statistics follow the aggregate, at most all the way: a server rate or an optimizer that
        carries a variance past it can make it negative, and the model NaN.
        """
        if self.frozen:
            delta = delta.copy()
            for name, part in split(delta, now.layout).items():
                part[...] = 0 if name in self.frozen else part
        proposed = (now.fold.start + np.float32(self.server_rate) * delta).astype(np.float32)
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": self._arrays(now, proposed), "metrics": metrics})
        node = now.grid.nodes()[now.cohort[0]]
        request = Message(RecordDict(), dst_node_id=node, message_type="train")
        reply = Message(content, reply_to=request)
        arrays, _ = self.strategy.aggregate_train(server_round, [reply])
        if arrays is None:
            raise RunFailed(f"round {server_round}: {type(self.strategy).__name__} returned no weights")
        after = view_all(arrays)
        followed = split(proposed if self.server_rate <= 1 else now.fold.start + delta, now.layout)
        stepped = {
            name: followed[name] if is_statistic(name) else np.asarray(after[name], np.float32)
            for name in now.layout.names
        }
        return self._arrays(now, join(stepped, now.layout))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy ask for federated evaluation, over all nodes."""
        return self.strategy.configure_evaluate(server_round + self.done, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the inner strategy aggregate evaluation replies."""
        return self.strategy.aggregate_evaluate(server_round + self.done, replies)
