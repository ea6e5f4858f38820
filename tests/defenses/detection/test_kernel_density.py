from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.neighbors import KernelDensity as Reference
from torch import nn

from fedbd.defenses.detection.kernel_density import FACTORS, KernelDensity, log_density
from fedbd.errors import MethodRefused
from fedbd.metrics import predict
from fedbd.models.taps import penultimate
from fedbd.types import Samples, TrustedData


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_log_density_is_a_mean_of_gaussians_even_far_away() -> None:
    points = np.array([[0.0, 0.0], [3.0, 4.0]])
    x = np.array([1.0, -2.0])
    squared = ((points - x) ** 2).sum(1)[None]
    wanted = logsumexp(norm.logpdf(points - x, scale=0.7).sum(1)) - np.log(2)
    assert log_density(squared, 0.7, 2)[0] == pytest.approx(wanted, rel=1e-12)
    far = log_density(np.array([[1e8], [2e8]]), 0.1, 2)
    assert np.isfinite(far).all()
    assert far[1] < far[0]


def features(model: nn.Module, samples: Samples) -> np.ndarray:
    return penultimate(model, samples, "test").double().numpy()


def scikit(model: nn.Module, trusted: Samples, bandwidth: float) -> dict[int, Reference]:
    points, labels = features(model, trusted), trusted.labels.numpy()
    return {c: Reference(bandwidth=bandwidth).fit(points[labels == c]) for c in np.unique(labels).tolist()}


def test_scores_are_those_of_scikit_learn_for_the_predicted_class(backdoored: Any) -> None:
    model, data = backdoored.model, backdoored.clean
    wrong = Samples(data.images, torch.full_like(data.labels, 9))  # the given label is not read
    scores, notes = KernelDensity(bandwidth=0.5).score(model, wrong, backdoored.trusted, generator())
    kdes = scikit(model, backdoored.trusted.fit, 0.5)
    points, predicted = features(model, data), predict(model, data)
    assert len(set(predicted.tolist())) > 1
    wanted = [-kdes[c].score_samples(point[None])[0] for point, c in zip(points, predicted.tolist(), strict=True)]
    assert np.allclose(scores, wanted, rtol=1e-6, atol=1e-6)
    assert (notes["bandwidth"], notes["bandwidth_chosen"], notes["dimensions"]) == (0.5, False, points.shape[1])
    assert sum(notes["trusted_per_class"].values()) == len(backdoored.trusted.fit)


def test_the_bandwidth_makes_held_out_clean_images_likeliest(backdoored: Any) -> None:
    model, trusted = backdoored.model, backdoored.trusted
    _, notes = KernelDensity().score(model, backdoored.clean, trusted, generator())

    def likelihood(bandwidth: float) -> float:
        kdes = scikit(model, trusted.fit, bandwidth)
        pairs = zip(features(model, trusted.validate), trusted.validate.labels.tolist(), strict=True)
        return float(np.mean([kdes[c].score_samples(point[None])[0] for point, c in pairs]))

    chosen = notes["bandwidth"]
    best = likelihood(chosen)
    assert notes["bandwidth_chosen"]
    assert notes["validation_mean"] == pytest.approx(-best, rel=1e-6)
    step = FACTORS[1] / FACTORS[0]
    assert best > max(likelihood(chosen * step), likelihood(chosen / step))


def test_what_lies_off_its_class_scores_higher(backdoored: Any) -> None:
    detector = KernelDensity()
    clean, _ = detector.score(backdoored.model, backdoored.clean, backdoored.trusted, generator())
    triggered, _ = detector.score(backdoored.model, backdoored.triggered, backdoored.trusted, generator())
    assert (triggered[:, None] > clean[None]).mean() > 0.6


def test_it_refuses_what_it_cannot_do(backdoored: Any) -> None:
    detector, model, trusted = KernelDensity(), backdoored.model, backdoored.trusted
    assert detector.needs_trusted
    assert detector.refusal(model) is None
    assert "`classifier`" in (detector.refusal(nn.Flatten()) or "")

    def only(samples: Samples, keep: torch.Tensor) -> Samples:
        return samples.subset(torch.nonzero(keep)[:, 0])

    one = TrustedData(only(trusted.fit, trusted.fit.labels == 1), trusted.validate, 10)
    without = TrustedData(only(trusted.fit, trusted.fit.labels != 4), trusted.validate, 10)
    for given, reason in [(None, "size: 500"), (one, "all of one"), (without, "predicted as class 4, .*every class")]:
        with pytest.raises(MethodRefused, match=reason):
            detector.score(model, backdoored.clean, given, generator())
    assert detector.refusal_on(model, trusted) is None
    assert "no trusted image to fit is of class 4; trust" in (detector.refusal_on(model, without) or "")
    assert detector.refusal_on(model, one) is None  # a run says that of all methods that need several
    apart = TrustedData(
        only(trusted.fit, trusted.fit.labels < 5), only(trusted.validate, trusted.validate.labels > 4), 10
    )
    low = only(backdoored.clean, torch.from_numpy(predict(model, backdoored.clean) < 5))
    with pytest.raises(MethodRefused, match="no bandwidth can be chosen"):
        detector.score(model, low, apart, generator())
    assert KernelDensity(bandwidth=1.0).score(model, low, apart, generator())[1]["validation_mean"] is None
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.block3.bn.weight.zero_()
        dead.block3.bn.bias.fill_(1)
    same = TrustedData(trusted.fit, trusted.validate, 10)
    with pytest.raises(MethodRefused, match="same features"):
        detector.score(dead, backdoored.clean, same, generator())
