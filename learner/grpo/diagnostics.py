"""What to watch while training: clip fractions, drift from the behavior policy, entropy. TRL's metric names.

Tensor functions only. Shapes: T all tokens of the step that train; every mean is over them.
"""

from __future__ import annotations

from torch import Tensor

from learner.grpo.kl import kl_k3


def clip_metrics(ratio_T: Tensor, advantages_T: Tensor, *, epsilon: float, epsilon_high: float) -> dict[str, float]:
    """Compute the share of tokens whose gradient the clip has cut off, and the ratio itself.

    low: the ratio is below 1 - epsilon and the advantage negative (already pushed down enough); high: above
    1 + epsilon_high and the advantage positive; region: either.
    """
    low_T = (ratio_T < 1.0 - epsilon) & (advantages_T < 0)
    high_T = (ratio_T > 1.0 + epsilon_high) & (advantages_T > 0)
    return {
        "clip_ratio/low_mean": low_T.float().mean().item(),
        "clip_ratio/high_mean": high_T.float().mean().item(),
        "clip_ratio/region_mean": (low_T | high_T).float().mean().item(),
        "ratio/mean": ratio_T.mean().item(),
        "ratio/max": ratio_T.max().item(),
    }


def policy_kl(policy_logprobs_T: Tensor, behavior_logprobs_T: Tensor) -> float:
    """Estimate KL(behavior || policy): how far the weights have moved since the tokens were sampled (k3, in nats)."""
    return kl_k3(behavior_logprobs_T, policy_logprobs_T).mean().item()
