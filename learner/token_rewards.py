"""PPO's part of the objective: rewards where a critic wants them, and what it makes of them.

Shapes: P groups, G generations, N completions that train, T tokens that train.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.grpo.overlong import soft_overlong_punishment
from learner.grpo.values import generalized_advantages, whitened
from learner.model.packing import StepTokens


class JudgedTokens(NamedTuple):
    """What a step's tokens are worth, float32."""

    advantages_T: Tensor
    """Whitened over the step."""
    returns_T: Tensor
    """What the critic should have expected."""
    advantages_PG: Tensor
    """Means over the tokens of each completion; 0 where none trains."""


def judge_tokens(
    step: StepTokens, values_T: Tensor, config: LearnerConfig, *, beta: float, kl_T: Tensor | None
) -> JudgedTokens:
    """Compare what followed each token with what the critic expected before it.

    A completion's reward comes with its last token that trains; the KL is taken off at each (InstructGPT, arXiv
    2203.02155, eq. 2).

    Args:
        step: all of it.
        values_T: [T] of the critic at the start of the step.
        config: gamma, lam, and how rewards are shaped.
        beta: coefficient of the KL.
        kl_T: [T] k1, where it is part of the reward.
    """
    completion_T, trains_PG = torch.from_numpy(step.completion_T), torch.from_numpy(step.trains_PG)
    rewards_N = torch.from_numpy(step.rewards_PG)[trains_PG].double() + overlong_punishment(step, config)
    rewards_T = torch.zeros(completion_T.numel(), dtype=torch.float64)
    last_T = torch.cat([completion_T[1:] != completion_T[:-1], torch.ones(1, dtype=torch.bool)])
    rewards_T[last_T] = rewards_N[completion_T[last_T]]
    if kl_T is not None:
        rewards_T -= beta * kl_T.double().cpu()
    raw_T = generalized_advantages(rewards_T, values_T, completion_T, gamma=config.gamma, lam=config.lam)
    advantages_T = whitened(raw_T).float()
    advantages_PG = torch.zeros(trains_PG.shape)
    sums_N = torch.zeros(step.lengths_N.size).index_add_(0, completion_T, advantages_T.cpu())
    advantages_PG[trains_PG] = sums_N / torch.bincount(completion_T, minlength=sums_N.numel()).clamp(min=1)
    return JudgedTokens(advantages_T, (raw_T + values_T).float(), advantages_PG)


def overlong_punishment(step: StepTokens, config: LearnerConfig) -> Tensor:
    """Compute what completions that come near their limit lose, [N] float64; zeros where it is not configured."""
    if not config.soft_punish_cache:
        return torch.zeros(step.lengths_N.size, dtype=torch.float64)
    return soft_overlong_punishment(
        torch.from_numpy(step.lengths_N),
        max_completion_length=config.max_completion_length,
        soft_punish_cache=config.soft_punish_cache,
    )
