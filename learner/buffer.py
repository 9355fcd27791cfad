"""Finished groups between arrival and batch. Pure: the order of taking is the ledger's business.

Bytes were reserved when the lease was granted (config.granted_bounds), so the buffer never refuses a group: a budget
enforced at delivery could deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from learner.batch import TrainGroup, completions_that_train, step_rewards
from protocol.messages import Group


class Buffer:
    """Groups by lease sequence number."""

    def __init__(self) -> None:
        self._groups: dict[int, TrainGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def num_bytes(self) -> int:
        """Bytes of tokens and logprobs held."""
        return sum(g.group.completion_tokens.nbytes + g.group.behavior_logprobs.nbytes for g in self._groups.values())

    def offer(self, group: TrainGroup) -> None:
        """Hold a journaled group that the ledger has taken in."""
        assert group.sequence not in self._groups, f"sequence {group.sequence} is buffered already"
        self._groups[group.sequence] = group

    def take(self, sequences: Iterable[int]) -> tuple[TrainGroup, ...]:
        """Remove and return the groups of a batch, in the order given."""
        return tuple(self._groups.pop(sequence) for sequence in sequences)


def why_filtered(
    group: Group,
    *,
    filter_zero_std: bool,
    mask_truncated_completions: bool = False,
    min_scored: int = 2,
    compares_steps: bool = False,
) -> str | None:
    """Say why a group has nothing to train on, or None.

    Zero variance is judged on the task reward alone, over the completions that would train; where steps are compared,
    on the rewards of all their steps.
    """
    trains_G = completions_that_train(group, mask_truncated_completions=mask_truncated_completions)
    rewards = group.rewards[trains_G]
    if rewards.size < min_scored:
        what = "scored and not truncated" if mask_truncated_completions else "scored"
        return f"{rewards.size} of {group.num_generations} completions {what}"
    if compares_steps:
        rewards = step_rewards(group)[np.repeat(trains_G, group.completion_lengths)]
        rewards = rewards[~np.isnan(rewards)]
    if filter_zero_std and bool(np.all(rewards == rewards[0])):
        return f"all {'step ' if compares_steps else ''}rewards are {float(rewards[0]):g}"
    return None
