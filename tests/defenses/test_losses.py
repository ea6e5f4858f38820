from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from fedbd.defenses.losses import cross_entropy, log_odds_against


def test_equals_log_sum_exp_minus_logit() -> None:
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.arange(200) % 7
    rows = logits.double().numpy()
    plain = [math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(rows, labels.tolist(), strict=True)]
    losses = cross_entropy(log_odds_against(logits, labels))
    assert losses.dtype == np.float64
    assert np.allclose(losses, plain, rtol=1e-10, atol=1e-13)


def test_log_odds_are_those_of_the_softmax_probability() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2])
    p = F.softmax(logits.double(), dim=1)[0, 2].item()
    assert np.isclose(log_odds_against(logits, labels)[0], math.log((1 - p) / p), rtol=1e-12)


def test_ranks_where_float32_cross_entropy_ties_at_zero() -> None:
    margins = torch.tensor([60.0, 20.0, 80.0, 30.0, 45.0])
    logits = torch.stack([margins, torch.zeros(5)], dim=1)
    labels = torch.zeros(5, dtype=torch.int64)
    assert (F.cross_entropy(logits, labels, reduction="none") == 0).sum() == 5
    losses = cross_entropy(log_odds_against(logits, labels))
    assert len(np.unique(losses)) == 5
    assert np.argsort(losses, kind="stable").tolist() == [2, 0, 4, 3, 1]
    # Even float64 cancels in the plain difference from a margin of about 37 on.
    assert (F.cross_entropy(logits.double(), labels, reduction="none") == 0).sum() == 3


def test_two_classes_with_huge_logits_stay_finite() -> None:
    losses = cross_entropy(log_odds_against(torch.tensor([[3e38, -3e38], [-3e38, 3e38]]), torch.tensor([0, 0])))
    assert losses[0] == 0
    assert np.isclose(losses[1], 6e38, rtol=1e-6)
