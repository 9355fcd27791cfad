"""Clip fractions and drift by hand."""

from __future__ import annotations

import math

import pytest
import torch

from learner.grpo.diagnostics import cispo_metrics, clip_metrics, effective_sample_size, policy_kl, ratio_metrics


def test_only_a_clip_that_cuts_the_gradient_counts():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0, 1.25, 0.81, 1.29])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    metrics = clip_metrics(ratio, advantages, epsilon=0.2, epsilon_high=0.28)
    # low: the first; high: the third and the last. 0.5 with a positive and 1.5 with a negative advantage still pull.
    assert metrics["clip_ratio/low_mean"] == 1 / 8
    assert metrics["clip_ratio/high_mean"] == 2 / 8
    assert metrics["clip_ratio/region_mean"] == 3 / 8
    assert ratio_metrics(ratio) == {"ratio/mean": pytest.approx(ratio.mean().item()), "ratio/max": 1.5}


def test_cispo_counts_truncated_weights():
    ratio, advantages = torch.tensor([6.0, 6.0, 4.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert cispo_metrics(ratio, advantages, epsilon_high=5.0) == {"cispo_clip_ratio": 1 / 4}


def test_effective_sample_size_by_hand():
    behavior = torch.zeros(4)
    assert effective_sample_size(behavior, behavior) == 1.0
    # weights 1, 1, 1, 3: 36 / (4 x 12)
    assert effective_sample_size(torch.tensor([0.0, 0.0, 0.0, math.log(3)]), behavior) == pytest.approx(0.75)
    assert effective_sample_size(torch.tensor([900.0, 0.0, 0.0, 0.0]), behavior) == 0.25, "nothing overflows"


def test_policy_kl_is_of_the_behavior_policy():
    behavior = torch.tensor([0.25, 0.5]).log()
    policy = torch.tensor([0.5, 0.5]).log()
    assert policy_kl(policy, behavior) == pytest.approx((1 - math.log(2)) / 2, rel=1e-6)
    assert policy_kl(behavior, behavior) == 0.0
