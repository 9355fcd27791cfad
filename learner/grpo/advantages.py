"""Advantages: how much better a completion is than the others sampled for the same prompt.

Tensor functions only. Shapes: P groups (prompts), G generations of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "none"]

STD_EPSILON = 1e-4
"""Added to the standard deviation: keeps the advantages of nearly equal rewards finite."""


def group_advantages(rewards_PG: Tensor, scored_PG: Tensor, *, scale_rewards: ScaleRewards = "group") -> Tensor:
    """Compare every reward with those of its group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)     scale_rewards="group": DeepSeekMath (arXiv 2402.03300), 4.1.2,
                                                    with the sample standard deviation (ddof 1)
        A_i =  r_i - mean(r)                        scale_rewards="none": Dr. GRPO (arXiv 2503.20783), section 3.2

    Completions that are not scored are outside the mean and the deviation. The sums are in float64, so that equal
    rewards give advantages of exactly zero.

    Args:
        rewards_PG: [P, G] float; whatever stands where `scored_PG` is 0 is ignored.
        scored_PG: [P, G] whether the completion counts. A group of fewer than G completions is filled up with 0.
        scale_rewards: whether to divide by the group's deviation.

    Returns:
        [P, G] in the dtype of the rewards; 0 for completions that are not scored, and for all of a group with fewer
        than two scored ones (one reward compares with nothing).
    """
    scored_PG = scored_PG.bool()
    count_P1 = scored_PG.sum(-1, keepdim=True)
    rewards = torch.where(scored_PG, rewards_PG.double(), 0.0)
    mean_P1 = rewards.sum(-1, keepdim=True) / count_P1.clamp(min=1)
    advantages = torch.where(scored_PG & (count_P1 >= 2), rewards - mean_P1, 0.0)
    if scale_rewards == "group":
        variance_P1 = advantages.square().sum(-1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        advantages = advantages / (variance_P1.sqrt() + STD_EPSILON)
    return advantages.to(rewards_PG.dtype)
