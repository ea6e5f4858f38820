"""Who owns BatchNorm, and what that rules out. Rules of ``fedbd.compatibility``."""

from __future__ import annotations

from collections.abc import Iterator

from fedbd.config.scenario import Scenario
from fedbd.errors import Problem


def batch_norm_fits(s: Scenario) -> Iterator[Problem]:
    """What becomes of BatchNorm leaves the methods what they need."""
    if s.batch_norm == "frozen" and s.start is None:
        yield Problem(
            path="batch_norm",
            expected="must not be frozen without a start: a fresh model's statistics (0 and 1) are those of no data",
            remedy="add start: {checkpoint: FILE} or start: {warm_up: N}",
        )
    for i, plan in enumerate(s.cleanup):
        if s.batch_norm == "group_norm" and getattr(plan.method.impl, "reads_batch_norm", False):
            expected = f"'{plan.method.name}' judges channels by BatchNorm, and batch_norm: group_norm leaves none"
            remedy = "set batch_norm to average, or take finetune, nad, fine_pruning or linf_pruning"
            yield Problem(path=f"cleanup[{i}]", expected=expected, remedy=remedy)
    if s.batch_norm == "local":
        yield from _local_batch_norm(s)


def _local_batch_norm(s: Scenario) -> Iterator[Problem]:
    """Each client has BatchNorm of its own: nothing that the server does to its own reaches them."""
    if s.trusted is None:
        expected = "needs trusted data with local: the model that is evaluated has its running statistics from them"
        yield Problem(path="batch_norm", expected=expected, remedy="add trusted: {size: 500}")
    for i, plan in enumerate(s.cleanup):
        name = plan.method.name
        if getattr(plan.method.impl, "prunes", False):
            expected = f"'{name}' prunes by BatchNorm scales, and with batch_norm: local every client has its own"
            remedy = "set batch_norm to average, or take finetune, nad or flain"
            yield Problem(path=f"cleanup[{i}]", expected=expected, remedy=remedy)
        elif plan.mode == "in_loop":
            expected = "must be if_stopped_now with batch_norm: local: clients would get half of the repaired model"
            yield Problem(path=f"cleanup[{i}].mode", expected=expected, got="'in_loop'")
    if s.evaluation.relearn is not None:
        expected = "must be null with batch_norm: local: clients' BatchNorm belongs to the run, not to a repaired model"
        yield Problem(path="evaluation.relearn", expected=expected)
    if getattr(s.aggregation.impl, "builds_models", False):
        expected = f"'{s.aggregation.name}' makes models of updates, and with batch_norm: local these lack BatchNorm"
        yield Problem(path="aggregation", expected=expected, remedy="set batch_norm to average, or take another rule")


CHECKS = (batch_norm_fits,)
