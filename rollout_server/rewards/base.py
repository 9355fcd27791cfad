"""What goes into reward functions and what comes out of them. Pure; knows no process, no pool, no engine.

A reward function has TRL's signature:

    def my_reward(prompts, completions, **columns) -> list[float | list[tuple[int, float]] | None]

It is called with keyword arguments only, each a list of length N: `prompts`, `completions` (texts, or message lists
when the prompt is a chat), `completion_ids`, `finish_reason` ("stop", "length" or "abort") and every column of the
row. It gets those of them that it has parameters for, or all of them when it takes `**kwargs`. None means "does not
apply to this row". It may be a coroutine function.

A process reward function answers with the steps of a completion: pairs of the index of a step's last token (in
completion_ids) and the step's reward, in any order; those of the same token add up. Token indices, because they are
there whatever the tokenizer: not every token is a piece of the text (steps.py goes from text to tokens).

What a reward is: a record, not a number (value or none, status, seconds). A completion without a value takes no part
in the group's mean and trains nothing, so None must never turn into 0 here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.messages import FinishReason, Float32, RewardStatus, UInt8
from rollout_server.rewards.worker import Steps

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}
"""What reward functions see as `finish_reason`."""

ChatMessage = dict[str, Any]
Bool = npt.NDArray[np.bool_]
Text = str | list[ChatMessage]
"""A prompt or a completion: plain text, or the messages of a chat (a completion is one assistant message)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """The N completions of one group, as reward functions are given them."""

    prompts: Sequence[Text]
    """[N], all the same."""
    completions: Sequence[Text]
    """[N] without the stop token's text."""
    completion_ids: Sequence[Sequence[int]]
    """[N] the sampled token ids, the stop token included."""
    finish_reasons: Sequence[str]
    """[N] "stop", "length" or "abort"."""
    columns: Mapping[str, Any]
    """The row's other columns, one value each: reward functions get each as a list of length N."""

    def __len__(self) -> int:
        return len(self.completions)

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the keyword arguments of a call for some of the completions: plain data, every value a list."""
        columns = {name: [value] * len(indices) for name, value in self.columns.items()}
        return columns | {
            "prompts": [self.prompts[i] for i in indices],
            "completions": [self.completions[i] for i in indices],
            "completion_ids": [list(self.completion_ids[i]) for i in indices],
            "finish_reason": [self.finish_reasons[i] for i in indices],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How F reward functions fared on N completions. Filled by the pool."""

    values: Float32
    """[N, F] NaN where there is no value, the sum where there are steps. A TIMEOUT has one only where
    `reward_on_timeout` gave it one."""
    statuses: UInt8
    """[N, F] RewardStatus"""
    seconds: Float32
    """[N, F] wall-clock seconds of the call that scored it, divided by the completions in that call."""
    steps: Mapping[tuple[int, int], Steps] = field(default_factory=dict)
    """By (n, f): what functions gave for the steps of completions."""
    notes: tuple[str, ...] = ()
    """The first error of each function that had one, without any text of the model's making."""

    @property
    def valued(self) -> Bool:
        """[N, F] where there is a value."""
        valued: Bool = np.isin(self.statuses, (RewardStatus.OK, RewardStatus.TIMEOUT)) & ~np.isnan(self.values)
        return valued


def combine(scores: Scores, weights: Sequence[float]) -> tuple[Float32, UInt8]:
    """Add up the functions' values, each times its weight; functions without a value are left out.

    Args:
        scores: of N completions by F functions.
        weights: [F]

    Returns:
        rewards [N] float32, 0 where no function gave a value, and scored [N] uint8, 0 there and 1 elsewhere.
    """
    valued = scores.valued
    values = np.where(valued, scores.values, 0.0).astype(np.float64)
    rewards: Float32 = (values @ np.asarray(weights, np.float64)).astype(np.float32)
    return rewards, np.asarray(valued.any(axis=1), np.uint8)


def combine_steps(scores: Scores, weights: Sequence[float], lengths: Sequence[int]) -> Float32 | None:
    """Add up what the functions gave for the step that ends with each token, each times its weight.

    A value for a whole completion is a step that ends with its last token. A function of weight 0 has no steps: one of
    reward 0 would count in what the others are compared with.

    Args:
        scores: of N completions by F functions.
        weights: [F]
        lengths: [N] tokens of each completion; sums to T.

    Returns:
        [T] NaN where no step ends; a completion with a value and a token has a step at least. None where no function
        that counts gave steps: then rewards are outcomes.
    """
    valued = scores.valued
    if not any(valued[n, f] and weights[f] for n, f in scores.steps):
        return None
    ends = np.cumsum(lengths)
    sums_T, ends_T = np.zeros(ends[-1]), np.zeros(ends[-1], np.bool_)
    for n in np.flatnonzero(valued.any(axis=1) & (np.asarray(lengths) > 0)).tolist():
        sums, is_end = sums_T[ends[n] - lengths[n] : ends[n]], ends_T[ends[n] - lengths[n] : ends[n]]
        for f in np.flatnonzero(valued[n] & (np.asarray(weights) != 0)).tolist():
            steps = scores.steps.get((n, f)) or [(lengths[n] - 1, float(scores.values[n, f]))]
            tokens = np.fromiter((token for token, _ in steps), np.int64, len(steps))
            rewards = np.fromiter((reward for _, reward in steps), np.float64, len(steps))
            np.add.at(sums, tokens, weights[f] * rewards)
            is_end[tokens] = True
        is_end[-1] |= not is_end.any()
    return np.where(ends_T, sums_T, np.nan).astype(np.float32)
