"""Which completions of a step each rank trains. Pure: every rank computes the same division, and takes its part.

Whole groups first, so that every prompt is forwarded once in the world. Where few or unequal groups would leave ranks
idle, the step is cut instead: its completions in a row, group by group, in pieces of equal cost. Then at most
num_ranks - 1 groups are spread over two or more ranks, each of which forwards the prompt.

Shapes: P groups, N completions that train, T their tokens that train.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learner.batch import Bool
from learner.model.balance import balance
from learner.model.packing import Int64, MicroBatch, Rows, StepTokens

Float64 = npt.NDArray[np.float64]

TOLERATED_IMBALANCE = 1.05
"""The busiest rank's cost over the mean, up to which groups stay whole: prompts forwarded twice cost, too."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Operations of a forward pass, in any unit; a backward pass costs twice as many of each."""

    layers: float
    """Per token that is forwarded."""
    attention: float
    """Per pair of tokens one of which sees the other, or itself."""
    head: float
    """Per token that is predicted."""

    def prompts(self, length_P: Int64) -> Float64:
        """[P] of forwarding prompts of so many tokens once."""
        cost_P: Float64 = self.layers * length_P + self.attention * (length_P * (length_P + 1) / 2)
        return cost_P

    def completions(self, prompt_N: Int64, length_N: Int64) -> Float64:
        """[N] of completions of so many tokens behind prompts of so many, whose own cost is not in it.

        A completion's last token is predicted and not forwarded.
        """
        forwarded_N = length_N - 1
        pairs_N = prompt_N * forwarded_N + forwarded_N * (forwarded_N + 1) / 2
        cost_N: Float64 = self.layers * forwarded_N + self.attention * pairs_N + self.head * length_N
        return cost_N


def divide(step: StepTokens, cost: TokenCost, num_ranks: int) -> Int64:
    """Choose the rank that trains each completion.

    Returns:
        [N]
    """
    length_P = np.array([prompt.size for prompt in step.prompts], np.int64)
    prompt_P, completion_N = cost.prompts(length_P), cost.completions(length_P[step.group_N], step.lengths_N)
    num_groups = len(step.prompts)
    group_P = np.bincount(step.group_N, completion_N, minlength=num_groups)
    group_P += np.where(group_P > 0, prompt_P, 0.0)
    rank_P = np.zeros(num_groups, np.int64)
    for rank, groups in enumerate(balance(group_P.tolist(), num_ranks)):
        rank_P[groups] = rank
    load = np.bincount(rank_P, group_P, minlength=num_ranks)
    if load.max() <= TOLERATED_IMBALANCE * load.mean():
        return rank_P[step.group_N]
    first_N = np.flatnonzero(np.diff(step.group_N, prepend=-1))
    completion_N[first_N] += prompt_P[step.group_N[first_N]]
    middle_N = completion_N.cumsum() - completion_N / 2
    rank_N: Int64 = np.minimum(middle_N * num_ranks // completion_N.sum(), num_ranks - 1).astype(np.int64)
    return rank_N


def restrict(step: StepTokens, mine_N: Bool) -> tuple[StepTokens, Int64]:
    """Keep the tokens of some completions, to be packed.

    Returns:
        The step with only those, and the place of each of its trained tokens among the T of the whole step.
    """
    mine_C = np.repeat(mine_N, step.lengths_N)
    index_T = np.flatnonzero(mine_C[step.trained_C])
    lengths_N, trained_C = step.lengths_N[mine_N], step.trained_C[mine_C]
    part = dataclasses.replace(
        step,
        group_N=step.group_N[mine_N],
        lengths_N=lengths_N,
        tokens_C=step.tokens_C[mine_C],
        trained_C=trained_C,
        step_rewards_C=step.step_rewards_C[mine_C],
        completion_T=np.repeat(np.arange(lengths_N.size), lengths_N)[trained_C],
        targets_T=step.targets_T[index_T],
        behavior_logprobs_T=step.behavior_logprobs_T[index_T],
        temperature_T=step.temperature_T[index_T],
        policy_version_T=step.policy_version_T[index_T],
    )
    return part, index_T


def of_whole_step(micro_batch: MicroBatch, index_T: Int64) -> MicroBatch:
    """Let the rows of a part name the tokens of the whole step."""

    def renamed(rows: Rows) -> Rows:
        return dataclasses.replace(rows, index_T=index_T[rows.index_T])

    prompt = micro_batch.prompt  # trains nothing itself
    return MicroBatch(rows=tuple(map(renamed, micro_batch.rows)), prompt=prompt)
