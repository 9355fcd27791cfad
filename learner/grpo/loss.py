"""The GRPO loss, to be read beside DeepSeekMath (arXiv 2402.03300), eq. 3.

    J = 1/G sum_i 1/|o_i| sum_t { min[ rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i ] - beta KL_it(pi || pi_ref) }

Token by token that is a weighted sum. Each of its factors has variants, and a file of its own beside this one:

    loss = - sum_t w_t { c_t S(rho_t, A_t) - beta KL_t } - entropy_coef 1/T sum_t H_t

    w_t    aggregation.py   whose mean it is          rho_t  surrogates.py    policy over anchor, of token or completion
    A_t    advantages.py    reward against the group  S      surrogates.py    clipped, CISPO, SAPO, a user's
    c_t    corrections.py   for tokens of old weights        anchors.py       behavior or proximal
    KL_t   kl.py            to the reference          H_t                     entropy of the policy, in nats

The weights are made once per update, for all of its tokens, so the losses of micro-batches simply add up to the loss of
the update, however unequal they are.

This file knows tensors and nothing else: no configuration, no message, no model. Only tokens that train come here:
those whose loss_mask is 0, and those of aborted or unscored completions, were left out before (model/packing.py).

Shapes: T tokens that train, packed one after the other. Logprobs are of softmax(logits / temperature):
    policy      under the weights being trained; the only ones with a gradient
    behavior    under the weights that sampled, given by the engine
    proximal    under the weights at the start of the step (decoupled PPO)
    reference   under the frozen (or slowly following) reference weights
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from learner.grpo.kl import kl_k3
from learner.grpo.surrogates import sequence_ratio, token_ratio

SamplingLevel = Literal["token", "sequence"]


class LossTokens(NamedTuple):
    """What the loss takes of some tokens of an update, [T] each."""

    policy_logprobs_T: Tensor
    entropy_T: Tensor
    """Of the policy, in nats; needs a gradient only for an entropy bonus."""
    anchor_logprobs_T: Tensor
    """What rho is taken against: the behavior or the proximal policy's."""
    behavior_logprobs_T: Tensor
    advantages_T: Tensor
    """Each token's completion's advantage; with a critic, the token's own."""
    weights_T: Tensor
    """From `token_weights`, of the whole update."""
    completion_T: Tensor
    """Int, tells completions apart."""
    behavior_weight_T: Tensor | None = None
    """From corrections.py; 0 where a token was masked. None for no correction."""
    reference_logprobs_T: Tensor | None = None
    """Given: the KL penalty is part of the loss."""


Surrogate = Callable[[Tensor, LossTokens], Tensor]
"""(rho [T], tokens) -> [T], to be maximized."""


class TokenLoss(NamedTuple):
    """The loss of some tokens of an update, and what its parts were."""

    loss: Tensor
    """[] their share of the update's loss; carries the gradient."""
    ratio_T: Tensor
    """[T] rho: policy over anchor (1 for a token that was masked)."""
    behavior_weight_T: Tensor | None
    """[T] the correction; None for none."""
    kl_T: Tensor | None
    """[T] KL to the reference; None without one."""


def grpo_loss(
    tokens: LossTokens,
    surrogate: Surrogate,
    *,
    importance_sampling_level: SamplingLevel = "token",
    kl: Callable[[Tensor, Tensor], Tensor] = kl_k3,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
    entropy_weight: float = 0.0,
) -> TokenLoss:
    """Compute the loss of any part of an update's tokens.

    Args:
        tokens: the part. At the sequence level, whole completions.
        surrogate: S.
        importance_sampling_level: whether rho is a token's or its completion's.
        kl: estimator of the KL to the reference.
        beta: its coefficient.
        use_bias_correction_kl: weight the KL by policy / behavior of the token, whatever rho is taken against, so that
            its gradient is unbiased off policy, too (DeepSeek-V3.2, arXiv 2512.02556).
        entropy_weight: entropy_coef / T, T being all tokens of the update.

    Returns:
        The loss and its parts.
    """
    policy_logprobs_T, weight_T = tokens.policy_logprobs_T, tokens.behavior_weight_T
    anchored_T = policy_logprobs_T
    if weight_T is not None:
        # What is masked must not even be exponentiated: infinity times 0 would be NaN.
        masked_T = weight_T == 0
        anchored_T = policy_logprobs_T.where(~masked_T, tokens.anchor_logprobs_T.detach())
        tokens = tokens._replace(policy_logprobs_T=anchored_T)
    if importance_sampling_level == "token":
        ratio_T = token_ratio(anchored_T, tokens.anchor_logprobs_T)
    else:
        ratio_T = sequence_ratio(anchored_T, tokens.anchor_logprobs_T, tokens.completion_T)

    objective_T = surrogate(ratio_T, tokens)
    if weight_T is not None:
        objective_T = weight_T * objective_T

    kl_T = None
    if tokens.reference_logprobs_T is not None:
        kl_T = kl(policy_logprobs_T, tokens.reference_logprobs_T)
        if use_bias_correction_kl:
            kl_T = token_ratio(policy_logprobs_T, tokens.behavior_logprobs_T) * kl_T
        objective_T = objective_T - beta * kl_T

    loss = -(tokens.weights_T * objective_T).sum()
    if entropy_weight:
        loss = loss - entropy_weight * tokens.entropy_T.sum()
    return TokenLoss(loss, ratio_T, weight_T, kl_T)
