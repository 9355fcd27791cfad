"""A completion as an engine makes it, and its flat form inside a Group. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.messages import FinishReason, Float32, Group, Int32, UInt8
from protocol.versions import Version

FEW_SPANS = 64
"""Up to so many, a set of pairs is made sooner than arrays are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion. Filled by the engine, immutable after.

    Example:
        >>> c = Completion(
        ...     completion_tokens=np.array([5, 9, 2], np.int32), behavior_logprobs=np.zeros(3, np.float32),
        ...     spans=((Version(1, 3), 2), (Version(1, 4), 1)), finish_reason=FinishReason.STOP)
        >>> c.oldest
        Version(incarnation=1, policy_version=3)
    """

    completion_tokens: Int32
    """[L] sampled ids, prompt excluded, the stop token included."""
    behavior_logprobs: Float32
    """[L] log softmax(logits / T) of the sampled ids."""
    spans: tuple[tuple[Version, int], ...]
    """(version, number of tokens it sampled), in order; the numbers sum to L."""
    finish_reason: FinishReason

    @property
    def oldest(self) -> Version | None:
        """The oldest version that sampled a token; None for an empty completion."""
        return min((version for version, _ in self.spans), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionArrays:
    """The completion fields of a Group, in its order and dtypes (see messages.Group for shapes)."""

    completion_lengths: Int32
    completion_tokens: Int32
    behavior_logprobs: Float32
    finish_reasons: UInt8
    span_counts: Int32
    span_lengths: Int32
    span_versions: Int32


def pack_completions(completions: Sequence[Completion]) -> CompletionArrays:
    """Flatten completions into the arrays of a Group."""
    spans = [span for completion in completions for span in completion.spans]
    return CompletionArrays(
        completion_lengths=np.array([len(c.completion_tokens) for c in completions], np.int32),
        completion_tokens=_concatenate([c.completion_tokens for c in completions], np.int32),
        behavior_logprobs=_concatenate([c.behavior_logprobs for c in completions], np.float32),
        finish_reasons=np.array([c.finish_reason for c in completions], np.uint8),
        span_counts=np.array([len(c.spans) for c in completions], np.int32),
        span_lengths=np.array([length for _, length in spans], np.int32),
        span_versions=np.array([version for version, _ in spans], np.int32).reshape(-1, 2),
    )


def unpack_completions(group: Group) -> Iterator[Completion]:
    """Yield the completions of a (validated) group, as views of its arrays."""
    token, span = 0, 0
    for length, count, reason in zip(
        group.completion_lengths.tolist(), group.span_counts.tolist(), group.finish_reasons.tolist(), strict=True
    ):
        spans = tuple(
            (Version(*group.span_versions[k].tolist()), int(group.span_lengths[k])) for k in range(span, span + count)
        )
        yield Completion(
            completion_tokens=group.completion_tokens[token : token + length],
            behavior_logprobs=group.behavior_logprobs[token : token + length],
            spans=spans,
            finish_reason=FinishReason(reason),
        )
        token, span = token + length, span + count


def group_versions(group: Group) -> set[Version]:
    """Every version that sampled a token of a validated group: few, also where there is a span per token (I9)."""
    if len(group.span_versions) <= FEW_SPANS:
        incarnations, policy_versions = group.span_versions.T.tolist()
        return {Version(*pair) for pair in set(zip(incarnations, policy_versions, strict=True))}
    codes = group.span_versions[:, 0].astype(np.int64) << 32 | group.span_versions[:, 1]
    codes = np.concatenate(
        [codes[:1], codes[1:][codes[1:] != codes[:-1]]]
    )  # neighbors mostly agree; numbers are costly
    return {Version(code >> 32, code & 0xFFFFFFFF) for code in set(codes.tolist())}


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(a, dtype) for a in arrays]) if arrays else np.zeros(0, dtype)
