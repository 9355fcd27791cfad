"""The estimators against hand-worked values, an exact divergence and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from learner.grpo.kl import adapted_beta, kl_in_reward, kl_k1, kl_k2, kl_k3


def test_by_hand():
    # r = p/q = 2: k3 = 2 - 1 - log 2; r = 1/2: k3 = 1/2 - 1 + log 2; r = 1: 0
    q = torch.tensor([0.25, 0.5, 0.5], dtype=torch.float64).log()
    p = torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64).log()
    assert kl_k3(q, p).tolist() == pytest.approx([1 - math.log(2), -0.5 + math.log(2), 0.0], abs=1e-15)


def test_its_expectation_is_the_divergence():
    torch.manual_seed(0)
    q, p = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (q.exp() * (q - p)).sum()
    torch.testing.assert_close((q.exp() * kl_k3(q, p)).sum(), exact)


def test_it_is_never_negative_and_keeps_small_differences():
    q = torch.zeros(1000)
    p = torch.linspace(-1e-3, 1e-3, 1000)
    estimate = kl_k3(q, p)
    assert (estimate >= 0).all()
    torch.testing.assert_close(estimate, p.double().square().float() / 2, rtol=2e-3, atol=1e-9)


def test_gradients():
    torch.manual_seed(1)
    q = torch.randn(6, dtype=torch.float64, requires_grad=True)
    p = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kl_k3, (q, p))


def test_k1_and_k2_by_hand():
    q, p = torch.tensor([0.25, 0.5], dtype=torch.float64).log(), torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert kl_k1(q, p).tolist() == pytest.approx([-math.log(2), 0.0])
    assert kl_k2(q, p).tolist() == pytest.approx([math.log(2) ** 2 / 2, 0.0])


def test_k1_is_unbiased_and_k2_has_the_gradient_of_the_divergence():
    torch.manual_seed(0)
    logits, p = torch.randn(2, 50, dtype=torch.float64)
    logits.requires_grad_()
    p = p.log_softmax(-1)
    q = logits.log_softmax(-1)
    exact = (q.exp() * (q - p)).sum()
    torch.testing.assert_close((q.exp() * kl_k1(q, p)).sum(), exact)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (got,) = torch.autograd.grad((q.exp().detach() * kl_k2(q, p)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(got, expected)
    (nothing,) = torch.autograd.grad((q.exp().detach() * kl_k1(q, p)).sum(), logits)
    torch.testing.assert_close(nothing, torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0)


def test_what_a_reward_loses_is_the_sum_over_its_completion():
    kl = torch.tensor([0.1, 0.2, -0.5])
    assert kl_in_reward(kl, torch.tensor([0, 0, 2]), 3).tolist() == pytest.approx([0.3, 0.0, -0.5])


@pytest.mark.parametrize(
    ("kl", "beta"), [(0.1, 0.01), (0.11, 0.01 * 1.001), (1e9, 0.01 * 1.002), (0.0, 0.01 * 0.998), (-3.0, 0.01 * 0.998)]
)
def test_the_coefficient_follows_the_divergence_by_bounded_steps(kl, beta):
    # n/horizon = 1/100, and at most 20 percent of that
    assert adapted_beta(0.01, kl, target=0.1, horizon=6400, num_completions=64) == pytest.approx(beta, rel=1e-12)


def test_a_step_larger_than_the_horizon_never_turns_the_penalty_into_a_reward():
    assert adapted_beta(0.05, 0.05, target=0.1, horizon=64, num_completions=512) == pytest.approx(0.04)
