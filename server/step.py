"""What follows a round's aggregation, without Flower: cleanup, detection, evaluation, and the line in the record."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fedbd.defenses.cleanup.channel_masks import recalibrate
from fedbd.faults import simulated
from fedbd.flower.failures import first_line
from fedbd.flower.outcome import Replacement
from fedbd.metrics import Evaluation, evaluate
from fedbd.models.checkpoint import save_safetensors
from fedbd.params import assign, flatten, sha256
from fedbd.prepared import Prepared
from fedbd.records.record import RunFolder, round_record
from fedbd.roles import roles_in
from fedbd.targets import one_label
from fedbd.types import Clues, Notes, Role, Vector

from .cleaning import Cleaned, clean
from .detecting import detect, own_data
from .masking import Mask, apply_mask, joined, mask_from, mask_of, mask_state
from .starting_point import StartingPoint

MODELS = "models"


@dataclass
class Rounds:
    """Writes one line per round; called by the strategy after each aggregation.

    Attributes:
        prepared: The scenario with its data.
        folder: The run's folder.
        twin: The attack-free twin's lines by round; empty where there is none.
        collect: Round -> what clients noted outside the protocol.
        checksum: Row -> linear checksum (see ``fedbd.flower.mods.checksum``).
        lines: The lines so far.
        noise: Largest distance of a decrypted value from the grid so far; None in the clear.
        repaired: By cleanup what it left behind when it last acted: where the re-learning test goes on from.
        unrepaired: By round that ``repaired`` names the model that no cleanup of it repaired: the test's controls.
        warmed: The model that the scenario's warm-up left, where it starts from one.
    """

    prepared: Prepared
    folder: RunFolder
    twin: Mapping[int, Notes]
    collect: Callable[[int], dict[int, dict[str, Any]]]
    checksum: Callable[[Any], int]
    lines: list[Notes] = field(default_factory=list)
    noise: float | None = None
    repaired: dict[str, StartingPoint] = field(default_factory=dict)
    unrepaired: dict[int, StartingPoint] = field(default_factory=dict)
    warmed: Path | None = None
    _reference: nn.Module | None = None
    _mask: Mask = field(default_factory=dict)
    _evaluated: dict[int, tuple[nn.Module, Evaluation]] = field(default_factory=dict)

    @cached_property
    def begun(self) -> nn.Module:
        """The model that the run starts from; to be left as it is."""
        return self.prepared.start_model(self.warmed)

    def start(self, weights: Vector) -> None:
        """Write round 0: the model that the run starts from."""
        started = time.perf_counter()
        model = self.model(weights)
        self._reference = model
        measured = self._measures(model, 0)
        seconds = {"evaluate": time.perf_counter() - started, "total": time.perf_counter() - started}
        self._write(
            {"round": 0, **measured, "weights_sha256": sha256(self.recorded(weights, model)), "seconds": seconds}
        )

    def after_round(self, outcome: Any) -> Replacement | None:
        """Clean, detect, evaluate and record a round (an ``fedbd.flower.strategy.Outcome``).

        Returns:
            Other weights for the next round to start from, if a cleanup in the loop was kept or has left a mask.
        """
        started = time.perf_counter()
        model = self.model(outcome.weights)
        apply_mask(model, self._mask)
        cleaned, served = self._clean(model, outcome.round)
        cleaned_at = time.perf_counter()
        detection = {
            plan.key: detect(self.prepared, plan, served, outcome.round)
            for plan in self.prepared.scenario.detection
            if plan.due(outcome.round) and plan.where == "incoming"
        }
        detected_at = time.perf_counter()
        same = served is model and not self._mask
        weights = outcome.weights if same else flatten(served)
        measured = self._measures(served, outcome.round)
        cleanup = self._cleanup_record(cleaned, outcome.round)
        observed = self.collect(outcome.round)
        detection |= own_data(self.prepared, outcome.round, observed)
        line = {
            "round": outcome.round,
            **self._who(outcome),
            **measured,
            "weights_sha256": sha256(self.recorded(weights, served)),
            **self._seen(outcome, observed),
            "cleanup": cleanup,
            "detection": detection,
            "notes": self._notes(outcome, observed),
        }
        now = time.perf_counter()
        encrypt = [notes["encrypt"]["seconds"] for notes in observed.values() if "encrypt" in notes]
        line["seconds"] = {
            "train": outcome.seconds["train"],
            "encrypt": sum(encrypt) if encrypt else None,
            "aggregate": outcome.seconds["aggregate"],
            "decrypt": outcome.seconds["decrypt"] if outcome.decryptors else None,
            "cleanup": cleaned_at - started,
            "detect": detected_at - cleaned_at,
            "evaluate": now - detected_at,
            "total": sum(outcome.seconds.values()) + now - started,
        }
        if outcome.noise is not None:
            self.noise = max(self.noise or 0.0, outcome.noise)
        self._write(line)
        self._keep(served, outcome.round)
        if same:
            return None
        reset = any(r.acted and r.plan.server_optimizer_state == "reset" for r, _ in cleaned)
        return Replacement(weights=weights, reset_optimizer=reset)

    @property
    def mask(self) -> Mask:
        """What cleanups with ``mask: persist`` have switched off for good."""
        return self._mask

    def state(self) -> Notes:
        """Return what later rounds need beside the lines, as values and arrays for a checkpoint."""
        reference = self._reference if self.prepared.scenario.cleanup else None
        return {
            "noise": self.noise,
            "mask": mask_state(self._mask),
            "reference": None if reference is None else self.prepared.sent(flatten(reference)),
            "repaired": {key: point.state() for key, point in self.repaired.items()},
            "unrepaired": {round_: point.state() for round_, point in self.unrepaired.items()},
        }

    def restore(self, lines: list[Notes], state: Mapping[str, Any]) -> None:
        """Go on after the last of ``lines`` with what ``state`` returned then."""
        self.lines = lines
        self.noise = state["noise"]
        self._mask = mask_from(state["mask"])
        self._reference = None if state["reference"] is None else self.model(state["reference"])
        self.repaired = {key: StartingPoint.from_state(point) for key, point in state["repaired"].items()}
        self.unrepaired = {round_: StartingPoint.from_state(point) for round_, point in state["unrepaired"].items()}

    def recorded(self, weights: Vector, model: nn.Module | None = None) -> Vector:
        """Return what a record's hash is of: all float weights of the model that ``weights``, which travel, make.

        Args:
            weights: (D,) float32.
            model: That model, if it is at hand.
        """
        return flatten(model or self.model(weights)) if self.prepared.own_names else weights

    def _keep(self, model: nn.Module, round_: int) -> None:
        if round_ in (self.prepared.scenario.evaluation.keep_models or ()):
            place = self.folder.path / MODELS
            place.mkdir(exist_ok=True)
            save_safetensors(model, place / f"round-{round_}.safetensors")

    def model(self, weights: Vector) -> nn.Module:
        """Return a new model with the weights that travel, in eval mode.

        What clients keep to themselves (``batch_norm: local``) it has from the start, and its running statistics are
        those of the trusted data to fit on, under these weights.
        """
        if not self.prepared.own_names:
            model = self.prepared.new_model()
            assign(model, weights)
            return model.eval()
        model = copy.deepcopy(self.begun)
        assign(model, self.prepared.whole(weights, self.prepared.own_entries(model)))
        trusted = self.prepared.federation.trusted
        if trusted is not None:  # ``batch_norm: local`` is refused without
            recalibrate(model, trusted.fit)
        return model.eval()

    def _evaluate(self, model: nn.Module) -> Evaluation:
        if id(model) not in self._evaluated:
            dataset = self.prepared.dataset
            found = evaluate(model, self.prepared.measured, self.prepared.triggers, dataset.classes)
            self._evaluated[id(model)] = (model, found)  # the model too: its id must stay taken
        return self._evaluated[id(model)][1]

    def _measures(self, model: nn.Module, round_: int) -> Notes:
        if not self.prepared.scenario.measured(round_):
            return {}  # the record's names are all there, as null
        found = self._evaluate(model)
        twin = self.twin.get(round_)
        # A twin that predicts one class would give a floor of 0 or 1, and say nothing of the trigger.
        floors = twin["per_attack"] if twin and not twin.get("collapsed") else {}
        per_attack = {
            key: {**values, "attack_success_floor": floors.get(key, {}).get("attack_success")}
            for key, values in found.per_attack.items()
        }
        worst = max(per_attack.values(), key=lambda values: values["attack_success"] or 0.0, default=None)
        return {
            "clean_accuracy": found.clean_accuracy,
            "clean_accuracy_without_target": found.clean_accuracy_without_target,
            "attack_success": found.attack_success,
            "attack_success_floor": worst["attack_success_floor"] if worst else None,
            "per_attack": per_attack,
            "robust_accuracy": found.robust_accuracy,
            "collapsed": found.collapsed,
            "evaluated_samples": found.evaluated_samples,
        }

    def _clean(self, model: nn.Module, round_: int) -> tuple[list[tuple[Cleaned, nn.Module]], nn.Module]:
        """Return each due cleanup with the model that it got, and the model that is served afterwards."""
        clues, served, held = Clues(reference=self._reference), model, self._mask
        done: list[tuple[Cleaned, nn.Module]] = []
        for plan in self.prepared.scenario.cleanup:
            if not plan.due(round_):
                continue
            result = clean(self.prepared, plan, served, round_, clues, self._mask)
            clues = result.clues
            done.append((result, served))
            mask = mask_of(result.model, clues.pruned) if result.kept else {}
            if plan.mode == "in_loop":
                served = result.model
                self._mask = joined(self._mask, mask if plan.mask == "persist" else {})
                apply_mask(served, self._mask)  # a later method trains what an earlier one switched off
            if result.repairs and result.acted and self.prepared.scenario.evaluation.relearn is not None:
                kept_off = joined(self._mask, mask if plan.mask == "persist" else {})
                self.repaired[plan.key] = StartingPoint(round=round_, weights=flatten(result.model), mask=kept_off)
                self.unrepaired[round_] = StartingPoint(round=round_, weights=flatten(model), mask=held)
        used = {point.round for point in self.repaired.values()}
        self.unrepaired = {number: point for number, point in self.unrepaired.items() if number in used}
        return done, served

    def _cleanup_record(self, cleaned: list[tuple[Cleaned, nn.Module]], round_: int) -> Notes:
        record: Notes = {}
        for result, given in cleaned:
            before = self._evaluate(given) if result.repairs else None
            after = self._evaluate(result.model) if result.repairs else None
            twin = self.twin.get(round_, {}).get("cleanup", {}).get(result.plan.key)
            record[result.plan.key] = {
                "mode": result.plan.mode,
                "acted": result.acted,
                "before": before and before.brief(),
                "after": after and after.brief(),
                "twin_after": twin["after"] if twin else None,
                "seconds": result.seconds,
                "notes": result.notes,
            }
            wanted = {one_label(attack.target) for attack in self.prepared.scenario.attacks if attack.enabled}
            truth = wanted - {None}  # all-to-all no label is the right one, and none is wrong
            if result.notes.get("target") is not None and truth:
                record[result.plan.key]["target_is_right"] = result.notes["target"] in truth
        return record

    def _who(self, outcome: Any) -> Notes:
        roles = roles_in(self.prepared.scenario, outcome.round, outcome.participants)
        return {
            "participants": list(outcome.participants),
            "attackers": [client for client, role in roles.items() if role is Role.ATTACKER],
            "polluted": [client for client, role in roles.items() if role is Role.POLLUTED],
            "accepted": list(outcome.accepted),
            "rejected": None if outcome.rejected is None else list(outcome.rejected),
        }

    def _seen(self, outcome: Any, observed: dict[int, dict[str, Any]]) -> Notes:
        scenario = self.prepared.scenario
        roles = roles_in(scenario, outcome.round, outcome.participants)
        attackers = {client for client, attack in self.prepared.assigned.items() if attack.role == "attacker"}
        honest = [sum(client not in attackers for client in group) for group in outcome.buckets]
        bad = [any(roles[client] is not Role.HONEST for client in group) for group in outcome.buckets]
        encrypted = scenario.secure_sum is not None
        single = not encrypted or all(len(group) == 1 for group in outcome.buckets)
        kind = "updates" if single else "sum" if scenario.buckets == 1 else "bucket_sums"
        exact = self._exact(outcome, observed) if encrypted else True
        return {
            "server_saw": {
                "kind": kind,
                "clients_per_sum": [len(group) for group in outcome.buckets],
                "honest_per_sum_min": min([count for count in honest if count] or [0]),
                "contaminated_sums": sum(bad),
                "stable_ids": True,
                "ciphertext_bytes": outcome.ciphertext_bytes,
                "weighting": scenario.cohort.weighting,
            },
            "clients_saw": [{"client": client, "kind": kind} for client in outcome.asked],
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
            "cipher_error": (0.0 if exact else None) if encrypted else None,
            "bit_exact": exact,
        }

    def _exact(self, outcome: Any, observed: dict[int, dict[str, Any]]) -> bool | None:
        """Compare the opened sums with the clients' own checksums, outside the protocol; None where there are none."""
        answered = [client for group in outcome.buckets for client in group]
        sent = [observed.get(client, {}).get("encrypt", {}).get("checksum") for client in answered]
        if any(value is None for value in sent):
            return None
        opened = sum(self.checksum(total) for total in outcome.totals.values())
        return (sum(sent) - opened) % 2**64 == 0

    def _notes(self, outcome: Any, observed: dict[int, dict[str, Any]]) -> Notes:
        notes: Notes = {"aggregation": outcome.notes, "clients": _client_notes(observed)}
        twin = self.twin.get(outcome.round)
        if twin:
            notes["twin"] = {"clean_accuracy": twin["clean_accuracy"]}
        if outcome.faults:
            notes["faults"] = {str(client): first_line(reason) for client, reason in outcome.faults.items()}
        acted = simulated(self.prepared.scenario, outcome.round, outcome.participants, outcome.asked)
        if acted:
            notes["simulated_faults"] = {str(client): stages for client, stages in acted.items()}
        if self.prepared.scenario.secure_sum is not None:
            largest = max(len(group) for group in outcome.buckets)
            notes["secure_sum"] = {"noise_bound": self.prepared.scenario.secure_sum.impl.noise_bound(largest)}
        return notes

    def _write(self, line: Notes) -> None:
        line = round_record(**line)
        self.folder.append_round(line)
        self._evaluated.clear()
        self.lines.append(line)


def _client_notes(observed: dict[int, dict[str, Any]]) -> Notes:
    """Return what clients noted of their training, without times and detections; clients as text keys, as in JSON."""
    return {
        str(client): {name: value for name, value in notes["train"].items() if name not in ("seconds", "detection")}
        for client, notes in observed.items()
        if "train" in notes
    }
