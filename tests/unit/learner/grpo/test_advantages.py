"""Advantages against hand-worked values and their defining properties."""

from __future__ import annotations

import pytest
import torch

from learner.grpo.advantages import group_advantages

ALL = torch.ones(1, 4, dtype=torch.bool)


def test_two_right_two_wrong_by_hand():
    # mean 1/2; deviations +-1/2; sample variance 4 * 1/4 / 3 = 1/3; std 0.57735027
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64), ALL)
    expected = 0.5 / (0.5773502691896258 + 1e-4)
    assert advantages.tolist() == [pytest.approx([expected, -expected, expected, -expected], rel=1e-14)]


def test_one_right_of_four_by_hand():
    # mean 1/4; deviations 3/4, -1/4 (3x); sample variance (9 + 3) / 16 / 3 = 1/4; std 1/2
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), ALL)
    assert advantages.tolist() == [pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], rel=1e-14)]


def test_none_only_centers():
    advantages = group_advantages(torch.tensor([[3.0, 1.0, 0.0, 0.0]]), ALL, scale_rewards="none")
    assert advantages.tolist() == [[2.0, 0.0, -1.0, -1.0]]


def test_the_deviation_is_torchs_sample_deviation():
    rewards = torch.tensor([[0.3, -1.2, 2.5, 0.9, 0.1]], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(correction=1) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, torch.ones(1, 5)), expected, rtol=1e-13, atol=0)


def test_unscored_completions_are_outside_mean_and_deviation():
    rewards = torch.tensor([[1.0, 99.0, 0.0, float("nan")]])
    scored = torch.tensor([[1, 0, 1, 0]], dtype=torch.uint8)
    advantages = group_advantages(rewards, scored)
    alone = group_advantages(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2))
    assert advantages[0, [0, 2]].tolist() == alone[0].tolist()
    assert advantages[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scored", [[0, 0, 0, 0], [0, 1, 0, 0]])
def test_fewer_than_two_scored_have_no_advantage(scored):
    advantages = group_advantages(torch.tensor([[1.0, 5.0, 0.0, 2.0]]), torch.tensor([scored]))
    assert advantages.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 1e6])
@pytest.mark.parametrize("num_generations", [2, 3, 7, 64])
def test_equal_rewards_give_exactly_zero(reward, num_generations):
    rewards = torch.full((1, num_generations), reward)
    assert not group_advantages(rewards, torch.ones_like(rewards)).any()


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [10.0, 20.0, 60.0]])
    together = group_advantages(rewards, torch.ones(2, 3))
    apart = torch.cat([group_advantages(row[None], torch.ones(1, 3)) for row in rewards])
    assert torch.equal(together, apart)


def test_the_dtype_is_that_of_the_rewards():
    assert group_advantages(torch.zeros(1, 2), torch.ones(1, 2)).dtype == torch.float32
