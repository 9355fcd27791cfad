"""Invariant I6 at the learner's door: a group that breaks it is refused with its reason, never trained.

The codec has already checked types and dtypes; here is what they cannot say: that lengths agree, numbers are finite
and in range, and the group answers the lease's terms. Pure and vectorized: tens of microseconds for 64 completions
of 1024 tokens. Knows nothing of leases and peers: whether the group was asked for is the ledger's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidGroup
from protocol.messages import FinishReason, Group, RewardStatus

LOGPROB_TOLERANCE: Final = 1e-3
"""How far above 0 rounding may lift a log probability."""
MAX_NOTES: Final = 64
MAX_NOTE_CHARACTERS: Final = 2000

_GROUP_ID: Final = re.compile(r"[0-9a-f]{32}")
_PER_COMPLETION: Final = ("completion_lengths", "finish_reasons", "span_counts", "rewards", "scored")
_PER_COMPLETION_AND_FUNCTION: Final = ("reward_values", "reward_statuses", "reward_seconds")
_PER_TOKEN: Final = ("completion_tokens", "behavior_logprobs", "loss_mask", "step_rewards")
_ROWS_PER_TOKEN: Final = ("sampling_mask", "routed_experts")


def validate_group(
    group: Group,
    *,
    num_generations: int,
    max_completion_length: int,
    vocab_size: int,
    reward_functions: Sequence[str],
) -> None:
    """Check a whole group (its parts merged) against the terms it was asked for.

    Raises:
        InvalidGroup: the first thing found wrong, with the value and what is allowed.
    """
    for problems in (
        _header_problems(group, num_generations, reward_functions),
        _shape_problems(group),
        _completion_problems(group, num_generations, max_completion_length, vocab_size),
        _span_problems(group),
        _reward_problems(group),
        _token_problems(group),
    ):
        for problem in problems:
            raise InvalidGroup(f"group {group.ordinal}: {problem}")


def check_shapes(group: Group) -> None:
    """Check that the arrays of a group, or of a part of one, agree in size, so that it can be taken apart.

    Raises:
        InvalidGroup: an array does not fit the others.
    """
    for problem in _shape_problems(group):
        raise InvalidGroup(f"group {group.ordinal}: {problem}")


# Each of these yields reasons. Later ones may rely on what earlier ones, and earlier yields, have ruled out.


def _header_problems(group: Group, num_generations: int, reward_functions: Sequence[str]) -> Iterator[str]:
    if not _GROUP_ID.fullmatch(group.group_id):
        yield "group_id is not 32 hexadecimal digits"
    if group.num_parts != 1:
        yield f"part {group.part} of {group.num_parts}, expected the whole group"
    if group.num_generations != num_generations:
        yield f"num_generations={group.num_generations}, the lease asked for {num_generations}"
    if tuple(group.reward_names) != tuple(reward_functions):
        yield f"{len(group.reward_names)} reward names other than those agreed on: {list(reward_functions)}"
    if not (math.isfinite(group.temperature) and group.temperature >= 0):
        yield f"temperature={group.temperature}, allowed are finite numbers from 0"
    for name in ("generate_s", "reward_s"):
        seconds = getattr(group, name)
        if not (math.isfinite(seconds) and seconds >= 0):
            yield f"{name}={seconds}, allowed are finite numbers from 0"
    if len(group.notes) > MAX_NOTES or any(len(note) > MAX_NOTE_CHARACTERS for note in group.notes):
        yield f"notes: allowed are {MAX_NOTES} of {MAX_NOTE_CHARACTERS} characters"


def _shape_problems(group: Group) -> Iterator[str]:
    if group.completion_index.ndim != 1:
        yield f"completion_index has shape {group.completion_index.shape}, expected [N]"
    n = len(group.completion_index)
    functions = len(group.reward_names)
    yield from _wrong_shapes(group, _PER_COMPLETION, (n,))
    yield from _wrong_shapes(group, _PER_COMPLETION_AND_FUNCTION, (n, functions))
    for name, sizes in (("completion_lengths", group.completion_lengths), ("span_counts", group.span_counts)):
        if sizes.min(initial=0) < 0:
            yield f"{name} has a negative entry"
    tokens = int(group.completion_lengths.sum(dtype=np.int64))
    spans = int(group.span_counts.sum(dtype=np.int64))
    yield from _wrong_shapes(group, _PER_TOKEN, (tokens,))
    yield from _wrong_shapes(group, ("span_lengths",), (spans,))
    yield from _wrong_shapes(group, ("span_versions",), (spans, 2))
    for name in _ROWS_PER_TOKEN:
        array: npt.NDArray[Any] | None = getattr(group, name)
        if array is not None and (array.ndim != 2 or len(array) != tokens):
            yield f"{name} has shape {array.shape}, expected [{tokens}, ...]"


def _wrong_shapes(group: Group, names: Sequence[str], expected: tuple[int, ...]) -> Iterator[str]:
    for name in names:
        array: npt.NDArray[Any] | None = getattr(group, name)
        if array is not None and array.shape != expected:
            yield f"{name} has shape {array.shape}, expected {expected}"


def _completion_problems(
    group: Group, num_generations: int, max_completion_length: int, vocab_size: int
) -> Iterator[str]:
    if len(group.completion_index) != num_generations:
        yield f"{len(group.completion_index)} completions, expected num_generations={num_generations}"
    if not np.array_equal(np.sort(group.completion_index), np.arange(num_generations)):
        yield f"completion_index is not each of 0 to {num_generations - 1} once"
    if group.finish_reasons.max(initial=0) > max(FinishReason):
        yield f"finish_reasons has {group.finish_reasons.max()}, allowed are 0 to {int(max(FinishReason))}"
    lengths = group.completion_lengths
    if lengths.max(initial=0) > max_completion_length:
        yield f"a completion of {lengths.max()} tokens, allowed are {max_completion_length}"
    if ((lengths == 0) & (group.finish_reasons != FinishReason.ABORT)).any():
        yield "an empty completion that was not aborted"
    tokens = group.completion_tokens
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
        yield f"tokens from {tokens.min()} to {tokens.max()}, allowed are 0 to {vocab_size - 1}"
    if not np.isfinite(group.behavior_logprobs).all():
        yield "behavior_logprobs has a NaN or an infinity"
    if group.behavior_logprobs.max(initial=0) > LOGPROB_TOLERANCE:
        yield f"behavior_logprobs has {group.behavior_logprobs.max():g}, log probabilities are at most 0"


def _span_problems(group: Group) -> Iterator[str]:
    if group.span_lengths.min(initial=1) < 1:
        yield "span_lengths has an entry below 1"
    completion_of_span = np.repeat(np.arange(len(group.span_counts)), group.span_counts)
    tokens = np.bincount(completion_of_span, weights=group.span_lengths, minlength=len(group.span_counts))
    if not np.array_equal(tokens, group.completion_lengths):
        first = int(np.flatnonzero(tokens != group.completion_lengths)[0])
        yield (
            f"the spans of completion {group.completion_index[first]} cover {int(tokens[first])} tokens,"
            f" it has {group.completion_lengths[first]}"
        )
    if group.span_versions.min(initial=0) < 0:
        yield "span_versions has a negative entry"
    version = group.span_versions[:, 0].astype(np.int64) << 32 | group.span_versions[:, 1]
    same_completion = completion_of_span[1:] == completion_of_span[:-1]
    if (same_completion & (version[1:] < version[:-1])).any():
        yield "a completion whose span versions go back (I5: versions only grow)"


def _reward_problems(group: Group) -> Iterator[str]:
    for name in ("rewards", "reward_values", "reward_seconds"):
        if not np.isfinite(getattr(group, name)).all():
            yield f"{name} has a NaN or an infinity"
    if group.reward_seconds.min(initial=0) < 0:
        yield "reward_seconds has a negative entry"
    if group.scored.max(initial=0) > 1:
        yield f"scored has {group.scored.max()}, allowed are 0 and 1"
    statuses = group.reward_statuses
    if statuses.max(initial=0) > max(RewardStatus):
        yield f"reward_statuses has {statuses.max()}, allowed are 0 to {int(max(RewardStatus))}"
    has_value = (statuses == RewardStatus.OK).any(axis=1)
    may_have_value = has_value | (statuses == RewardStatus.TIMEOUT).any(axis=1)  # reward_on_timeout sets one
    scored = group.scored.astype(bool)
    if (scored & ~may_have_value).any() or (~scored & has_value).any():
        yield "scored does not agree with reward_statuses"
    if group.rewards[~scored].any():
        yield "a completion without a score has a reward"


def _token_problems(group: Group) -> Iterator[str]:
    if group.loss_mask is not None and group.loss_mask.max(initial=0) > 1:
        yield f"loss_mask has {group.loss_mask.max()}, allowed are 0 and 1"
    if group.step_rewards is None:
        return
    if np.isinf(group.step_rewards).any():
        yield "step_rewards has an infinity, allowed are finite numbers, and NaN where no step ends"
    ends = np.concatenate([[0], np.cumsum(~np.isnan(group.step_rewards))])
    last = np.cumsum(group.completion_lengths, dtype=np.int64)
    has_step = ends[last] > ends[last - group.completion_lengths]
    scored = group.scored.astype(bool)
    if (has_step & ~scored).any():
        yield "a completion without a score has a step reward"
    if (scored & ~has_step & (group.completion_lengths > 0)).any():
        yield "a completion with a score has no step reward"
