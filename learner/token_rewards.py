"""Objectives that judge tokens, not completions: PPO's critic, and process rewards.

Shapes: P groups, G generations, N completions that train, C all their tokens, T those of the C that train.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.grpo.overlong import soft_overlong_punishment
from learner.grpo.process import process_advantages
from learner.grpo.values import generalized_advantages, whitened
from learner.model.packing import StepTokens


class JudgedTokens(NamedTuple):
    """What a step's tokens are worth to a critic, float32."""

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

    A step's reward comes with its last token, or the one before that which trains; an outcome, and the punishment for
    length, with the completion's last. The KL is taken off at each token (InstructGPT, arXiv 2203.02155, eq. 2).

    Args:
        step: all of it.
        values_T: [T] of the critic at the start of the step.
        config: gamma, lam, and how rewards are shaped.
        beta: coefficient of the KL.
        kl_T: [T] k1, where it is part of the reward.
    """
    completion_T, completion_C = torch.from_numpy(step.completion_T), _completion_of_tokens(step)
    rewards_T = torch.zeros(completion_T.numel(), dtype=torch.float64)
    acted_C = torch.from_numpy(step.trained_C).cumsum(0) - 1  # the last token that trains up to here
    ends_C = (acted_C >= 0) & ~torch.from_numpy(step.step_rewards_C).isnan()
    ends_C &= completion_T[acted_C.clamp(min=0)] == completion_C  # before its first one nobody earned anything
    rewards_T.index_add_(0, acted_C[ends_C], torch.from_numpy(step.step_rewards_C)[ends_C].double())
    last_T = _last_of(completion_T)
    rewards_T[last_T] += overlong_punishment(step, config)[completion_T[last_T]]
    if kl_T is not None:
        rewards_T -= beta * kl_T.double().cpu()
    raw_T = generalized_advantages(rewards_T, values_T, completion_T, gamma=config.gamma, lam=config.lam)
    advantages_T = whitened(raw_T).float()
    return JudgedTokens(advantages_T, (raw_T + values_T).float(), _means(advantages_T, step))


def judge_steps(step: StepTokens, config: LearnerConfig) -> tuple[Tensor, Tensor]:
    """Compare what each step earned with all steps of the group.

    The punishment for length is part of what a completion's last step earned.

    Args:
        step: all of it.
        config: whether to divide by the deviation, and how rewards are shaped.

    Returns:
        Advantages [T] and, for samples/, their means over the tokens of each completion [P, G]; float32.
    """
    completion_C = _completion_of_tokens(step)
    step_rewards_C = torch.from_numpy(step.step_rewards_C).double()
    place_K = (~step_rewards_C.isnan()).nonzero()[:, 0]
    last_K = place_K[_last_of(completion_C[place_K])]
    step_rewards_C[last_K] += overlong_punishment(step, config)[completion_C[last_K]]
    advantages_C = process_advantages(
        step_rewards_C, completion_C, torch.from_numpy(step.group_N), scale_rewards=config.reward_scale == "group"
    )
    advantages_T = advantages_C[torch.from_numpy(step.trained_C)].float()
    return advantages_T, _means(advantages_T, step)


def overlong_punishment(step: StepTokens, config: LearnerConfig) -> Tensor:
    """Compute what completions that come near their limit lose, [N] float64; zeros where it is not configured."""
    if not config.soft_punish_cache:
        return torch.zeros(step.lengths_N.size, dtype=torch.float64)
    return soft_overlong_punishment(
        torch.from_numpy(step.lengths_N),
        max_completion_length=config.max_completion_length,
        soft_punish_cache=config.soft_punish_cache,
    )


def _completion_of_tokens(step: StepTokens) -> Tensor:
    """[C] which of the N completions a token is of."""
    lengths_N = torch.from_numpy(step.lengths_N)
    return torch.repeat_interleave(torch.arange(lengths_N.numel()), lengths_N)


def _last_of(completion: Tensor) -> Tensor:
    """Whether an entry is the last of its completion; entries of one come together."""
    last = torch.ones_like(completion, dtype=torch.bool)
    last[:-1] = completion[1:] != completion[:-1]
    return last


def _means(advantages_T: Tensor, step: StepTokens) -> Tensor:
    """[P, G] means over the tokens of each completion; 0 where none trains."""
    completion_T, trains_PG = torch.from_numpy(step.completion_T), torch.from_numpy(step.trains_PG)
    means_PG = torch.zeros(trains_PG.shape)
    sums_N = torch.zeros(step.lengths_N.size).index_add_(0, completion_T, advantages_T.cpu())
    means_PG[trains_PG] = sums_N / torch.bincount(completion_T, minlength=sums_N.numel()).clamp(min=1)
    return means_PG
