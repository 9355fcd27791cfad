"""Truncated importance weights."""

from __future__ import annotations

import pytest
import torch

from learner.grpo.corrections import truncated_behavior_weight


def test_by_hand():
    proximal = torch.tensor([0.5, 0.9, 0.1], dtype=torch.float64).log()
    behavior = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64).log()
    weights = truncated_behavior_weight(proximal, behavior, importance_sampling_clip_max=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.25])


def test_it_has_no_gradient():
    proximal = torch.zeros(3, requires_grad=True)
    weights = truncated_behavior_weight(proximal, torch.ones(3), importance_sampling_clip_max=2.0)
    assert not weights.requires_grad


def test_an_overflowing_ratio_is_truncated_too():
    weights = truncated_behavior_weight(torch.zeros(1), torch.full((1,), -200.0), importance_sampling_clip_max=3.0)
    assert weights.tolist() == [3.0]
