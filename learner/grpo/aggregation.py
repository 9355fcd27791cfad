"""How the losses of tokens become the loss of an update: a weighted sum whose weights follow from lengths alone.

Tensor functions only. The weights are computed once, for all tokens of an update, so the losses of micro-batches simply
add up to the loss of the update, however unequal they are.

Shapes: P groups (prompts), N completions that train, T tokens that train, packed one after the other. P, N and the
lengths |o_i| count only what has a token that trains.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


def token_weights(
    aggregation: Aggregation,
    completion_T: Tensor,
    group_N: Tensor,
    *,
    tokens_per_update: float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """Compute what share of the update's loss each token has.

        grpo      w_t = 1/P 1/G 1/|o_i|       mean over the tokens of a completion, over the completions of a group,
                                              over groups (DeepSeekMath, arXiv 2402.03300, eq. 3)
        dapo      w_t = 1 / tokens_per_update mean over all tokens: a token of a long completion counts as much as one
                                              of a short completion (DAPO, arXiv 2503.14476, eq. 8)
        bnpo      w_t = 1 / sum_i |o_i|       the same, over the tokens of this update alone (as TRL's)
        dr_grpo   w_t = 1 / (N L_max)         a constant in place of the lengths (Dr. GRPO, arXiv 2503.20783)

    grpo and bnpo sum to 1 over an update. dapo does over a step's updates on average: where a step is cut into several
    mini-batches, its denominator is the step's, as in TRL. With one update per step dapo and bnpo are the same.

    Args:
        aggregation: which mean.
        completion_T: [T] int, the completion (0 <= . < N) that each token belongs to.
        group_N: [N] int, the group (0 <= . < P) that each completion belongs to.
        tokens_per_update: dapo's denominator, tokens of the step / its mini-batches; the update's own when not given.
        max_completion_length: L_max; dr_grpo needs it.

    Returns:
        [T] float32.
    """
    if aggregation != "grpo":
        denominator = float(completion_T.numel())
        if aggregation == "dapo" and tokens_per_update is not None:
            denominator = tokens_per_update
        elif aggregation == "dr_grpo":
            assert max_completion_length is not None, "dr_grpo divides by it"
            denominator = float(torch.unique(completion_T).numel() * max_completion_length)
        return torch.full(completion_T.shape, 1.0 / denominator, device=completion_T.device)
    tokens_N = torch.bincount(completion_T, minlength=group_N.numel())
    completions_P = torch.bincount(group_N[tokens_N > 0])
    num_groups = (completions_P > 0).sum()
    return 1.0 / (num_groups * completions_P[group_N[completion_T]] * tokens_N[completion_T])


def completion_sums(values_T: Tensor, completion_T: Tensor) -> Tensor:
    """Sum over the tokens of each completion; every token gets its completion's sum.

    Args:
        values_T: [T].
        completion_T: [T] int; any numbers that tell completions apart. All tokens of each must be here.

    Returns:
        [T], differentiable.
    """
    names, place_T = torch.unique(completion_T, return_inverse=True)
    return values_T.new_zeros(names.numel()).index_add(0, place_T, values_T)[place_T]


def completion_means(values_T: Tensor, completion_T: Tensor) -> Tensor:
    """Average over the tokens of each completion; like `completion_sums`."""
    return completion_sums(values_T, completion_T) / completion_sums(torch.ones_like(values_T), completion_T)
