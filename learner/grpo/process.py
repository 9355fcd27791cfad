"""Advantages by process supervision: what each step of a completion earned, against all steps of its group.

Tensor functions only, in float64 inside, so that equal rewards give advantages of exactly zero.

Shapes: P groups, N completions that train, C all their tokens, one completion after the other and each in its order;
K of the tokens are the last of a step. What comes after a completion's last step has advantage 0: nobody judged it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.grpo.advantages import STD_EPSILON


def process_advantages(step_rewards_C: Tensor, completion_C: Tensor, group_N: Tensor, *, scale_rewards: bool) -> Tensor:
    """Give every token the normalized rewards of the steps that end at or after it.

        r~_k = (r_k - mean(r)) / (std(r) + 1e-4),   A_t = sum_{k: end(k) >= t} r~_k

    DeepSeekMath (arXiv 2402.03300), section 4.1.3: mean and deviation (ddof 1) are over all steps of all completions of
    the group. With one step per completion, at its last token, it is outcome supervision (`group_advantages`).

    Args:
        step_rewards_C: [C] NaN where no step ends.
        completion_C: [C] int, the completion of each token, never falling.
        group_N: [N] int, the group of each completion. Those of a group with fewer than two get 0.
        scale_rewards: whether to divide by the deviation.

    Returns:
        [C] float64.
    """
    ends_C = ~step_rewards_C.isnan()
    completion_K = completion_C[ends_C]
    counts_P = torch.bincount(group_N)
    comparable_K = (counts_P >= 2)[group_N][completion_K]
    normalized_K = _normalized(step_rewards_C[ends_C].double(), group_N[completion_K], scale_rewards=scale_rewards)
    to_come_K = _sums_to_come(torch.where(comparable_K, normalized_K, 0.0), completion_K, group_N.numel())
    # The first step that ends at or after a token, among the K; the last token's may be behind all of them.
    next_C = ends_C.cumsum(0) - ends_C.long()
    ahead_C = next_C < completion_K.numel()
    ahead_C[ahead_C.clone()] = completion_K[next_C[ahead_C]] == completion_C[ahead_C]
    advantages_C = torch.zeros(step_rewards_C.numel(), dtype=torch.float64)
    advantages_C[ahead_C] = to_come_K[next_C[ahead_C]]
    return advantages_C


def _normalized(rewards_K: Tensor, group_K: Tensor, *, scale_rewards: bool) -> Tensor:
    """Shift each group's rewards to mean 0, and scale them to deviation 1."""
    count_P = torch.bincount(group_K)
    mean_P = torch.zeros(count_P.numel(), dtype=torch.float64).index_add_(0, group_K, rewards_K) / count_P.clamp(min=1)
    centered_K = rewards_K - mean_P[group_K]
    if not scale_rewards:
        return centered_K
    squares_P = torch.zeros_like(mean_P).index_add_(0, group_K, centered_K.square())
    return centered_K / ((squares_P / (count_P - 1).clamp(min=1)).sqrt() + STD_EPSILON)[group_K]


def _sums_to_come(values_K: Tensor, completion_K: Tensor, num_completions: int) -> Tensor:
    """[K] each value and those after it in its completion: summed from the end, so that none leaks into another's."""
    counts_N = torch.bincount(completion_K, minlength=num_completions)
    place_K = torch.arange(completion_K.numel()) - (counts_N.cumsum(0) - counts_N)[completion_K]
    values_NS = torch.zeros(num_completions, int(counts_N.max()), dtype=torch.float64)
    values_NS[completion_K, place_K] = values_K
    return values_NS.flip(1).cumsum(1).flip(1)[completion_K, place_K]
