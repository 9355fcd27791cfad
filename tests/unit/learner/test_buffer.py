"""The buffer holds what the ledger says, and `why_filtered` judges the task reward alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.buffer import Buffer, why_filtered
from protocol.messages import FinishReason, RewardStatus
from tests.factories import make_group, make_train_group


def test_groups_come_out_in_the_order_asked_for():
    buffer = Buffer()
    groups = {sequence: make_train_group(ordinal=10 + sequence, sequence=sequence) for sequence in (5, 3, 9)}
    for group in groups.values():
        buffer.offer(group)
    assert len(buffer) == 3
    assert buffer.take([9, 3]) == (groups[9], groups[3])
    assert len(buffer) == 1
    assert buffer.take([]) == ()
    assert buffer.take([5]) == (groups[5],)
    assert len(buffer) == 0


def test_bytes_are_those_of_tokens_and_logprobs():
    buffer = Buffer()
    assert buffer.num_bytes == 0
    buffer.offer(make_train_group(ordinal=0, lengths=[3, 4, 5, 6]))
    buffer.offer(make_train_group(ordinal=1, lengths=[1, 1, 1, 1]))
    assert buffer.num_bytes == (18 + 4) * (4 + 4)
    buffer.take([0])
    assert buffer.num_bytes == 4 * (4 + 4)


def test_a_sequence_is_buffered_once():
    buffer = Buffer()
    buffer.offer(make_train_group(ordinal=4))
    with pytest.raises(AssertionError, match="sequence 4 is buffered already"):
        buffer.offer(make_train_group(ordinal=4))


@pytest.mark.parametrize(
    ("rewards", "filter_zero_std", "reason"),
    [
        ((1.0, 0.0, 1.0, 0.0), True, None),
        ((1.0, 1.0, 1.0, 1.0), True, "all rewards are 1"),
        ((0.25, 0.25, None, 0.25), True, "all rewards are 0.25"),
        ((1.0, 1.0, 1.0, 1.0), False, None),
        ((1.0, None, None, None), True, "1 of 4 completions scored"),
        ((1.0, None, None, None), False, "1 of 4 completions scored"),
        ((None, None, None, None), False, "0 of 4 completions scored"),
        ((1.0, 0.0, None, None), True, None),
        ((0.0, 0.0, None, None), True, "all rewards are 0"),  # the unscored ones' zeros are no rewards
        ((1.0, 1.0, None, None), True, "all rewards are 1"),
    ],
)
def test_why_a_group_has_nothing_to_train_on(rewards, filter_zero_std, reason):
    assert why_filtered(make_group(rewards=rewards), filter_zero_std=filter_zero_std) == reason


def test_single_functions_do_not_matter_only_the_reward_does():
    """A format reward that varies must not keep a group whose combined rewards are equal, and the other way round."""
    varying = {"exact": [1.0, 0.0, 1.0, RewardStatus.UNSCORED], "format": [0.0, 1.0, 0.0, 1.0]}
    group = make_group(rewards=(1.0, 1.0, 1.0, 1.0), functions=varying)
    assert why_filtered(group, filter_zero_std=True) == "all rewards are 1"


def test_a_critic_makes_do_with_one_scored_completion():
    alone = make_group(rewards=[1.0, None, None])
    assert why_filtered(alone, filter_zero_std=False, min_scored=1) is None
    assert why_filtered(alone, filter_zero_std=False) == "1 of 3 completions scored"
    nothing = make_group(rewards=[None, None])
    assert why_filtered(nothing, filter_zero_std=False, min_scored=1) == "0 of 2 completions scored"


def test_what_would_not_train_is_not_compared():
    group = make_group(rewards=[1.0, 1.0, 1.0, 0.0], finish_reasons=[FinishReason.STOP] * 3 + [FinishReason.LENGTH])
    assert why_filtered(group, filter_zero_std=True) is None
    masked = why_filtered(group, filter_zero_std=True, mask_truncated_completions=True)
    assert masked == "all rewards are 1"
    cut = make_group(rewards=[1.0, 0.0], finish_reasons=[FinishReason.STOP, FinishReason.LENGTH])
    few = why_filtered(cut, filter_zero_std=False, mask_truncated_completions=True)
    assert few == "1 of 2 completions scored and not truncated"


NO = math.nan


@pytest.mark.parametrize(
    ("step_rewards", "reason"),
    [
        ([NO, 0.5, NO, 0.5, 0.5, 0.5], "all step rewards are 0.5"),  # two steps against one: unequal sums
        ([NO, 0.5, 0.5, NO, NO, 1.0], None),  # equal sums
        ([NO, 1.0, NO, NO, NO, NO], "all step rewards are 1"),
        (None, None),
    ],
)
def test_steps_are_compared_one_by_one(step_rewards, reason):
    steps = None if step_rewards is None else np.array(step_rewards, np.float32)
    group = make_group(rewards=[1.0, 0.5], lengths=[3, 3], step_rewards=steps)
    assert why_filtered(group, filter_zero_std=True, compares_steps=True) == reason
    assert why_filtered(group, filter_zero_std=False, compares_steps=True) is None
    assert why_filtered(group, filter_zero_std=True) is None


def test_without_steps_outcomes_are_compared():
    equal = make_group(rewards=[1.0, None, 1.0])
    assert why_filtered(equal, filter_zero_std=True, compares_steps=True) == "all step rewards are 1"
    few = make_group(rewards=[1.0, None])
    assert why_filtered(few, filter_zero_std=True, compares_steps=True) == "1 of 2 completions scored"


def test_steps_of_what_would_not_train_are_not_compared():
    reasons = [FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]
    steps = np.array([NO, 1.0, 1.0, 0.0], np.float32)
    group = make_group(rewards=[1.0, 1.0, 0.0], lengths=[2, 1, 1], finish_reasons=reasons, step_rewards=steps)
    options = {"filter_zero_std": True, "compares_steps": True}
    assert why_filtered(group, **options) is None
    assert why_filtered(group, **options, mask_truncated_completions=True) == "all step rewards are 1"
