"""The buffer holds what the ledger says, and `why_filtered` judges the task reward alone."""

from __future__ import annotations

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
