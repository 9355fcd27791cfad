import math

import numpy as np
import pytest

from protocol.messages import RewardStatus
from rollout_server.rewards.base import RewardCall, Scores, combine, combine_steps
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
    column.record([0, 1, 2], CallResult([1.0, None, None], {0: [(4, 1.0)]}, [2], "returned a str", 0.3))
    column.timed_out([3], -1.0, 0.5)
    column.crashed([4], "its process died (SIGKILL)")
    assert column.statuses == [OK, UNSCORED, ERROR, TIMEOUT, ERROR, TIMEOUT]
    assert column.values == pytest.approx([1.0, NAN, NAN, -1.0, NAN, NAN], nan_ok=True)
    assert column.seconds == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.0, 0.0])
    assert column.steps == {0: [(4, 1.0)]}
    assert column.note == "returned a str", "the first thing that went wrong"


def test_steps_of_a_call_for_some_belong_to_those():
    column = Column(4)
    column.record([3, 1], CallResult([0.5, 2.0], {0: [(0, 0.5)], 1: [(2, 2.0)]}, [], "", 0.1))
    assert column.steps == {3: [(0, 0.5)], 1: [(2, 2.0)]}


def stepwise(values, statuses, steps):
    of = scores(values, statuses)
    return Scores(values=of.values, statuses=of.statuses, seconds=of.seconds, steps=steps)


def test_steps_are_weighted_and_add_up_where_they_end():
    judged = stepwise([[1.5, 10.0], [2.0, 20.0]], [[OK, OK]] * 2, {
        (0, 0): [(1, 1.0), (0, 0.5)], (1, 0): [(2, 2.0)], (0, 1): [(1, 10.0)], (1, 1): [(0, 5.0), (0, 15.0)],
    })  # fmt: skip
    steps = combine_steps(judged, (2.0, -0.5), [2, 3])
    assert steps.tolist() == pytest.approx([1.0, 2.0 - 5.0, -10.0, NAN, 4.0], nan_ok=True)
    rewards, _ = combine(judged, (2.0, -0.5))
    assert rewards.tolist() == [steps[:2].sum(), np.nansum(steps[2:])], "the reward is the sum of the steps"
    assert steps.dtype == np.float32


def test_a_value_for_the_whole_is_a_step_that_ends_with_the_last_token():
    judged = stepwise([[1.0, 0.25], [2.0, 0.5]], [[OK, OK]] * 2, {(0, 0): [(0, 1.0)], (1, 0): [(2, 2.0)]})
    steps = combine_steps(judged, (1.0, 1.0), [3, 3])
    assert steps.tolist() == pytest.approx([1.0, NAN, 0.25, NAN, NAN, 2.5], nan_ok=True)


def test_zero_is_a_step_and_what_was_not_judged_has_none():
    statuses = [[OK, UNSCORED], [ERROR, UNSCORED], [TIMEOUT, OK], [UNSCORED, UNSCORED]]
    judged = stepwise(
        [[0.0, NAN], [NAN, NAN], [-1.0, 0.0], [NAN, NAN]], statuses, {(0, 0): [(0, 0.0)], (3, 0): [(0, 9.0)]}
    )
    steps = combine_steps(judged, (1.0, 1.0), [2, 2, 2, 0])
    assert steps.tolist() == pytest.approx([0.0, NAN, NAN, NAN, NAN, -1.0], nan_ok=True)


def test_a_function_of_weight_zero_has_no_steps():
    steps = {(0, 0): [(0, 1.0), (1, 0.0)], (1, 0): [(0, 1.0)], (0, 1): [(2, 5.0)]}
    judged = stepwise([[1.0, 5.0], [1.0, 5.0], [NAN, 5.0]], [[OK, OK], [OK, OK], [UNSCORED, OK]], steps)
    combined = combine_steps(judged, (1.0, 0.0), [3, 3, 3])
    assert combined.tolist() == pytest.approx([1.0, 0.0, NAN, 1.0, NAN, NAN, NAN, NAN, 0.0], nan_ok=True)
    assert combine_steps(stepwise([[NAN, 5.0]], [[UNSCORED, OK]], {(0, 1): [(2, 5.0)]}), (1.0, 0.0), [3]) is None


def test_without_steps_rewards_are_outcomes():
    assert combine_steps(scores([[1.0]], [[OK]]), (1.0,), [3]) is None
    unjudged = stepwise([[NAN]], [[UNSCORED]], {(0, 0): [(0, 1.0)]})
    assert combine_steps(unjudged, (1.0,), [3]) is None, "an aborted completion's"


def test_a_call_that_took_too_long_shares_its_seconds():
    column = Column(2)
    column.timed_out([0, 1], None, 3.0)
    assert column.seconds == [1.5, 1.5]
    assert all(map(math.isnan, column.values))
    assert column.note == "killed after 3 s, scoring 2 completions"
