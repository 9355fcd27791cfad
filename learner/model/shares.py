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

from learner.model.balance import balance
from learner.model.packing import Bool, Int64, MicroBatch, Rows, StepTokens

Float64 = npt.NDArray[np.float64]

TOLERATED_IMBALANCE = 1.05
"""The busiest rank's cost over the mean, up to which groups stay whole: prompts forwarded twice cost, too."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What a token costs, in any unit: linear layers, attention to one token, output head."""

    layers: float
    attention: float
    head: float

    def prompts(self, step: StepTokens) -> Float64:
        """[P] of forwarding each prompt once."""
        length_P = np.array([prompt.size for prompt in step.prompts], np.float64)
        return self.layers * length_P + self.attention * length_P**2 / 2

    def completions(self, step: StepTokens) -> Float64:
        """[N] of each completion behind its prompt."""
        prompt_N = np.array([prompt.size for prompt in step.prompts], np.float64)[step.group_N]
        length_N = step.lengths_N.astype(np.float64)
        return length_N * (self.layers + self.head + self.attention * (prompt_N + length_N / 2))


def divide(step: StepTokens, cost: TokenCost, num_ranks: int) -> Int64:
    """Choose the rank that trains each completion.

    Returns:
        [N]
    """
    prompt_P, completion_N = cost.prompts(step), cost.completions(step)
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
        completion_T=np.repeat(np.arange(lengths_N.size), lengths_N)[trained_C],
        targets_T=step.targets_T[index_T],
        behavior_logprobs_T=step.behavior_logprobs_T[index_T],
        temperature_T=step.temperature_T[index_T],
    )
    return part, index_T


def of_whole_step(micro_batch: MicroBatch, index_T: Int64) -> MicroBatch:
    """Let the rows of a part name the tokens of the whole step."""

    def renamed(rows: Rows) -> Rows:
        return dataclasses.replace(rows, index_T=index_T[rows.index_T])

    prompt = micro_batch.prompt  # trains nothing itself
    return MicroBatch(rows=tuple(map(renamed, micro_batch.rows)), prompt=prompt)
