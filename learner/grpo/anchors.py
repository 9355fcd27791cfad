"""Anchors: the policy that the ratio is taken against.

    behavior   the policy that sampled (DeepSeekMath, arXiv 2402.03300, eq. 3)
    proximal   the policy at the start of the step (decoupled PPO, arXiv 2110.00641, eq. 8; AReaL, arXiv 2505.24298);
               with one update per step that is the policy itself, detached, and several updates compute it once

Tensor functions only. Shapes: T tokens that train.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loglinear_proximal_logprobs(
    policy_logprobs_T: Tensor, behavior_logprobs_T: Tensor, staleness_T: Tensor, *, progress: float
) -> Tensor:
    """Estimate the proximal logprobs without a forward pass: on the line from the behavior policy to the policy.

        log pi_prox = log pi_behavior + alpha (log pi - log pi_behavior),   alpha = s / (s + f)

    AReaL's log-linear approximation, with versions as the distance: the proximal policy is s versions from the one
    that sampled, and the policy is the fraction f of a version further. Before the first update (f = 0) the proximal
    policy is the policy itself.

    Args:
        policy_logprobs_T: [T].
        behavior_logprobs_T: [T].
        staleness_T: [T] s: versions between the weights that sampled the token and those at the start of the step.
        progress: f: updates of this step that are done / updates per step, 0 <= f < 1.

    Returns:
        [T], without gradient.
    """
    if progress == 0.0:
        return policy_logprobs_T.detach()
    alpha_T = (staleness_T / (staleness_T + progress)).to(policy_logprobs_T.dtype)
    return torch.lerp(behavior_logprobs_T.to(policy_logprobs_T.dtype), policy_logprobs_T.detach(), alpha_T)
