import math

import numpy as np
import pytest

from protocol.messages import RewardStatus
from rollout_server.rewards.base import RewardCall, Scores, combine
from rollout_server.rewards.columns import Column
from rollout_server.rewards.worker import CallResult

OK, TIMEOUT, ERROR, UNSCORED = RewardStatus
NAN = math.nan


def scores(values, statuses):
    return Scores(
        values=np.array(values, np.float32),
        statuses=np.array(statuses, np.uint8),
        seconds=np.zeros_like(values, np.float32),
    )


@pytest.mark.parametrize(
    ("values", "statuses", "reward", "scored"),
    [
        ([1.0, 0.5], [OK, OK], 3.0, 1),
        ([1.0, NAN], [OK, UNSCORED], 2.0, 1),
        ([NAN, 0.5], [ERROR, OK], 1.0, 1),
        ([NAN, NAN], [ERROR, UNSCORED], 0.0, 0),
        ([NAN, NAN], [TIMEOUT, TIMEOUT], 0.0, 0),
        ([-1.0, NAN], [TIMEOUT, ERROR], -2.0, 1),
        ([0.0, NAN], [OK, UNSCORED], 0.0, 1),
        ([7.0, 7.0], [ERROR, UNSCORED], 0.0, 0),
    ],
)
def test_combine_adds_what_has_a_value_and_only_that(values, statuses, reward, scored):
    rewards, has_any = combine(scores([values], [statuses]), (2.0, 2.0))
    assert (rewards.tolist(), has_any.tolist()) == ([reward], [scored])
    assert (rewards.dtype, has_any.dtype) == (np.float32, np.uint8)


def test_combine_weighs_each_function():
    rewards, _ = combine(scores([[1.0, 10.0], [2.0, 20.0]], [[OK, OK], [OK, OK]]), (1.0, -0.5))
    assert rewards.tolist() == [-4.0, -8.0]


def test_arguments_repeat_the_rows_columns_for_the_chosen_completions():
    call = RewardCall(
        prompts=["p", "p", "p"],
        completions=["a", "b", "c"],
        completion_ids=[[1], [2, 3], ()],
        finish_reasons=["stop", "length", "abort"],
        columns={"answer": "x", "meta": {"k": 1}},
    )
    assert call.arguments([2, 1]) == {
        "prompts": ["p", "p"],
        "completions": ["c", "b"],
        "completion_ids": [[], [2, 3]],
        "finish_reason": ["abort", "length"],
        "answer": ["x", "x"],
        "meta": [{"k": 1}, {"k": 1}],
    }
    assert len(call) == 3


def test_a_column_tells_apart_how_completions_fared():
    column = Column(6)
    column.record([0, 1, 2], CallResult([1.0, None, None], [2], "returned a str", 0.3))
    column.timed_out([3], -1.0, 0.5)
    column.crashed([4], "its process died (SIGKILL)")
    assert column.statuses == [OK, UNSCORED, ERROR, TIMEOUT, ERROR, TIMEOUT]
    assert column.values == pytest.approx([1.0, NAN, NAN, -1.0, NAN, NAN], nan_ok=True)
    assert column.seconds == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.0, 0.0])
    assert column.note == "returned a str", "the first thing that went wrong"


def test_a_call_that_took_too_long_shares_its_seconds():
    column = Column(2)
    column.timed_out([0, 1], None, 3.0)
    assert column.seconds == [1.5, 1.5]
    assert all(map(math.isnan, column.values))
    assert column.note == "killed after 3 s, scoring 2 completions"
