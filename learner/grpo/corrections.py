"""Corrections for tokens that an older policy, or another implementation of the same policy, has sampled.

Tensor functions only. Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_behavior_weight(
    proximal_logprobs_T: Tensor, behavior_logprobs_T: Tensor, *, importance_sampling_clip_max: float
) -> Tensor:
    """Weight tokens by how much likelier the proximal policy is to sample them than the one that did.

        w_t = min(pi_proximal(o_t) / pi_behavior(o_t), clip_max)

    The importance weight of decoupled PPO (arXiv 2110.00641, eq. 8; AReaL, arXiv 2505.24298, eq. 5), truncated from
    above as in truncated importance sampling (TIS; Ionides 2008), which bounds the variance for a small bias.

    Args:
        proximal_logprobs_T: [T] log pi of the anchor of the clipped ratio.
        behavior_logprobs_T: [T] log pi of the policy that sampled.
        importance_sampling_clip_max: the truncation.

    Returns:
        [T], without gradient: a weight, not a term to optimize.
    """
    ratio_T = torch.exp(proximal_logprobs_T.detach() - behavior_logprobs_T)
    return ratio_T.clamp(max=importance_sampling_clip_max)
