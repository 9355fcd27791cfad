"""The k3 estimator against hand-worked values, an exact divergence and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from learner.grpo.kl import kl_k3


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
