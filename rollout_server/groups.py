"""From a lease and its completions to what reward functions are given, and on to the Group that is sent. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from protocol.completions import Completion, pack_completions
from protocol.errors import MalformedMessage
from protocol.messages import FinishReason, Group, Lease, RewardStatus
from rollout_server.rewards.base import FINISH_REASONS, RewardCall, Scores, Text, combine, combine_steps


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lease.row: the prompt as the data set has it, and the row's other columns."""

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]


_decoder = msgspec.json.Decoder(_Row)


def reward_call(lease: Lease, completions: Sequence[Completion], decode: Callable[[Sequence[int]], str]) -> RewardCall:
    """Put the completions into the form that reward functions get.

    Args:
        lease: whose `row` holds the prompt and the columns.
        completions: [N]
        decode: token ids to text. The stop token is not decoded: finish_reason says that there was one.

    Raises:
        MalformedMessage: the lease's row is not what the contract says.
    """
    try:
        row = _decoder.decode(lease.row.tobytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"row of lease {lease.group_id} (ordinal {lease.ordinal}): {error}") from error
    chat = not isinstance(row.prompt, str)
    return RewardCall(
        prompts=[row.prompt] * len(completions),
        completions=[_as_text(completion, decode, chat=chat) for completion in completions],
        completion_ids=[completion.completion_tokens.tolist() for completion in completions],
        finish_reasons=[FINISH_REASONS[completion.finish_reason] for completion in completions],
        columns=row.columns,
    )


def build_group(
    lease: Lease,
    completions: Sequence[Completion],
    scores: Scores,
    weights: Sequence[float],
    *,
    reward_names: Sequence[str],
    generate_s: float,
    reward_s: float,
) -> Group:
    """Make the answer to a lease, whole: all G completions with their rewards. Aborted completions are unscored.

    Args:
        lease: what the group answers.
        completions: [G]
        scores: of those completions by F functions.
        weights: [F]
        reward_names: [F]
        generate_s: seconds of sampling.
        reward_s: seconds of scoring.
    """
    aborted = np.array([c.finish_reason is FinishReason.ABORT for c in completions])
    statuses = np.where(aborted[:, None], RewardStatus.UNSCORED, scores.statuses).astype(np.uint8)
    judged = replace(scores, statuses=statuses)
    rewards, scored = combine(judged, weights)
    arrays = pack_completions(completions)
    return Group(
        group_id=lease.group_id,
        ordinal=lease.ordinal,
        sequence=lease.sequence,
        attempt=lease.attempt,
        purpose=lease.purpose,
        num_generations=lease.num_generations,
        temperature=lease.sampling.temperature or 1.0,  # greedy logprobs are those of temperature 1
        reward_names=tuple(reward_names),
        generate_s=generate_s,
        reward_s=reward_s,
        notes=scores.notes,
        completion_index=np.arange(len(completions), dtype=np.int32),
        completion_lengths=arrays.completion_lengths,
        completion_tokens=arrays.completion_tokens,
        behavior_logprobs=arrays.behavior_logprobs,
        finish_reasons=arrays.finish_reasons,
        span_counts=arrays.span_counts,
        span_lengths=arrays.span_lengths,
        span_versions=arrays.span_versions,
        rewards=rewards,
        scored=scored,
        reward_values=np.where(judged.valued, scores.values, 0.0).astype(np.float32),
        reward_statuses=statuses,
        reward_seconds=scores.seconds,
        step_rewards=combine_steps(judged, weights, arrays.completion_lengths.tolist()),
    )


def _as_text(completion: Completion, decode: Callable[[Sequence[int]], str], *, chat: bool) -> Text:
    tokens = completion.completion_tokens.tolist()
    text = decode(tokens[:-1] if completion.finish_reason is FinishReason.STOP else tokens)
    return [{"role": "assistant", "content": text}] if chat else text
