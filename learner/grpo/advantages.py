"""Advantages: how much better a completion is than the others sampled for the same prompt.

Tensor functions only, in float64 inside, so that equal rewards give advantages of exactly zero.

Shapes: P groups (prompts), G generations of a group; a group of fewer than G completions is filled up with 0. Whatever
stands where `scored_PG` is 0 is ignored and gets 0, and so does all of a group with fewer than two scored completions:
one reward compares with nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4
"""Added to every standard deviation: keeps the advantages of nearly equal rewards finite."""


def group_advantages(rewards_PG: Tensor, scored_PG: Tensor, *, scale_rewards: ScaleRewards = "group") -> Tensor:
    """Compare every reward with the mean of its group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)      scale_rewards="group": DeepSeekMath (arXiv 2402.03300), 4.1.2
        A_i = (r_i - mean(r)) / (std(all r) + 1e-4)  scale_rewards="batch": one deviation, of all rewards of the step
                                                     (Lite PPO, arXiv 2508.08221)
        A_i =  r_i - mean(r)                         scale_rewards="none": Dr. GRPO (arXiv 2503.20783), section 3.2

    Deviations are those of a sample (ddof 1).

    Args:
        rewards_PG: [P, G] float.
        scored_PG: [P, G] whether the completion counts.
        scale_rewards: whose deviation to divide by.

    Returns:
        [P, G] in the dtype of the rewards.
    """
    rewards, counts_PG = _comparable(rewards_PG, scored_PG)
    advantages = _centered(rewards, counts_PG)
    if scale_rewards == "group":
        variance_P1 = advantages.square().sum(-1, keepdim=True) / (counts_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
        advantages = advantages / (variance_P1.sqrt() + STD_EPSILON)
    elif scale_rewards == "batch":
        mean = rewards.sum() / counts_PG.sum().clamp(min=1)
        squares = torch.where(counts_PG, rewards - mean, 0.0).square().sum()
        advantages = advantages / ((squares / (counts_PG.sum() - 1).clamp(min=1)).sqrt() + STD_EPSILON)
    return advantages.to(rewards_PG.dtype)


def leave_one_out_advantages(rewards_PG: Tensor, scored_PG: Tensor) -> Tensor:
    """Compare every reward with the mean of the others in its group.

        A_i = r_i - 1/(G - 1) sum_{j != i} r_j  =  G/(G - 1) (r_i - mean(r))

    RLOO (arXiv 2402.14740); the baseline does not depend on the reward it is subtracted from, so it adds no
    bias.

    Args:
        rewards_PG: [P, G] float.
        scored_PG: [P, G] whether the completion counts; G is how many of a group do.

    Returns:
        [P, G] in the dtype of the rewards.
    """
    rewards, counts_PG = _comparable(rewards_PG, scored_PG)
    count_P1 = counts_PG.sum(-1, keepdim=True)
    advantages = _centered(rewards, counts_PG) * count_P1 / (count_P1 - 1).clamp(min=1)
    return advantages.to(rewards_PG.dtype)


def reinforce_plus_plus_advantages(rewards_PG: Tensor, scored_PG: Tensor, tokens_PG: Tensor) -> Tensor:
    """Compare every reward with the mean of its group, then whiten over all tokens of the step.

        A_i = (c_i - mean_t(c)) / (std_t(c) + 1e-4),   c_i = r_i - mean(r)

    REINFORCE++-baseline (arXiv 2501.03262): the deviation is that of the batch, so that one easy group does
    not blow its small differences up. mean_t and std_t (ddof 0) are over tokens: a completion counts as often as it
    has tokens that train.

    Args:
        rewards_PG: [P, G] float.
        scored_PG: [P, G] whether the completion counts.
        tokens_PG: [P, G] int, tokens that train.

    Returns:
        [P, G] in the dtype of the rewards.
    """
    rewards, counts_PG = _comparable(rewards_PG, scored_PG)
    centered = _centered(rewards, counts_PG)
    share_PG = torch.where(counts_PG, tokens_PG, 0).double()
    share_PG = share_PG / share_PG.sum().clamp(min=1)
    centered = torch.where(counts_PG, centered - (share_PG * centered).sum(), 0.0)
    std = (share_PG * centered.square()).sum().sqrt()
    return (centered / (std + STD_EPSILON)).to(rewards_PG.dtype)


def _comparable(rewards_PG: Tensor, scored_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards in float64, 0 where they do not count, and where they do: in groups with two scored ones or more."""
    scored_PG = scored_PG.bool()
    counts_PG = scored_PG & (scored_PG.sum(-1, keepdim=True) >= 2)
    return torch.where(counts_PG, rewards_PG.double(), 0.0), counts_PG


def _centered(rewards: Tensor, counts_PG: Tensor) -> Tensor:
    mean_P1 = rewards.sum(-1, keepdim=True) / counts_PG.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(counts_PG, rewards - mean_P1, 0.0)
