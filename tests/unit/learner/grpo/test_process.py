"""Process supervision against hand-worked values, plain loops and outcome supervision."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.grpo.advantages import group_advantages
from learner.grpo.process import process_advantages

NO = math.nan


def advantages(steps: list[list[float]], groups: list[int], *, scale_rewards: bool = True) -> list[list[float]]:
    """Of completions given as their tokens' step rewards, as nested as they are."""
    lengths = torch.tensor([len(of) for of in steps])
    flat = process_advantages(
        torch.tensor([reward for of in steps for reward in of], dtype=torch.float64),
        torch.repeat_interleave(torch.arange(len(steps)), lengths),
        torch.tensor(groups),
        scale_rewards=scale_rewards,
    )
    return [part.tolist() for part in flat.split(lengths.tolist())]


def test_two_completions_of_two_steps_and_one_by_hand():
    # rewards 1, 0 | 2: mean 1; deviations 0, -1, 1; sample variance (0 + 1 + 1)/2 = 1; std 1
    first, second = advantages([[NO, 1.0, NO, 0.0], [NO, 2.0, NO]], [0, 0])
    unit = 1 / 1.0001
    assert first == pytest.approx([0 - unit, 0 - unit, -unit, -unit], rel=1e-14)
    assert second == pytest.approx([unit, unit, 0.0], rel=1e-14), "nobody judged what follows the last step"


def test_three_steps_of_one_completion_add_up_from_the_end_by_hand():
    # rewards 3, 1, 2 | -2: mean 1; deviations 2, 0, 1, -3; not divided
    first, second = advantages([[3.0, 1.0, NO, 2.0], [-2.0]], [0, 0], scale_rewards=False)
    assert (first, second) == ([3.0, 1.0, 1.0, 1.0], [-3.0])


def test_one_step_at_the_last_token_is_outcome_supervision():
    rewards = torch.tensor([[0.3, -1.2, 2.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = group_advantages(rewards, torch.ones(2, 3)).flatten().tolist()
    steps = [[NO] * n + [r] for n, r in enumerate(rewards.flatten().tolist())]
    for found, value in zip(advantages(steps, [0, 0, 0, 1, 1, 1]), expected, strict=True):
        assert found == pytest.approx([value] * len(found), rel=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.5, -7.75, 1e6])
def test_equal_step_rewards_give_exactly_zero(reward):
    steps = [[reward, NO, reward], [NO, reward], [reward] * 5]
    assert not any(map(any, advantages(steps, [0, 0, 0])))


def test_a_group_of_one_completion_compares_with_nothing():
    assert advantages([[1.0, 0.0], [2.0, NO], [NO, 1.0]], [0, 1, 1], scale_rewards=False) == [
        [0.0, 0.0], [0.5, 0.0], [-0.5, -0.5],
    ]  # fmt: skip


def test_completions_without_a_step_stay_out():
    alone = advantages([[1.0, NO], [0.0]], [0, 0])
    among = advantages([[NO, NO], [1.0, NO], [NO], [0.0], [NO]], [0, 0, 0, 0, 0])
    assert (among[1], among[3]) == tuple(alone)
    assert [among[0], among[2], among[4]] == [[0.0, 0.0], [0.0], [0.0]]
    assert advantages([[NO], [NO, NO]], [0, 0]) == [[0.0], [0.0, 0.0]]


def naive(steps, groups, *, scale_rewards):
    """The sentence of the paper, word by word."""
    found = []
    for of, group in zip(steps, groups, strict=True):
        members = [other for other, g in zip(steps, groups, strict=True) if g == group]
        rewards = [r for other in members for r in other if not math.isnan(r)]
        found.append([0.0] * len(of))
        if len(members) < 2:
            continue
        for t in range(len(of)):
            for end in range(t, len(of)):
                if not math.isnan(of[end]):
                    std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
                    found[-1][t] += (of[end] - statistics.fmean(rewards)) / (std + 1e-4 if scale_rewards else 1.0)
    return found


reward = st.one_of(st.just(NO), st.sampled_from([0.0, 1.0, -0.5]), st.floats(-10, 10))
completion = st.lists(reward, max_size=6)  # the empty one, too
members = st.lists(st.tuples(completion, st.integers(0, 2)), min_size=1, max_size=12)


@given(members, st.booleans())
def test_any_groups_equal_the_loops(drawn, scale_rewards):
    ordered = sorted(drawn, key=lambda of: of[1])
    steps, groups = [of for of, _ in ordered], [group for _, group in ordered]
    expected = naive(steps, groups, scale_rewards=scale_rewards)
    for found, value in zip(advantages(steps, groups, scale_rewards=scale_rewards), expected, strict=True):
        assert all(map(math.isfinite, found))
        assert found == pytest.approx(value, rel=1e-8, abs=1e-8)
