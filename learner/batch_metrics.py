"""What one step's groups were like, under TRL's metric names: rewards, lengths, staleness.

Pure reductions of flat arrays, with no state and no time in them. NaN is "no value" (no completion was scored, none
ended by itself, ...) and becomes null in metrics.jsonl. Staleness (I4) is said of three things, each under its own
name:

    staleness/token_mean, staleness/hist    tokens that train, each by the version that sampled it
    sample/staleness_mean, _max             completions that train, each by its oldest token
    staleness/group_mean, staleness/max     groups, each by the oldest token of all its completions (what I4 bounds)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from learner.batch import Batch, step_rewards
from protocol.messages import FinishReason, Group, RewardStatus

Row = dict[str, float | list[int]]
"""One line of metrics.jsonl."""

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.number[Any]]


def reward_metrics(groups: Sequence[Group]) -> Row:
    """Reduce the rewards of scored completions.

    `reward_std` is, as in TRL, the mean over groups of their sample standard deviation (ddof 1), over groups with two
    scored completions or more; `frac_reward_zero_std` is the share of those whose rewards are all equal. The
    `rewards/{function}` values are of calls with status OK. Where steps are judged a completion's reward is the sum of
    its steps'; `step_reward` is the mean of those, and `completions/mean_steps` how many a scored completion has.

    Args:
        groups: whole groups. Those of this learner name the same reward functions (made sure of when a server says
            Hello); of restored ones that name others, the values under the first group's names are reduced.
    """
    rewards, stds, ranges = _spread(groups)
    row: Row = {
        "reward": mean(rewards),
        "reward_std": mean(stds),
        "frac_reward_zero_std": mean(ranges == 0),
    }
    statuses = _concatenate([group.reward_statuses.ravel() for group in groups])
    for name, status in (
        ("timeouts", RewardStatus.TIMEOUT),
        ("errors", RewardStatus.ERROR),
        ("unscored", RewardStatus.UNSCORED),
    ):
        row[f"rewards/{name}"] = int(np.count_nonzero(statuses == status))
    for column, name in enumerate(groups[0].reward_names if groups else ()):
        having = [group for group in groups if group.reward_names[column : column + 1] == (name,)]
        statuses = _concatenate([group.reward_statuses[:, column] for group in having])
        called = _concatenate([group.reward_values[:, column] for group in having])[statuses == RewardStatus.OK]
        row[f"rewards/{name}/mean"] = mean(called)
        row[f"rewards/{name}/std"] = float(called.std(ddof=1)) if called.size >= 2 else math.nan
    judged = [group for group in groups if group.step_rewards is not None]
    if judged:
        steps = _concatenate([step_rewards(group) for group in judged])
        steps = steps[~np.isnan(steps)]
        row["step_reward"] = mean(steps)
        row["completions/mean_steps"] = steps.size / max(1, sum(int(np.count_nonzero(g.scored)) for g in judged))
    return row


def completion_metrics(groups: Sequence[Group]) -> Row:
    """Reduce the lengths (tokens, stop token included) of all completions but aborted ones.

    `clipped_ratio` is the share that max_completion_length cut; `mean_terminated_length` is of the others.
    """
    lengths = _concatenate([group.completion_lengths for group in groups])
    reasons = _concatenate([group.finish_reasons for group in groups])
    terminated = lengths[reasons == FinishReason.STOP]
    lengths = lengths[reasons != FinishReason.ABORT]
    return {
        "completions/mean_length": mean(lengths),
        "completions/min_length": float(lengths.min()) if lengths.size else math.nan,
        "completions/max_length": float(lengths.max()) if lengths.size else math.nan,
        "completions/clipped_ratio": 1.0 - terminated.size / lengths.size if lengths.size else math.nan,
        "completions/mean_terminated_length": mean(terminated),
    }


def staleness_metrics(batch: Batch) -> Row:
    """Reduce the staleness of a batch against the weights about to be trained, policy_version `batch.step` - 1.

    `staleness/hist` counts tokens at staleness 0, 1, ..., `staleness/max`.
    """
    groups, policy_version, ages = [train.group for train in batch.groups], batch.step - 1, batch.staleness
    staleness_K, tokens_K = token_staleness(groups, policy_version)
    samples = completion_staleness(groups, policy_version)
    oldest = max(ages, default=0)
    num_tokens = int(tokens_K.sum())
    return {
        "staleness/token_mean": float(staleness_K @ tokens_K) / num_tokens if num_tokens else math.nan,
        "staleness/group_mean": mean(ages),
        "staleness/max": oldest,
        "staleness/hist": np.bincount(staleness_K, tokens_K, oldest + 1).astype(int).tolist(),
        "sample/staleness_mean": mean(samples),
        "sample/staleness_max": float(samples.max()) if samples.size else math.nan,
    }


def token_staleness(groups: Sequence[Group], policy_version: int) -> tuple[Int64, Int64]:
    """Return the staleness of each version span of the groups and how many of its tokens can train, both [K].

    By span, not by token: a batch of millions of tokens is reduced on the event loop in a few milliseconds (I9).
    """
    staleness_K, counts_N = _span_staleness(groups, policy_version)
    tokens_K = _concatenate([group.span_lengths for group in groups]).astype(np.int64)
    if any(group.loss_mask is not None for group in groups):
        ends_K = np.cumsum(tokens_K)
        masked_T = np.concatenate([[0], np.cumsum(_concatenate([_mask(group) for group in groups]) != 0)])
        tokens_K = masked_T[ends_K] - masked_T[ends_K - tokens_K]
    return staleness_K, tokens_K * np.repeat(_trains(groups), counts_N)


def completion_staleness(groups: Sequence[Group], policy_version: int) -> Int64:
    """Return the staleness of the oldest token of every completion that can train and is not empty, [<= N]."""
    staleness_K, counts_N = _span_staleness(groups, policy_version)
    filled_N = counts_N > 0
    if not filled_N.any():
        return np.zeros(0, np.int64)
    counts = counts_N[filled_N]
    oldest: Int64 = np.maximum.reduceat(staleness_K, np.cumsum(counts) - counts)
    return oldest[_trains(groups)[filled_N]]


def mean(values: Numbers | Sequence[float]) -> float:
    """Return the mean in float64, NaN when there is nothing."""
    return float(np.mean(values, dtype=np.float64)) if len(values) else math.nan


def _spread(groups: Sequence[Group]) -> tuple[Numbers, Numbers, Numbers]:
    """Return all scored rewards; and of each group that has two or more of them their deviation and their range."""
    rewards = _concatenate([group.rewards[group.scored != 0] for group in groups]).astype(np.float64)
    counts = np.array([np.count_nonzero(group.scored) for group in groups], np.int64)
    comparable = np.repeat(counts >= 2, counts)
    counts = counts[counts >= 2]
    if not counts.size:
        return rewards, np.zeros(0), np.zeros(0)
    compared, begins = rewards[comparable], np.cumsum(counts) - counts
    deviations = compared - np.repeat(np.add.reduceat(compared, begins) / counts, counts)
    stds = np.sqrt(np.add.reduceat(deviations**2, begins) / (counts - 1))
    ranges = np.maximum.reduceat(compared, begins) - np.minimum.reduceat(compared, begins)
    return rewards, stds, ranges


def _span_staleness(groups: Sequence[Group], policy_version: int) -> tuple[Int64, Int64]:
    """Return the staleness of each version span, [K], and how many of them each completion has, [N]."""
    versions_K = [group.span_versions[:, 1] for group in groups]
    counts_N = [group.span_counts for group in groups]
    return policy_version - _concatenate(versions_K).astype(np.int64), _concatenate(counts_N).astype(np.int64)


def _mask(group: Group) -> Numbers:
    """Return 1 for each token that has a place in the loss and 0 for the others, [T]."""
    return np.ones(group.completion_tokens.size, np.uint8) if group.loss_mask is None else group.loss_mask


def _trains(groups: Sequence[Group]) -> Bools:
    """Tell which completions, [N], can train: those scored and not aborted."""
    scored_N = _concatenate([group.scored for group in groups]) != 0
    trains: Bools = scored_N & (_concatenate([group.finish_reasons for group in groups]) != FinishReason.ABORT)
    return trains


def _concatenate(arrays: Sequence[Numbers]) -> Numbers:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
