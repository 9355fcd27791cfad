"""Soft overlong punishment by hand."""

from __future__ import annotations

import torch

from learner.grpo.overlong import soft_overlong_punishment


def test_it_falls_over_the_cache_and_nowhere_else():
    lengths = torch.tensor([0, 60, 80, 81, 90, 100])
    punishment = soft_overlong_punishment(lengths, max_completion_length=100, soft_punish_cache=20)
    torch.testing.assert_close(punishment, torch.tensor([0.0, 0.0, 0.0, -0.05, -0.5, -1.0], dtype=torch.float64))
