"""Advantages and losses of a critic against hand-worked values, plain loops and their defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.grpo.values import clipped_value_loss, explained_variance, generalized_advantages, whitened

numbers = st.floats(-3.0, 3.0)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def episodes_of(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def test_three_tokens_by_hand():
    # deltas: 0 + .5 * .4 - .2 = 0;  0 + .5 * .8 - .4 = 0;  1 - .8 = .2
    # gamma lam = .25: A3 = .2; A2 = 0 + .25 * .2 = .05; A1 = 0 + .25 * .05 = .0125
    advantages = generalized_advantages(f64(0, 0, 1), f64(0.2, 0.4, 0.8), episodes_of(3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == pytest.approx([0.0125, 0.05, 0.2], rel=1e-12, abs=1e-15)


def test_rewards_on_the_way_by_hand():
    # deltas: -1 + 1 - 2 = -2;  3 - 1 = 2.  gamma 1, lam .5: A2 = 2; A1 = -2 + .5 * 2 = -1
    advantages = generalized_advantages(f64(-1, 3), f64(2, 1), episodes_of(2), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [-1.0, 2.0]


def test_completions_do_not_see_one_another():
    rewards, values = f64(1, 5, 0, 2), f64(0.5, 1, -1, 0.25)
    together = generalized_advantages(rewards, values, episodes_of(1, 2, 1), gamma=0.9, lam=0.7)
    alone = [
        generalized_advantages(rewards[part], values[part], episodes_of(part.stop - part.start), gamma=0.9, lam=0.7)
        for part in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    assert torch.equal(together, torch.cat(alone))


def test_numbers_of_completions_may_be_left_out():
    """One without a token that trains has a number all the same."""
    rewards, values = f64(1, 5, 0), f64(0.5, 1, -1)
    gaps = generalized_advantages(rewards, values, torch.tensor([0, 3, 3]), gamma=0.9, lam=0.7)
    assert torch.equal(gaps, generalized_advantages(rewards, values, episodes_of(1, 2), gamma=0.9, lam=0.7))


@settings(deadline=None)  # another process may have the core
@given(
    st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([1.0, 0.99, 0.3]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_it_is_the_sum_of_equation_16(episodes, gamma, lam):
    rewards, values = (f64(*(pair[k] for episode in episodes for pair in episode)) for k in (0, 1))
    expected = []
    for episode in episodes:
        deltas = [
            reward + gamma * (episode[t + 1][1] if t + 1 < len(episode) else 0.0) - value
            for t, (reward, value) in enumerate(episode)
        ]
        expected += [
            sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
    found = generalized_advantages(rewards, values, episodes_of(*map(len, episodes)), gamma=gamma, lam=lam)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9))
def test_with_lam_1_the_critic_only_shifts(episode):
    """Advantage plus value is then the rewards that follow, whatever the critic says."""
    rewards, values = f64(*(r for r, _ in episode)), f64(*(v for _, v in episode))
    advantages = generalized_advantages(rewards, values, episodes_of(len(episode)), gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages + values, rewards.flip(0).cumsum(0).flip(0))


def test_no_gradient_flows_into_the_critic():
    values = f64(0.2, 0.4).requires_grad_()
    assert not generalized_advantages(f64(0, 1), values, episodes_of(2), gamma=1.0, lam=1.0).requires_grad


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=30))
def test_whitened_has_mean_0_and_at_most_deviation_1(values):
    white = whitened(f64(*values))
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.std(correction=0).item() <= 1 + 1e-9
    if f64(*values).std(correction=0) > 0.1:
        assert white.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_whitened_by_hand_and_of_equals():
    # mean 2, deviations -1, 1, variance 1
    assert whitened(f64(1, 3)).tolist() == pytest.approx([-1.0, 1.0], rel=1e-7)
    assert whitened(f64(0.7, 0.7, 0.7)).abs().max() < 1e-9


def test_value_loss_by_hand():
    # c = .2.  1: inside: (.1 - 1)^2 = .81.  2: V .5 left 0 towards the return 1: clipped to .2, (.2 - 1)^2 = .64 is the
    # larger. 3: V -.5 left 0 away from the return: (-.5 - 1)^2 = 2.25 is the larger, no clip.
    values = f64(0.1, 0.5, -0.5).requires_grad_()
    found = clipped_value_loss(values, f64(0, 0, 0), f64(1, 1, 1), f64(0.5, 0.25, 0.25), cliprange_value=0.2)
    assert found.loss.item() == pytest.approx(0.5 * (0.5 * 0.81 + 0.25 * 0.64 + 0.25 * 2.25), rel=1e-12)
    assert found.clipped_T.tolist() == [False, True, False]
    found.loss.backward()
    # w (V - R); none where it is clipped
    assert values.grad.tolist() == pytest.approx([0.5 * -0.9, 0.0, 0.25 * -1.5], rel=1e-12)


def test_before_the_first_update_nothing_is_clipped():
    values = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    returns, weights = values.flip(0), torch.full((20,), 1 / 20, dtype=torch.float64)
    found = clipped_value_loss(values, values, returns, weights, cliprange_value=0.2)
    assert not found.clipped_T.any()
    assert found.loss.item() == pytest.approx(0.5 * (values - returns).square().mean().item(), rel=1e-12)


def test_value_loss_has_the_gradient_of_its_value():
    generator = torch.Generator().manual_seed(1)
    new, old, returns = (torch.randn(12, dtype=torch.float64, generator=generator) for _ in range(3))
    weights = torch.rand(12, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda v: clipped_value_loss(v, old, returns, weights, cliprange_value=0.3).loss, new.requires_grad_()
    )


def test_explained_variance():
    returns = f64(0, 1, 0, 1)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(f64(5, 5, 5, 5), returns) == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(f64(0, 1), f64(1, 1)))
