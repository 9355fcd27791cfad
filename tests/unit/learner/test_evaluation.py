"""One pass over the evaluation rows: every row answered or given up, the result labelled with its versions."""

from __future__ import annotations

import math

import pytest

from learner.evaluation import Evaluation
from protocol.messages import Purpose
from protocol.versions import Version
from tests.factories import make_group

ASKED_FOR = Version(1, 5)


def answer(row: int, rewards=(1.0,), version=ASKED_FOR, **fields):
    return make_group(ordinal=row, purpose=Purpose.EVAL, rewards=rewards, version=version, **fields)


def begin(num_rows: int = 2, *, pinned: bool = False, max_attempts: int = 3) -> Evaluation:
    return Evaluation(policy_version=5, pinned=pinned, num_rows=num_rows, max_attempts=max_attempts)


def test_rows_go_from_pending_to_leased_to_done():
    evaluation = begin()
    assert (list(evaluation.pending), evaluation.done) == ([0, 1], False)
    assert [evaluation.dispatched(1), evaluation.dispatched(0)] == [1, 1]
    assert (list(evaluation.pending), evaluation.leased) == ([], {0, 1})
    assert evaluation.delivered(0, answer(0, rewards=(1.0, 0.0)))
    assert not evaluation.done
    assert evaluation.delivered(1, answer(1, rewards=(1.0, 1.0)))
    assert evaluation.done
    result = evaluation.result()
    assert (result.step, result.reward, result.oldest, result.newest, result.label) == (5, 0.75, 5, 5, "v5")


def test_no_rows_are_done_at_once_and_have_no_reward():
    evaluation = begin(0)
    assert evaluation.done
    result = evaluation.result()
    assert math.isnan(result.reward)
    assert result.label == "v5"


def test_the_result_names_the_oldest_and_the_newest_version_seen():
    evaluation = begin()
    evaluation.dispatched(0)
    evaluation.dispatched(1)
    evaluation.delivered(0, answer(0, spans=[[(Version(1, 6), 2), (Version(1, 7), 1)]]))
    evaluation.delivered(1, answer(1, version=Version(1, 9)))
    assert evaluation.result().label == "v6-9"


def test_unscored_completions_are_outside_the_mean():
    evaluation = begin(1)
    evaluation.dispatched(0)
    evaluation.delivered(0, answer(0, rewards=(1.0, None, 0.0, 0.5)))
    assert evaluation.result().reward == 0.5


def test_a_duplicate_counts_once():
    evaluation = begin(1)
    evaluation.dispatched(0)
    assert evaluation.delivered(0, answer(0, rewards=(1.0,)))
    assert not evaluation.delivered(0, answer(0, rewards=(0.0,)))
    assert not evaluation.delivered(7, answer(7))
    assert evaluation.result().reward == 1.0


def test_a_pinned_evaluation_takes_one_version_only():
    evaluation = begin(1, pinned=True)
    evaluation.dispatched(0)
    mixed = answer(0, spans=[[(Version(1, 5), 2), (Version(1, 6), 1)]])
    assert not evaluation.delivered(0, mixed)
    assert list(evaluation.pending) == [0], "asked for again"
    evaluation.dispatched(0)
    assert evaluation.delivered(0, answer(0))
    assert evaluation.result().label == "v5"


def test_a_row_is_given_up_after_max_attempts_that_failed():
    evaluation = begin(2, max_attempts=2)
    assert evaluation.dispatched(0) == 1
    for attempt in (2, 3, 4):  # a server that drains or reconnects is no fault of the row
        evaluation.lost(0, fault=False)
        assert evaluation.dispatched(0) == attempt
    evaluation.lost(0, fault=True)
    assert list(evaluation.pending) == [1, 0]
    evaluation.dispatched(0)
    evaluation.lost(0, fault=True)
    assert (list(evaluation.pending), evaluation.failed) == ([1], 1)
    evaluation.lost(0, fault=True)
    assert evaluation.failed == 1, "it is given up once"
    evaluation.dispatched(1)
    evaluation.delivered(1, answer(1))
    assert evaluation.done


def test_losing_a_row_that_is_not_leased_changes_nothing():
    evaluation = begin(1)
    evaluation.lost(0, fault=True)
    assert (list(evaluation.pending), evaluation.failed) == ([0], 0)


def test_a_row_is_leased_once():
    evaluation = begin(1)
    evaluation.dispatched(0)
    with pytest.raises(ValueError, match="not in deque"):
        evaluation.dispatched(0)
