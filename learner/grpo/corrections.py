"""Corrections for tokens that an older policy, or another implementation of the same policy, has sampled.

    w = pi_proximal / pi_behavior     of the token, of the whole completion, or geometric mean over the completion

A correction multiplies a token's surrogate by w truncated (bounded variance for a small bias) or masked (what is out of
range does not train at all). By the names of the field:

    token, truncated     TIS: truncated importance sampling (Ionides 2008; decoupled PPO, arXiv 2110.00641, eq. 8)
    token, masked        IcePop (Ling, "Small leak can sink a great ship", 2025): alpha <= w <= beta
    sequence, masked     MIS: masked importance sampling (Liu et al., "When speed kills stability", 2025)
    second moment        M2PO (arXiv 2510.01161)

Tensor functions only, without gradient: a weight is nothing to optimize. Shapes: T tokens that train.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.grpo.aggregation import completion_means, completion_sums

Level = Literal["token", "sequence", "geometric"]


def importance_ratio(
    proximal_logprobs_T: Tensor, behavior_logprobs_T: Tensor, completion_T: Tensor, *, level: Level
) -> Tensor:
    """Compute how much likelier the proximal policy is to sample than the one that did.

        token       w_t = pi_prox(o_t) / pi_behavior(o_t)
        sequence    w_i = prod_t w_t
        geometric   w_i = (prod_t w_t)^(1/|o_i|)

    Args:
        proximal_logprobs_T: [T] log pi of the policy at the start of the step.
        behavior_logprobs_T: [T] log pi of the policy that sampled.
        completion_T: [T] int, tells completions apart; beyond the token level all tokens of each must be here.
        level: what is compared.

    Returns:
        [T], every token with its completion's beyond the token level.
    """
    log_ratio_T = proximal_logprobs_T.detach() - behavior_logprobs_T
    if level == "sequence":
        log_ratio_T = completion_sums(log_ratio_T, completion_T)
    elif level == "geometric":
        log_ratio_T = completion_means(log_ratio_T, completion_T)
    return torch.exp(log_ratio_T)


def truncated(ratio_T: Tensor, *, clip_min: float | None, clip_max: float) -> Tensor:
    """Bound the weights: clip(w, clip_min, clip_max), [T]."""
    return ratio_T.clamp(min=clip_min, max=clip_max)


def inside(ratio_T: Tensor, *, clip_min: float | None, clip_max: float) -> Tensor:
    """Tell where clip_min <= w <= clip_max, [T] bool."""
    inside_T = ratio_T <= clip_max
    return inside_T if clip_min is None else inside_T & (ratio_T >= clip_min)


def second_moment_inside(proximal_logprobs_T: Tensor, behavior_logprobs_T: Tensor, *, threshold: float) -> Tensor:
    """Leave out the tokens that moved most, as few as it takes to bound the second moment of the log ratio.

        M_2 = 1/|kept| sum_{t kept} (log pi_prox(o_t) / pi_behavior(o_t))^2  <=  threshold

    M2PO (arXiv 2510.01161): where a clip cuts every token outside a range, this cuts only outliers, and none
    while the batch as a whole is near the policy that sampled it.

    Args:
        proximal_logprobs_T: [T] all tokens of the step.
        behavior_logprobs_T: [T].
        threshold: of the second moment, in nats squared.

    Returns:
        [T] bool, whether the token is kept. Ties go by order.
    """
    square_T = (proximal_logprobs_T.detach() - behavior_logprobs_T).double().square()
    ascending_T, order_T = square_T.sort(stable=True)
    moment_T = ascending_T.cumsum(0) / torch.arange(1, square_T.numel() + 1, device=square_T.device)
    # Means of the smallest k grow with k: those within the bound come first.
    return torch.empty_like(order_T, dtype=torch.bool).scatter_(0, order_T, moment_T <= threshold)
