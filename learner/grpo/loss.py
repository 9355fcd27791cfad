"""The GRPO loss, to be read beside DeepSeekMath (arXiv 2402.03300), eq. 3.

    J = 1/G sum_i 1/|o_i| sum_t { min[ rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i ] - beta KL_it(pi || pi_ref) }

Token by token that is a weighted sum, loss = - sum_t w_t { ... }, and the weights follow from the lengths alone. So
they are computed once per step, for all of its tokens, and the losses of micro-batches simply add up to the loss of
the step, however unequal they are: `token_weights` makes the weights, `grpo_loss` the sum.

This file knows tensors and nothing else: no configuration, no message, no model. Only tokens that train come here:
those whose loss_mask is 0, and those of aborted or unscored completions, were left out before (model/packing.py).

Shapes: P groups (prompts), N completions that train, T tokens that train, packed one after the other.
Logprobs are natural logarithms of softmax(logits / temperature):
    policy      under the weights being trained; the only ones with a gradient
    behavior    under the weights that sampled, given by the engine
    proximal    under the weights at the start of the step (decoupled PPO)
    reference   under the frozen initial weights
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learner.grpo.corrections import truncated_behavior_weight
from learner.grpo.kl import kl_k3

LossType = Literal["grpo", "dapo"]


def token_weights(loss_type: LossType, completion_T: Tensor, group_N: Tensor) -> Tensor:
    """Compute what share of the step's loss each token has. The weights of a step sum to 1.

        grpo   w_t = 1/P 1/G 1/|o_i|   mean over the tokens of a completion, over the completions of a group, over
                                       groups (DeepSeekMath, eq. 3)
        dapo   w_t = 1 / sum_i |o_i|   mean over all tokens of the step: a token of a long completion counts as much
                                       as one of a short completion (DAPO, arXiv 2503.14476, eq. 8, taken over the step)

    P, G and |o_i| count only what has a token that trains.

    Args:
        loss_type: which mean.
        completion_T: [T] int, the completion (0 <= . < N) that each token belongs to.
        group_N: [N] int, the group (0 <= . < P) that each completion belongs to.

    Returns:
        [T] float32.
    """
    if loss_type == "dapo":
        return torch.full(completion_T.shape, 1.0 / completion_T.numel(), device=completion_T.device)
    tokens_N = torch.bincount(completion_T, minlength=group_N.numel())
    completions_P = torch.bincount(group_N[tokens_N > 0])
    num_groups = (completions_P > 0).sum()
    return 1.0 / (num_groups * completions_P[group_N[completion_T]] * tokens_N[completion_T])


def clipped_surrogate(ratio_T: Tensor, advantages_T: Tensor, *, epsilon: float, epsilon_high: float) -> Tensor:
    """Compute the clipped objective of PPO at every token (to be maximized).

        min[ rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t ]

    PPO (arXiv 1707.06347), eq. 7; a wider upper range is DAPO's clip-higher (arXiv 2503.14476, eq. 10). Where the
    clipped term is the smaller one the gradient is zero: the token has moved far enough in the wanted direction.

    Args:
        ratio_T: [T] rho, policy over anchor.
        advantages_T: [T] the advantage of each token's completion.
        epsilon: lower range.
        epsilon_high: upper range.

    Returns:
        [T].
    """
    clipped_T = ratio_T.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    return torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


class TokenLoss(NamedTuple):
    """The loss of some tokens of a step, and what its parts were."""

    loss: Tensor
    """[] their share of the step's loss; carries the gradient."""
    ratio_T: Tensor
    """[T] rho: policy over anchor."""
    behavior_weight_T: Tensor | None
    """[T] the truncated importance weight; None with the behavior anchor."""
    kl_T: Tensor | None
    """[T] KL to the reference; None without one."""


def grpo_loss(
    policy_logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    proximal_logprobs_T: Tensor | None = None,
    importance_sampling_clip_max: float | None = None,
    reference_logprobs_T: Tensor | None = None,
    beta: float = 0.0,
) -> TokenLoss:
    """Compute the loss of any part of a step's tokens.

    With the behavior anchor, rho is taken against the policy that sampled: eq. 3 as it is. With the proximal anchor
    (decoupled PPO, arXiv 2110.00641, eq. 8; AReaL, arXiv 2505.24298) rho is taken against the policy at the start of
    the step, and the surrogate is weighted by what that policy thinks of tokens that another one sampled:

        loss = - sum_t w_t { behavior_weight_t min[...] - beta KL_t }

    Args:
        policy_logprobs_T: [T] with gradient.
        behavior_logprobs_T: [T].
        advantages_T: [T] each token's completion's advantage.
        weights_T: [T] from `token_weights`, of the whole step.
        epsilon: lower clip range.
        epsilon_high: upper clip range.
        proximal_logprobs_T: [T] given: the proximal anchor. With one update per step, the detached policy logprobs.
        importance_sampling_clip_max: truncation of the behavior weight; None for no weight. Proximal anchor only.
        reference_logprobs_T: [T] given: the KL penalty is part of the loss.
        beta: coefficient of the KL.

    Returns:
        The loss and its parts.
    """
    anchor_logprobs_T = behavior_logprobs_T if proximal_logprobs_T is None else proximal_logprobs_T
    ratio_T = torch.exp(policy_logprobs_T - anchor_logprobs_T.detach())
    objective_T = clipped_surrogate(ratio_T, advantages_T, epsilon=epsilon, epsilon_high=epsilon_high)

    behavior_weight_T = None
    if proximal_logprobs_T is not None and importance_sampling_clip_max is not None:
        behavior_weight_T = truncated_behavior_weight(
            proximal_logprobs_T, behavior_logprobs_T, importance_sampling_clip_max=importance_sampling_clip_max
        )
        objective_T = behavior_weight_T * objective_T

    kl_T = None
    if reference_logprobs_T is not None:
        kl_T = kl_k3(policy_logprobs_T, reference_logprobs_T)
        objective_T = objective_T - beta * kl_T

    return TokenLoss(-(weights_T * objective_T).sum(), ratio_T, behavior_weight_T, kl_T)
