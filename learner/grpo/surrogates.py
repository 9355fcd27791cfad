"""Surrogates: what is to be maximized at every token, given how far the policy has moved from its anchor.

Tensor functions only, one equation each. rho is the ratio policy / anchor: of the token, or (GSPO) of its completion.
Shapes: T tokens that train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.grpo.aggregation import completion_means


def token_ratio(policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor) -> Tensor:
    """Compute rho_t = pi(o_t) / pi_anchor(o_t), [T]: PPO (arXiv 1707.06347), section 3. No gradient to the anchor."""
    return torch.exp(policy_logprobs_T - anchor_logprobs_T.detach())


def sequence_ratio(policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, completion_T: Tensor) -> Tensor:
    """Compute one ratio per completion, length-normalized; every token gets its completion's.

        s_i = exp( 1/|o_i| sum_t log pi(o_it) / pi_anchor(o_it) )

    GSPO (arXiv 2507.18071), eq. 7. Its gradient reaches all tokens of the completion.

    Args:
        policy_logprobs_T: [T] with gradient; whole completions.
        anchor_logprobs_T: [T].
        completion_T: [T] int, tells completions apart.

    Returns:
        [T].
    """
    return torch.exp(completion_means(policy_logprobs_T - anchor_logprobs_T.detach(), completion_T))


def clipped_surrogate(
    ratio_T: Tensor, advantages_T: Tensor, *, epsilon: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """Compute the clipped objective of PPO at every token.

        min[ rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t ]

    PPO (arXiv 1707.06347), eq. 7; a wider upper range is DAPO's clip-higher (arXiv 2503.14476, eq. 10). Where the
    clipped term is the smaller one the gradient is zero: the token has moved far enough in the wanted direction. With
    `delta` the first rho_t is min(rho_t, delta): a bound for A_t < 0, where the minimum has none (dual clip, arXiv
    1912.09729; two-sided clipping, INTELLECT-2, arXiv 2505.07291).

    Args:
        ratio_T: [T] rho.
        advantages_T: [T] the advantage of each token's completion.
        epsilon: lower range.
        epsilon_high: upper range.
        delta: above 1 + epsilon_high.

    Returns:
        [T].
    """
    clipped_T = ratio_T.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    if delta is not None:
        ratio_T = ratio_T.clamp(max=delta)
    return torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def cispo_surrogate(policy_logprobs_T: Tensor, ratio_T: Tensor, advantages_T: Tensor, *, epsilon_high: float) -> Tensor:
    """Compute CISPO's objective: REINFORCE with a truncated importance weight.

        sg[ min(rho_t, eps_high) ] A_t log pi(o_t)

    MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5, without a lower truncation; ScaleRL (arXiv 2510.13786) advises an
    eps_high of 5. No token loses its gradient, however far it has moved; sg stops the weight's own.

    Args:
        policy_logprobs_T: [T] with gradient.
        ratio_T: [T] rho.
        advantages_T: [T].
        epsilon_high: the largest weight itself, not a distance from 1.

    Returns:
        [T].
    """
    return ratio_T.detach().clamp(max=epsilon_high) * advantages_T * policy_logprobs_T


def sapo_surrogate(
    ratio_T: Tensor, advantages_T: Tensor, *, temperature_positive: float, temperature_negative: float
) -> Tensor:
    """Compute SAPO's objective: a smooth gate in place of the clip.

        4/tau sigmoid(tau (rho_t - 1)) A_t,   tau = tau_pos where A_t > 0, else tau_neg

    SAPO (arXiv 2511.20347). On policy its gradient is the policy gradient; it fades as rho leaves 1, sooner for a
    larger tau.

    Args:
        ratio_T: [T] rho.
        advantages_T: [T].
        temperature_positive: tau_pos.
        temperature_negative: tau_neg; larger, because lowering one token raises all others.

    Returns:
        [T].
    """
    tau_T = torch.where(advantages_T > 0, temperature_positive, temperature_negative).to(ratio_T.dtype)
    return 4.0 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1.0)) * advantages_T
