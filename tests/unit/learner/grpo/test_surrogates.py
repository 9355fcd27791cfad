"""Every surrogate at points worked by hand, and its slope."""

from __future__ import annotations

import math

import pytest
import torch

from learner.grpo.surrogates import cispo_surrogate, clipped_surrogate, sapo_surrogate, sequence_ratio, token_ratio

WIDE = {"epsilon": 0.2, "epsilon_high": 0.28}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "delta", "expected", "slope"),
    [
        (1.0, 2.0, None, 2.0, 2.0),
        (1.5, 2.0, None, 2.56, 0.0),  # clipped above: 1.28 x 2
        (0.5, 2.0, None, 1.0, 2.0),  # moved the wrong way: pulls back at full strength
        (0.5, -2.0, None, -1.6, 0.0),  # clipped below: 0.8 x -2
        (1.5, -2.0, None, -3.0, -2.0),  # moved the wrong way
        (1.25, 2.0, None, 2.5, 2.0),  # inside the wider upper range
        (5.0, -2.0, 3.0, -6.0, 0.0),  # dual clip: not below 3 x -2
        (2.5, -2.0, 3.0, -5.0, -2.0),  # below delta nothing changes
        (5.0, 2.0, 3.0, 2.56, 0.0),  # a positive advantage meets the upper range first
    ],
)
def test_clipped_by_hand(ratio, advantage, delta, expected, slope):
    rho = f64(ratio).requires_grad_()
    objective = clipped_surrogate(rho, f64(advantage), **WIDE, delta=delta)
    objective.backward()
    assert objective.item() == pytest.approx(expected)
    assert rho.grad.item() == slope


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.0, 2.0, 1.0), (0.1, 2.0, 0.1), (7.0, 2.0, 5.0), (7.0, -2.0, 5.0)]
)
def test_cispo_by_hand(ratio, advantage, weight):
    """The weight is truncated and has no gradient; the token always has one, weight x advantage."""
    behavior = f64(-1.5)
    policy = (behavior + math.log(ratio)).requires_grad_()
    objective = cispo_surrogate(policy, token_ratio(policy, behavior), f64(advantage), epsilon_high=5.0)
    objective.backward()
    assert objective.item() == pytest.approx(weight * advantage * policy.item())
    assert policy.grad.item() == pytest.approx(weight * advantage)


def test_sapo_by_hand():
    # on policy: 4/tau x 1/2 x A; slope A. At rho 2, tau 1: 4 sigmoid(1) A, slope 4 s (1 - s) A
    rho = f64(1.0, 1.0, 2.0).requires_grad_()
    advantages = f64(2.0, -2.0, 1.0)
    objective = sapo_surrogate(rho, advantages, temperature_positive=1.0, temperature_negative=1.05)
    s = 1 / (1 + math.exp(-1))
    assert objective.tolist() == pytest.approx([4.0, 2 / 1.05 * -2.0, 4 * s])
    objective.sum().backward()
    assert rho.grad.tolist() == pytest.approx([2.0, -2.0, 4 * s * (1 - s)])


def test_the_ratio_of_a_completion_is_a_geometric_mean():
    behavior = f64(0.5, 0.5, 0.1).log()
    policy = f64(0.25, 0.25 * 4, 0.2).log().requires_grad_()
    ratio = sequence_ratio(policy, behavior, torch.tensor([0, 0, 1]))
    assert ratio.tolist() == pytest.approx([1.0, 1.0, 2.0])
    ratio[:2].sum().backward()
    assert policy.grad.tolist() == pytest.approx([1.0, 1.0, 0.0]), "2 tokens x s_i x 1/|o_i|"


def test_no_gradient_reaches_an_anchor():
    anchor = f64(-1.0, -2.0).requires_grad_()
    policy = f64(-1.0, -1.0).requires_grad_()
    assert not token_ratio(policy.detach(), anchor).requires_grad
    assert not sequence_ratio(policy.detach(), anchor, torch.tensor([0, 0])).requires_grad


def test_gradcheck():
    """Away from the kinks, every surrogate's gradient is its derivative (CISPO's is by design not)."""
    advantages = f64(1.3, -0.7, 0.9, -1.1)
    rho = f64(0.9, 1.1, 0.5, 3.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: clipped_surrogate(r, advantages, **WIDE, delta=3.0), rho)
    temperatures = {"temperature_positive": 1.0, "temperature_negative": 1.05}
    assert torch.autograd.gradcheck(lambda r: sapo_surrogate(r, advantages, **temperatures), rho)
    completion = torch.tensor([0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda p: sequence_ratio(p, advantages, completion), rho)
