from __future__ import annotations

import math

import numpy as np
import pytest

from learner.batch_metrics import (
    completion_metrics,
    completion_staleness,
    reward_metrics,
    staleness_metrics,
    token_staleness,
)
from protocol.messages import FinishReason, Group, RewardStatus
from protocol.versions import Version
from tests.factories import make_batch, make_group, make_train_group


def v(policy_version: int) -> Version:
    return Version(1, policy_version)


def tokens_at(group: Group, policy_version: int) -> list[int]:
    """Staleness of every token that can train, one by one."""
    return np.repeat(*token_staleness([group], policy_version)).tolist()


def test_restored_groups_that_other_functions_judged_are_reduced_as_far_as_they_agree():
    one = make_group(functions={"math": [1.0, 0.0, 1.0, 0.0]})
    two = make_group(ordinal=1, functions={"math": [1.0, 1.0, 1.0, 1.0], "style": [0.5, 0.5, 0.5, 0.5]})
    for groups, names in (([one, two], ["math"]), ([two, one], ["math", "style"])):
        row = reward_metrics(groups)
        assert row["rewards/math/mean"] == 0.75
        assert [key for key in row if key.startswith("rewards/") and key.endswith("/mean")] == [
            f"rewards/{name}/mean" for name in names
        ]


def test_reward_statistics_of_two_groups():
    row = reward_metrics([make_group(rewards=[1, 0, 1, 0]), make_group(ordinal=1, rewards=[1, 1, 1, 1])])
    assert row["reward"] == pytest.approx(0.75)
    assert row["reward_std"] == pytest.approx((math.sqrt(1 / 3) + 0) / 2)  # sample std of 1, 0, 1, 0
    assert row["frac_reward_zero_std"] == pytest.approx(0.5)


def test_unscored_completions_are_outside_of_every_reward_statistic():
    row = reward_metrics([make_group(rewards=[1, None, 0, None])])
    assert row["reward"] == pytest.approx(0.5)
    assert row["reward_std"] == pytest.approx(math.sqrt(0.5))
    assert row["rewards/unscored"] == 2


def test_where_steps_are_judged_their_mean_and_number_are_told():
    steps = np.array([0.5, 0.5, np.nan, np.nan, np.nan, np.nan, 0.25], np.float32)
    judged = make_group(rewards=[1.0, None, 0.25], lengths=[3, 1, 3], step_rewards=steps)
    row = reward_metrics([judged, make_group(ordinal=1, rewards=[9.0, 9.0, 9.0])])
    assert row["step_reward"] == pytest.approx(1.25 / 3)
    assert row["completions/mean_steps"] == 1.5
    assert row["reward"] == pytest.approx((1.25 + 27) / 5), "sums of steps, and outcomes"
    assert "step_reward" not in reward_metrics([make_group()])


def test_a_group_with_one_scored_completion_has_no_spread_but_counts_in_the_mean():
    row = reward_metrics([make_group(rewards=[1, None]), make_group(ordinal=1, rewards=[0, 0])])
    assert row["reward"] == pytest.approx(1 / 3)
    assert row["reward_std"] == 0.0
    assert row["frac_reward_zero_std"] == 1.0


def test_rewards_per_function_count_only_calls_that_gave_a_value():
    row = reward_metrics(
        [
            make_group(
                rewards=[2, 1, 0, 1],
                functions={
                    "math": [1.0, 0.0, RewardStatus.TIMEOUT, RewardStatus.ERROR],
                    "format": [1.0, 1.0, RewardStatus.UNSCORED, 1.0],
                },
            )
        ]
    )
    assert row["rewards/math/mean"] == pytest.approx(0.5)
    assert row["rewards/math/std"] == pytest.approx(math.sqrt(0.5))
    assert row["rewards/format/mean"] == 1.0
    assert row["rewards/format/std"] == 0.0
    assert (row["rewards/timeouts"], row["rewards/errors"], row["rewards/unscored"]) == (1, 1, 1)


def test_a_value_set_by_reward_on_timeout_is_no_value_of_the_function():
    group = make_group(
        rewards=[1, 0],
        functions={"math": [1.0, RewardStatus.TIMEOUT]},
        reward_values=np.array([[1.0], [-1.0]], np.float32),
    )
    assert reward_metrics([group])["rewards/math/mean"] == 1.0


def test_no_groups_are_no_value_and_no_error():
    row = {**reward_metrics([]), **completion_metrics([]), **staleness_metrics(make_batch(groups=[]))}
    assert math.isnan(row["reward"])
    assert math.isnan(row["completions/mean_length"])
    assert math.isnan(row["staleness/token_mean"])
    assert row["rewards/timeouts"] == 0
    assert row["staleness/max"] == 0
    assert row["staleness/hist"] == [0]


def test_lengths_leave_aborted_completions_out():
    group = make_group(
        rewards=[1, 0, 1, 0],
        lengths=[2, 8, 4, 1],
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT],
    )
    row = completion_metrics([group])
    assert row["completions/mean_length"] == pytest.approx(14 / 3)
    assert (row["completions/min_length"], row["completions/max_length"]) == (2, 8)
    assert row["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert row["completions/mean_terminated_length"] == 3


def test_all_truncated_has_no_terminated_length():
    row = completion_metrics([make_group(rewards=[1, 0], finish_reasons=[FinishReason.LENGTH] * 2)])
    assert row["completions/clipped_ratio"] == 1.0
    assert math.isnan(row["completions/mean_terminated_length"])


def test_staleness_of_tokens_completions_and_groups_are_three_numbers():
    """Step 5 trains weights 4: two completions over a swap, and one group that is fresh."""
    swapped = make_train_group(ordinal=0, rewards=[1, 0], spans=[[(v(1), 3), (v(2), 1)], [(v(2), 2), (v(3), 2)]])
    fresh = make_train_group(ordinal=1, rewards=[1, 0], lengths=[4, 4], version=v(4))
    row = staleness_metrics(make_batch(step=5, groups=[swapped, fresh]))
    assert row["staleness/hist"] == [8, 2, 3, 3]  # 4 - (4, 3, 2, 1)
    assert row["staleness/token_mean"] == pytest.approx((2 * 1 + 3 * 2 + 3 * 3) / 16)
    assert row["sample/staleness_mean"] == pytest.approx((3 + 2 + 0 + 0) / 4)
    assert row["sample/staleness_max"] == 3
    assert row["staleness/group_mean"] == pytest.approx((3 + 0) / 2)
    assert row["staleness/max"] == 3


def test_tokens_that_cannot_train_have_no_staleness_but_bound_the_group():
    group = make_group(
        rewards=[1, None, 0],
        spans=[[(v(3), 2)], [(v(0), 5)], [(v(2), 2)]],
        finish_reasons=[FinishReason.STOP, FinishReason.STOP, FinishReason.ABORT],
    )
    assert tokens_at(group, 3) == [0, 0]
    assert completion_staleness([group], 3).tolist() == [0]
    row = staleness_metrics(make_batch(step=4, groups=[make_train_group(group=group)]))
    assert row["staleness/hist"] == [2, 0, 0, 0]
    assert row["staleness/max"] == 3


def test_tokens_of_an_environment_are_not_counted():
    group = make_group(
        rewards=[1, 0],
        spans=[[(v(1), 2), (v(2), 1)], [(v(2), 2)]],
        loss_mask=np.array([1, 0, 1, 0, 1], np.uint8),
    )
    assert tokens_at(group, 2) == [1, 0, 0]


def test_empty_completions_have_no_oldest_token():
    group = make_group(
        rewards=[1, 0, 1],
        spans=[[], [(v(1), 1), (v(2), 1)], []],
        finish_reasons=[FinishReason.LENGTH] * 3,
    )
    assert completion_staleness([group], 2).tolist() == [1]
    assert tokens_at(group, 2) == [1, 0]
    nothing = make_group(rewards=[1, 0], spans=[[], []], finish_reasons=[FinishReason.LENGTH] * 2)
    assert completion_staleness([nothing], 2).size == 0


def test_a_retry_of_the_whole_group_may_mix_incarnations():
    """Only the policy_version counts: both incarnations have the same weights under the same number."""
    group = make_group(rewards=[1, 0], spans=[[(Version(1, 2), 2)], [(Version(2, 2), 1), (Version(2, 3), 1)]])
    assert tokens_at(group, 3) == [1, 1, 1, 0]


def test_an_empty_mask_belongs_to_no_tokens():
    group = make_group(
        rewards=[1, 0], spans=[[], []], finish_reasons=[FinishReason.LENGTH] * 2, loss_mask=np.zeros(0, np.uint8)
    )
    assert tokens_at(group, 2) == []
