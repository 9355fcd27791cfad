"""Estimators of the Kullback-Leibler divergence from logprobs of sampled tokens.

Tensor functions only. Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k3(logprobs_q_T: Tensor, logprobs_p_T: Tensor) -> Tensor:
    """Estimate KL(q || p) at every token, from tokens sampled by q.

        k3 = r - 1 - log r,   r = p(o_t) / q(o_t)

    Unbiased, never negative, of low variance: J. Schulman, "Approximating KL divergence" (2020); DeepSeekMath
    (arXiv 2402.03300), eq. 4, with q the policy and p the reference.

    Args:
        logprobs_q_T: [T] log q of the tokens.
        logprobs_p_T: [T] log p of the same tokens.

    Returns:
        [T], differentiable in both.
    """
    log_ratio_T = logprobs_p_T - logprobs_q_T
    return torch.expm1(log_ratio_T) - log_ratio_T
