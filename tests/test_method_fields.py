import re

import numpy as np
import pytest

from fedbd.config.schema import slots_of
from fedbd.defenses.cleanup import CLP, FLAIN, NAD, RNP, FineTune, LinfPruning, TriggerRecovery
from fedbd.defenses.local import ABL
from fedbd.errors import UserError
from fedbd.registry import METHODS, resolve

CLASSES = [resolve(kind, name, kind) for kind in METHODS if kind != "strategy" for name in METHODS[kind]]


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if slots_of(cls)], ids=lambda cls: cls.__name__)
def test_every_method_refuses_what_is_no_value_of_its_fields(cls: type) -> None:
    plain = [name for name, slot in slots_of(cls).items() if slot.shape == "plain"]
    with pytest.raises(UserError) as refused:
        cls(**{name: {"no": "value"} if name in plain else None for name in slots_of(cls)})
    assert {problem.path for problem in refused.value.problems} == set(plain) - {"arguments"}  # takes any mapping
    assert refused.value.heading == f"{cls.__name__} cannot be made of these fields:"


@pytest.mark.parametrize(
    ("cls", "fields", "says"),
    [
        (RNP, {"keep_within": 2}, "keep_within: must be <= 1, got 2"),
        (RNP, {"threshold": 50}, "threshold: must be < 1 or null, got 50"),
        (RNP, {"threshold": float("nan")}, "threshold: must be a finite number or null, got nan"),
        (RNP, {"batch_size": 0, "augment": "foo"}, "augment: must be none or crop_flip, got 'foo'"),
        (CLP, {"u": -3}, "u: must be >= 0, got -3"),
        (LinfPruning, {"knowledge": "inputz", "oracle": True}, "did you mean 'inputs'?"),
        (NAD, {"distance": "cosine"}, "distance: must be mse or l2, got 'cosine'"),
        (NAD, {"betas": (1, -1, 1)}, "betas[1]: must be >= 0, got -1"),
        (FineTune, {"lr": -1}, "lr: must be > 0, got -1"),
        (FLAIN, {"step": 0}, "step: must be > 0, got 0"),
        (TriggerRecovery, {"target": -1}, "target: must be >= 0 or null, got -1"),
        (ABL, {"control": "flood"}, "control: must be lga or flooding, got 'flood'; did you mean 'flooding'?"),
    ],
)
def test_wrong_values_are_refused_by_field(cls: type, fields: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        cls(**fields)
    assert len(refused.value.problems) == len([name for name in fields if name != "oracle"])


def test_values_of_numpy_and_whole_numbers_for_floats_are_taken() -> None:
    assert RNP(batch_size=np.int64(64), keep_within=np.float64(0.5), alpha=1).batch_size == 64
    with pytest.raises(UserError, match="batch_size: must be an integer"):
        RNP(batch_size=np.float64(64.0))


@pytest.mark.parametrize(
    ("cls", "fields", "says"),
    [
        (NAD, {"momentum": 0}, "nesterov: needs a momentum above 0"),
        (FLAIN, {"start": 0.5, "cap": 0.2}, "cap: must be at least start (0.5)"),
        (LinfPruning, {"oracle": True}, "oracle: must be false with knowledge: recovered"),
    ],
)
def test_what_fields_may_not_be_together_is_refused_too(cls: type, fields: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{cls.__name__} cannot be made of these fields:\n  {says}")):
        cls(**fields)
