from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from fedbd.defenses.cleanup.unlearning import unlearn
from fedbd.defenses.detection import rnp_unlearned
from fedbd.defenses.detection.rnp_unlearned import RNPUnlearned
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.training import TrainingPlan
from fedbd.types import Detector, Samples


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def incoming(backdoored: Any) -> tuple[Samples, np.ndarray]:
    """Clean and triggered test images with the labels that the backdoored model gives them."""
    images = torch.cat([backdoored.clean.images, backdoored.triggered.images])
    mixed = Samples(images, torch.zeros(len(images), dtype=torch.int64))
    labels = torch.from_numpy(predict(backdoored.model, mixed))
    return Samples(images, labels), np.arange(len(images)) >= len(backdoored.clean)


def pairs_won(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the AUC by counting pairs."""
    hot, cold = scores[positive][:, None], scores[~positive][None]
    return float(((hot > cold) + 0.5 * (hot == cold)).mean())


@pytest.mark.parametrize("by", ["logit", "loss"])
def test_triggered_inputs_score_higher(by: str, backdoored: Any) -> None:
    data, triggered = incoming(backdoored)
    scores, notes = RNPUnlearned(by=by, batch_size=32).score(backdoored.model, data, backdoored.trusted, generator())  # type: ignore[arg-type]
    assert scores.shape == (len(data),)
    assert scores.dtype == np.float64
    assert pairs_won(scores, triggered) > 0.9
    assert notes["target"] == 0
    assert notes["unlearning"]["reached"]


def unlearned_logits(backdoored: Any) -> tuple[Samples, torch.Tensor]:
    """Return the incoming inputs and what the unlearned model says of them, in float64."""
    data, _ = incoming(backdoored)
    plan = TrainingPlan(epochs=20, batch_size=32, lr=0.01, momentum=0.9, weight_decay=5e-4, lr_step=10)
    unlearned = unlearn(backdoored.model, backdoored.trusted.fit, plan, 0.2, generator()).model
    with torch.no_grad():
        out = unlearned(data.images.float() / 255).double()
    return data, out


def test_scores_are_the_unlearned_models_log_odds_of_the_given_label_ranked_as_its_loss(backdoored: Any) -> None:
    data, out = unlearned_logits(backdoored)
    by_loss, _ = RNPUnlearned(by="loss", batch_size=32).score(backdoored.model, data, backdoored.trusted, generator())
    for row, label, score in zip(out.tolist(), data.labels.tolist(), by_loss.tolist(), strict=True):
        others = row[:label] + row[label + 1 :]
        top = max(others)
        odds = top + math.log(sum(math.exp(value - top) for value in others)) - row[label]
        assert score == pytest.approx(-odds, abs=1e-3)
    losses = F.cross_entropy(out, data.labels, reduction="none").numpy()
    assert (np.diff(losses[np.argsort(by_loss)]) < 1e-3).all()  # the higher the score, the lower the loss


def test_losses_of_large_logits_do_not_tie(backdoored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = incoming(backdoored)
    large = torch.zeros(len(data), 10)
    large[:, 0] = torch.arange(len(data)) * 10.0 + 1000  # cross-entropy is 0 in float64 from 745 on
    monkeypatch.setattr(rnp_unlearned, "logits", lambda model, samples: large)
    zeros = Samples(data.images, torch.zeros_like(data.labels))
    scores, _ = RNPUnlearned(by="loss", batch_size=32).score(backdoored.model, zeros, backdoored.trusted, generator())
    assert (np.diff(scores) > 0).all()


def test_scores_by_logit_are_the_labels(backdoored: Any) -> None:
    data, out = unlearned_logits(backdoored)
    by_logit, _ = RNPUnlearned(batch_size=32).score(backdoored.model, data, backdoored.trusted, generator())
    assert np.allclose(by_logit, out[torch.arange(len(data)), data.labels].numpy(), atol=1e-4)


def test_the_label_is_counted_on_validation_data(backdoored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Samples] = []
    count = rnp_unlearned.modal_prediction
    monkeypatch.setattr(rnp_unlearned, "modal_prediction", lambda m, d: (seen.append(d), count(m, d))[1])
    data, _ = incoming(backdoored)
    RNPUnlearned(batch_size=32).score(backdoored.model, data, backdoored.trusted, generator())
    assert len(seen) == 1 and seen[0] is backdoored.trusted.validate


def test_the_model_is_left_untouched_and_the_generator_decides(backdoored: Any) -> None:
    data, _ = incoming(backdoored)
    before = {name: entry.numpy().tobytes() for name, entry in backdoored.model.state_dict().items()}
    detector = RNPUnlearned(batch_size=32)
    first, again = (detector.score(backdoored.model, data, backdoored.trusted, generator())[0] for _ in range(2))
    assert np.array_equal(first, again)
    assert {name: entry.numpy().tobytes() for name, entry in backdoored.model.state_dict().items()} == before


def test_refuses_without_trusted_data_or_where_nothing_is_unlearned(backdoored: Any) -> None:
    detector = RNPUnlearned(unlearn_epochs=1)
    assert isinstance(detector, Detector)
    assert detector.needs_trusted
    with pytest.raises(MethodRefused, match="trusted"):
        detector.score(backdoored.model, backdoored.clean, None, generator())
    with pytest.raises(MethodRefused, match="unlearn_epochs"):
        detector.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    with pytest.raises(MethodRefused, match="no samples"):
        detector.score(backdoored.model, backdoored.clean.subset(torch.arange(0)), backdoored.trusted, generator())
