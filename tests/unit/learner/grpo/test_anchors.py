"""The log-linear estimate of the proximal policy."""

from __future__ import annotations

import pytest
import torch

from learner.grpo.anchors import loglinear_proximal_logprobs

POLICY, BEHAVIOR = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True), torch.tensor([-3.0, -3.0, -3.0])


def test_by_hand():
    # half a step further: alpha = s / (s + 1/2) = 0, 2/3, 4/5
    proximal = loglinear_proximal_logprobs(POLICY, BEHAVIOR, torch.tensor([0, 1, 2]), progress=0.5)
    assert proximal.tolist() == pytest.approx([-3.0, -3 + 2 * 2 / 3, -3 + 2 * 4 / 5])
    assert not proximal.requires_grad


def test_before_the_first_update_it_is_the_policy_itself():
    proximal = loglinear_proximal_logprobs(POLICY, BEHAVIOR, torch.tensor([0, 1, 2]), progress=0.0)
    assert torch.equal(proximal, POLICY)
    assert not proximal.requires_grad
