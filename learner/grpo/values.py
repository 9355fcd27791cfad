"""What a critic is for: advantages token by token (PPO), and the loss that the critic itself is trained by.

GRPO does without: it compares completions of one prompt. Tensor functions only.

Shapes: T tokens that train, each completion's one after the other and in its order. The state s_t is the prompt and
the tokens before t, V(s_t) what the critic expects of it. A completion is an episode and ends with its last token,
after which nothing is expected: truncated ones, too, because their reward was given for what is there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WHITENING_EPSILON = 1e-8
"""Added to the variance: equal advantages become 0."""


class ValueLoss(NamedTuple):
    """The loss of some values, and where it was cut off."""

    loss: Tensor
    """[] their share of the update's; carries the gradient."""
    clipped_T: Tensor
    """[T] bool: the value has moved far enough, no gradient."""


def generalized_advantages(
    rewards_T: Tensor, values_T: Tensor, completion_T: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Estimate how much better each token was than the critic expected.

        A_t = sum_l (gamma lam)^l delta_{t+l},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    GAE (arXiv 1506.02438), eq. 16; PPO (arXiv 1707.06347), eq. 11 and 12. lam 1 is the return minus the value, without
    the critic's bias; lam 0 is the temporal difference alone, of the least variance. A_t + V(s_t) is what the critic
    is to learn.

    Args:
        rewards_T: [T] given for each token; an outcome at its completion's last.
        values_T: [T] V(s_t).
        completion_T: [T] int, the completion of each token, never falling.
        gamma: discount of a token.
        lam: lambda.

    Returns:
        [T] float64, without gradient.
    """
    completion_T = completion_T.cpu()
    _, lengths_N = torch.unique_consecutive(completion_T, return_counts=True)
    row_T = torch.repeat_interleave(torch.arange(lengths_N.numel()), lengths_N)
    column_T = torch.arange(completion_T.numel()) - (lengths_N.cumsum(0) - lengths_N)[row_T]
    rewards_LN, values_LN = (_padded(t, column_T, row_T, lengths_N) for t in (rewards_T, values_T))
    next_values_LN = torch.cat([values_LN[1:], torch.zeros_like(values_LN[:1])])
    delta_LN = rewards_LN + gamma * next_values_LN - values_LN
    for t in reversed(range(len(delta_LN) - 1)):  # behind its end a completion has only zeros to hand on
        delta_LN[t] += gamma * lam * delta_LN[t + 1]
    return delta_LN[column_T, row_T].to(values_T.device)


def whitened(advantages_T: Tensor) -> Tensor:
    """Shift and scale to mean 0 and deviation 1 (ddof 0) over all tokens, [T] in the same dtype.

    No paper's equation; implementations of PPO for language models all do it, over the step rather than a mini-batch.
    """
    centered_T = advantages_T - advantages_T.mean()
    return centered_T * torch.rsqrt(centered_T.square().mean() + WHITENING_EPSILON)


def clipped_value_loss(
    policy_values_T: Tensor, values_T: Tensor, returns_T: Tensor, weights_T: Tensor, *, cliprange_value: float
) -> ValueLoss:
    """Compute the squared error of the critic, without reward for moving far in one step.

        1/2 sum_t w_t max[ (V_t - R_t)^2, (clip(V_t, V_old - c, V_old + c) - R_t)^2 ]

    PPO (arXiv 1707.06347), eq. 9, L^VF; the clip is that of its authors' implementation (OpenAI baselines).

    Args:
        policy_values_T: [T] V, under the critic's weights that are being trained; with gradient.
        values_T: [T] V_old, at the start of the step.
        returns_T: [T] R: advantages, not whitened, plus V_old.
        weights_T: [T] from `token_weights`, of the whole update.
        cliprange_value: c.
    """
    near_T = torch.clamp(policy_values_T, values_T - cliprange_value, values_T + cliprange_value)
    error_T, near_error_T = (policy_values_T - returns_T).square(), (near_T - returns_T).square()
    return ValueLoss(0.5 * (weights_T * torch.maximum(error_T, near_error_T)).sum(), near_error_T > error_T)


def explained_variance(values_T: Tensor, returns_T: Tensor) -> float:
    """Compute 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant; NaN where all returns are equal."""
    variance = returns_T.var(correction=0)
    return (1.0 - (returns_T - values_T).var(correction=0) / variance).item() if variance > 0 else float("nan")


def _padded(values_T: Tensor, column_T: Tensor, row_T: Tensor, lengths_N: Tensor) -> Tensor:
    """[L, N] float64 on the CPU: thousands of small additions, one after the other, are no work for a GPU."""
    values_LN = torch.zeros(int(lengths_N.max()), lengths_N.numel(), dtype=torch.float64)
    values_LN[column_T, row_T] = values_T.detach().double().cpu()
    return values_LN
