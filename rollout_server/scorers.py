"""What scores a group: the pool of reward workers, or the scripted engine's own invention."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from protocol.messages import RewardStatus
from rollout_server.rewards.base import RewardCall, Scores


class Scorer(Protocol):
    """Scores all completions of a group. Never raises for what a reward function did."""

    @property
    def names(self) -> tuple[str, ...]:
        """[F] what Hello lists."""

    async def score(self, call: RewardCall) -> Scores:
        """Return the scores of the call's completions."""


class ScriptedScorer:
    """Reward 1 for completions whose token ids sum to an even number. For the scripted engine without functions."""

    names = ("scripted",)

    async def score(self, call: RewardCall) -> Scores:
        """See the class."""
        values = np.array([[1.0 - sum(ids) % 2] for ids in call.completion_ids], np.float32)
        return Scores(
            values=values,
            statuses=np.full(values.shape, RewardStatus.OK, np.uint8),
            seconds=np.zeros(values.shape, np.float32),
            notes=(),
        )
