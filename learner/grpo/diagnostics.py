"""What to watch while training: clip fractions, drift from the behavior policy, sample size. TRL's metric names.

Tensor functions only. Shapes: T all tokens of the update that train; every mean is over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.grpo.kl import kl_k3


def ratio_metrics(ratio_T: Tensor) -> dict[str, float]:
    """Describe rho: how far the policy is from its anchor."""
    return {"ratio/mean": ratio_T.mean().item(), "ratio/max": ratio_T.max().item()}


def clip_metrics(ratio_T: Tensor, advantages_T: Tensor, *, epsilon: float, epsilon_high: float) -> dict[str, float]:
    """Compute the share of tokens whose gradient the clip has cut off.

    low: the ratio is below 1 - epsilon and the advantage negative (already pushed down enough); high: above
    1 + epsilon_high and the advantage positive; region: either.
    """
    low_T = (ratio_T < 1.0 - epsilon) & (advantages_T < 0)
    high_T = (ratio_T > 1.0 + epsilon_high) & (advantages_T > 0)
    return {
        "clip_ratio/low_mean": low_T.float().mean().item(),
        "clip_ratio/high_mean": high_T.float().mean().item(),
        "clip_ratio/region_mean": (low_T | high_T).float().mean().item(),
    }


def cispo_metrics(ratio_T: Tensor, advantages_T: Tensor, *, epsilon_high: float) -> dict[str, float]:
    """Compute the share of tokens whose weight CISPO has truncated, the advantage being positive."""
    return {"cispo_clip_ratio": ((ratio_T > epsilon_high) & (advantages_T > 0)).float().mean().item()}


def policy_kl(policy_logprobs_T: Tensor, behavior_logprobs_T: Tensor) -> float:
    """Estimate KL(behavior || policy): how far the weights have moved since the tokens were sampled (k3, in nats)."""
    return kl_k3(behavior_logprobs_T, policy_logprobs_T).mean().item()


def effective_sample_size(policy_logprobs_T: Tensor, behavior_logprobs_T: Tensor) -> float:
    """Compute what share of the tokens counts, the policy being another one than that which sampled.

        ESS = (sum_t w_t)^2 / (T sum_t w_t^2),   w_t = pi(o_t) / pi_behavior(o_t)

    Kong (1992). 1 on policy; 1/T where a single token has all the weight.
    """
    log_ratio_T = (policy_logprobs_T - behavior_logprobs_T).double()
    weights_T = torch.exp(log_ratio_T - log_ratio_T.max())  # a common factor cancels; none overflows
    return (weights_T.sum().square() / (weights_T.numel() * weights_T.square().sum())).item()
