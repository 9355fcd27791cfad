from __future__ import annotations

import math

import pytest

from learner.batch import StepResult
from learner.dashboard.view import StepView
from learner.idle import LearnerWaits, NotLeased
from learner.idle_watch import IdleSeconds
from learner.stats import RunStats
from learner.token_ledger import costs
from protocol.versions import Version
from tests.factories import make_batch, make_train_group


def test_a_step_view_is_made_of_the_row_of_a_step():
    """A real row, not a hand-made one: names of both sides must agree."""
    train = make_train_group(rewards=[1, 0], spans=[[(Version(1, 2), 3)], [(Version(1, 4), 1)]])
    row = RunStats().record_step(
        make_batch(step=5, groups=[train]),
        StepResult(finite=True, loss_tokens=4),
        policy_version=5,
        learning_rate=1e-5,
        timings={
            "wait_s": 1.0, "forward_backward_s": 2.0, "wait_publish_s": 0.0, "optimizer_s": 0.5, "canaries_s": 0.0,
            "journal_s": 0.0,
        },
        idle=IdleSeconds(learner={LearnerWaits.DISK: 0.25, LearnerWaits.BOUND: 0.75}, leasing={NotLeased.DATA: 4.0}),
        step_time_s=3.5,
        servers=(),
        counts={},
        wall_s=4.0,
    )  # fmt: skip
    view = StepView.of(row | costs(50, 100, learner_s=4.0, servers_s=1.0))
    assert (view.learner_waits_for, view.seats_empty_for) == ("the bound", "")
    assert view.generated_per_trained == 2.0
    assert (view.step, view.reward, view.step_time_s) == (5, 0.5, 3.5)
    assert view.staleness_mean == pytest.approx(1.5)
    assert view.staleness_max == 2
    assert view.staleness_hist == [1, 0, 3]
    assert view.learner_busy == pytest.approx(0.75)
    assert view.learner_tokens_per_s == pytest.approx(1.0)
    assert math.isnan(view.rollout_busy)


def test_before_the_first_step_there_are_no_values():
    view = StepView()
    assert view.step == 0
    assert math.isnan(view.reward)
