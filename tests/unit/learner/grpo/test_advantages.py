"""Advantages against hand-worked values and their defining properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.grpo.advantages import group_advantages, leave_one_out_advantages, reinforce_plus_plus_advantages

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


def test_batch_divides_by_one_deviation_of_all_rewards():
    rewards = torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=torch.float64)
    expected = 0.5 / (rewards.std(correction=1) + 1e-4)
    advantages = group_advantages(rewards, torch.ones(2, 2), scale_rewards="batch")
    torch.testing.assert_close(advantages, expected * torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64))


def test_the_batchs_deviation_leaves_out_what_is_not_compared():
    rewards = torch.tensor([[1.0, 0.0, 77.0], [50.0, float("nan"), -9.0]], dtype=torch.float64)
    scored = torch.tensor([[1, 1, 0], [1, 0, 0]])  # the second group has one scored completion: no advantage
    advantages = group_advantages(rewards, scored, scale_rewards="batch")
    alone = group_advantages(rewards[:1, :2], scored[:1, :2], scale_rewards="batch")
    assert advantages.tolist() == [[*alone[0].tolist(), 0.0], [0.0, 0.0, 0.0]]


def test_leave_one_out_by_hand():
    # 1 - (0 + 0.5)/2, 0 - 1.5/2, 0.5 - 1/2
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.5, 9.0]]), torch.tensor([[1, 1, 1, 0]]))
    assert advantages.tolist() == [pytest.approx([0.75, -0.75, 0.0, 0.0])]


def test_reinforce_plus_plus_by_hand():
    # centered 1/2, -1/2 | 1, -1; tokens 1, 3 | 2, 2: mean (1/2 - 3/2 + 2 - 2)/8 = -1/8
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    tokens = torch.tensor([[1, 3], [2, 2]])
    centered = torch.tensor([0.625, -0.375, 1.125, -0.875], dtype=torch.float64)
    variance = (centered.square() * torch.tensor([1, 3, 2, 2])).sum() / 8
    advantages = reinforce_plus_plus_advantages(rewards, torch.ones(2, 2), tokens)
    torch.testing.assert_close(advantages.flatten(), centered / (variance.sqrt() + 1e-4))


groups = st.integers(2, 64).flatmap(
    lambda g: st.lists(
        st.tuples(
            st.lists(st.floats(-10, 10), min_size=g, max_size=g), st.lists(st.booleans(), min_size=g, max_size=g)
        ),
        min_size=1,
        max_size=4,
    )
)


@given(groups)
def test_whatever_the_groups_advantages_are_finite_and_leave_out_what_is_not_scored(groups):
    rewards = torch.tensor([rewards for rewards, _ in groups], dtype=torch.float64)
    scored = torch.tensor([scored for _, scored in groups])
    tokens = torch.ones_like(scored, dtype=torch.int64)
    hidden = torch.where(scored, rewards, torch.nan)
    comparable = scored & (scored.sum(-1, keepdim=True) >= 2)
    for advantages in (
        *(group_advantages(hidden, scored, scale_rewards=scale) for scale in ("group", "batch", "none")),
        leave_one_out_advantages(hidden, scored),
        reinforce_plus_plus_advantages(hidden, scored, tokens),
    ):
        assert torch.isfinite(advantages).all()
        assert not advantages[~comparable].any()
        assert abs(advantages.sum().item()) < 1e-5, "better and worse than the baseline balance"


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7])
def test_equal_rewards_give_exactly_zero_whatever_the_estimator(reward):
    rewards, scored = torch.full((2, 5), reward), torch.ones(2, 5)
    assert not group_advantages(rewards, scored, scale_rewards="batch").any()
    assert not leave_one_out_advantages(rewards, scored).any()
    assert not reinforce_plus_plus_advantages(rewards, scored, torch.ones(2, 5, dtype=torch.int64)).any()
