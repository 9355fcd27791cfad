"""The Kullback-Leibler divergence from logprobs of sampled tokens: estimators, penalties, an adaptive coefficient.

Tensor functions only. Shapes: T tokens that train, N completions that train. The estimators are those of J. Schulman,
"Approximating KL divergence" (2020), with  r = p(o_t) / q(o_t),  o_t sampled by q; each is of KL(q || p) in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_KL_ERROR = 0.2


def kl_k1(logprobs_q_T: Tensor, logprobs_p_T: Tensor) -> Tensor:
    """Compute k1 = - log r at every token, [T]: unbiased, of high variance, may be negative.

    Its gradient is that of log q, whose expectation is 0: as a term of the loss it does nothing unless weighted by the
    ratio; as a part of the reward it is exact.
    """
    return logprobs_q_T - logprobs_p_T


def kl_k2(logprobs_q_T: Tensor, logprobs_p_T: Tensor) -> Tensor:
    """Compute k2 = (log r)^2 / 2 at every token, [T]: biased, never negative; its gradient is the divergence's own."""
    return 0.5 * (logprobs_p_T - logprobs_q_T).square()


def kl_k3(logprobs_q_T: Tensor, logprobs_p_T: Tensor) -> Tensor:
    """Estimate KL(q || p) at every token, from tokens sampled by q.

        k3 = r - 1 - log r

    Unbiased, never negative, of low variance; DeepSeekMath (arXiv 2402.03300), eq. 4, with q the policy and p the
    reference.

    Args:
        logprobs_q_T: [T] log q of the tokens.
        logprobs_p_T: [T] log p of the same tokens.

    Returns:
        [T], differentiable in both.
    """
    log_ratio_T = logprobs_p_T - logprobs_q_T
    return torch.expm1(log_ratio_T) - log_ratio_T


def kl_in_reward(kl_T: Tensor, completion_T: Tensor, num_completions: int) -> Tensor:
    """Sum the estimate over each completion: what its reward loses, times beta.

        r_i - beta sum_t log pi(o_it) / pi_ref(o_it)

    InstructGPT (arXiv 2203.02155), eq. 2, with k1 of the learner's own logprobs.

    Args:
        kl_T: [T] k1, detached.
        completion_T: [T] int, the completion (0 <= . < N) of each token.
        num_completions: N.

    Returns:
        [N] float64.
    """
    return torch.zeros(num_completions, dtype=torch.float64).index_add_(0, completion_T, kl_T.double().cpu())


def adapted_beta(beta: float, kl: float, *, target: float, horizon: int, num_completions: int) -> float:
    """Move the coefficient of the penalty so that the divergence nears a target.

        beta' = beta (1 + clip(KL / KL_target - 1, -0.2, 0.2) min(n / horizon, 1))

    Ziegler et al. (arXiv 1909.08593), section 2.2.

    Args:
        beta: the coefficient so far.
        kl: mean over the step's tokens, in nats.
        target: what it should be.
        horizon: completions after which the coefficient may have grown by 20 percent (or fallen); by no more in a step.
        num_completions: n, of the step.
    """
    error = min(max(kl / target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return beta * (1.0 + error * min(num_completions / horizon, 1.0))
