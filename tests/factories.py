"""Small valid messages for tests: every argument has a default, so that a test states only what it is about.

Random tokens and logprobs are drawn from `seed`: the same call makes the same bytes. Everything made here is
valid for the learner; a test about invalid data breaks one field with `msgspec.structs.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from learner.batch import Batch, TrainGroup
from protocol.completions import Completion, pack_completions
from protocol.identity import group_id, group_seed
from protocol.messages import FinishReason, Group, Int32, Lease, Purpose, RewardStatus, Sampling
from protocol.versions import Version

RUN_ID = "test-run"
VOCAB_SIZE = 32
STOP_TOKEN = 1
INITIAL = Version(1, 0)

Span = tuple[Version, int]


def make_sampling(*, max_completion_length: int = 8, temperature: float = 1.0, **changes: Any) -> Sampling:
    """Make sampling parameters of the whole softmax, with one stop token."""
    fields: dict[str, Any] = {"stop_token_ids": (STOP_TOKEN,), **changes}
    return Sampling(max_completion_length=max_completion_length, temperature=temperature, **fields)


def make_lease(
    *,
    ordinal: int = 0,
    sequence: int | None = None,
    attempt: int = 1,
    purpose: Purpose = Purpose.TRAIN,
    num_generations: int = 4,
    sampling: Sampling | None = None,
    min_version: Version = INITIAL,
    prompt_tokens: Sequence[int] = (3, 4, 5),
    prompt: str | list[dict[str, str]] = "2 + 3 =",
    columns: Mapping[str, Any] | None = None,
    run_id: str = RUN_ID,
    run_seed: int = 0,
) -> Lease:
    """Make a lease of one short prompt; `sequence` is the ordinal unless given."""
    row = msgspec.json.encode({"prompt": prompt, "columns": dict(columns or {"answer": "5"})})
    return Lease(
        group_id=group_id(run_id, ordinal, purpose),
        ordinal=ordinal,
        sequence=ordinal if sequence is None else sequence,
        attempt=attempt,
        purpose=purpose,
        num_generations=num_generations,
        sampling=sampling or make_sampling(),
        seed=group_seed(run_seed, ordinal),
        min_version=min_version,
        prompt_tokens=np.array(prompt_tokens, np.int32),
        row=np.frombuffer(row, np.uint8),
    )


def make_completion(
    length: int = 3,
    *,
    spans: Sequence[Span] | None = None,
    version: Version = INITIAL,
    finish_reason: FinishReason = FinishReason.STOP,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
) -> Completion:
    """Make a completion of `length` tokens, all sampled by `version` unless `spans` says otherwise.

    A completion that ends with STOP ends with the stop token.
    """
    random = np.random.default_rng(seed)
    tokens: Int32 = random.integers(2, vocab_size, length).astype(np.int32)
    if finish_reason is FinishReason.STOP and length:
        tokens[-1] = STOP_TOKEN
    return Completion(
        completion_tokens=tokens,
        behavior_logprobs=-random.uniform(0.1, 3.0, length).astype(np.float32),
        spans=tuple(spans) if spans is not None else ((version, length),) * (length > 0),
        finish_reason=finish_reason,
    )


def make_group(
    *,
    ordinal: int = 0,
    sequence: int | None = None,
    attempt: int = 1,
    purpose: Purpose = Purpose.TRAIN,
    rewards: Sequence[float | None] = (1.0, 0.0, 1.0, 0.0),
    functions: Mapping[str, Sequence[float | RewardStatus]] | None = None,
    lengths: Sequence[int] | None = None,
    version: Version = INITIAL,
    spans: Sequence[Sequence[Span]] | None = None,
    finish_reasons: Sequence[FinishReason] | None = None,
    completions: Sequence[Completion] | None = None,
    temperature: float = 1.0,
    run_id: str = RUN_ID,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    **changes: Any,
) -> Group:
    """Make a whole group; G is the number of `rewards`.

    Args:
        ordinal: its place in prompt order; names the group.
        sequence: lease sequence number; the ordinal unless given.
        attempt: which lease of the ordinal it answers.
        purpose: train or eval.
        rewards: [G]; None is a completion without a value.
        functions: name -> [G], each a value or the status that took its place; unless given there is one
            function, "exact_match", whose values are the rewards.
        lengths: [G] tokens; 3, 4, 5, 3, ... unless given.
        version: what sampled every token.
        spans: [G] version spans, instead of `version`.
        finish_reasons: [G]; all STOP unless given.
        completions: [G] ready-made, instead of lengths, version, spans and finish_reasons.
        temperature: of all logprobs.
        run_id: the run, in the group id.
        vocab_size: tokens are below it.
        seed: of tokens and logprobs.
        changes: any other field of Group, as is.
    """
    num_generations = len(rewards)
    if completions is None:
        if lengths is None:
            lengths = (
                [3 + i % 3 for i in range(num_generations)] if spans is None else [sum(n for _, n in s) for s in spans]
            )
        reasons = finish_reasons or [FinishReason.STOP] * num_generations
        completions = [
            make_completion(
                length,
                spans=None if spans is None else spans[i],
                version=version,
                finish_reason=reasons[i],
                vocab_size=vocab_size,
                seed=seed * 1009 + ordinal * 101 + i,
            )
            for i, length in enumerate(lengths)
        ]
    packed = pack_completions(completions)
    functions = functions or {"exact_match": [RewardStatus.UNSCORED if r is None else r for r in rewards]}
    cells = [[functions[name][i] for name in functions] for i in range(num_generations)]
    fields: dict[str, Any] = {
        "group_id": group_id(run_id, ordinal, purpose),
        "ordinal": ordinal,
        "sequence": ordinal if sequence is None else sequence,
        "attempt": attempt,
        "purpose": purpose,
        "num_generations": num_generations,
        "temperature": temperature,
        "reward_names": tuple(functions),
        "generate_s": 0.5,
        "reward_s": 0.1,
        "completion_index": np.arange(num_generations, dtype=np.int32),
        "completion_lengths": packed.completion_lengths,
        "completion_tokens": packed.completion_tokens,
        "behavior_logprobs": packed.behavior_logprobs,
        "finish_reasons": packed.finish_reasons,
        "span_counts": packed.span_counts,
        "span_lengths": packed.span_lengths,
        "span_versions": packed.span_versions,
        "rewards": np.array([r or 0.0 for r in rewards], np.float32),
        "scored": np.array([r is not None for r in rewards], np.uint8),
        "reward_values": np.array(
            [[0.0 if isinstance(c, RewardStatus) else c for c in row] for row in cells], np.float32
        ),
        "reward_statuses": np.array(
            [[c if isinstance(c, RewardStatus) else RewardStatus.OK for c in row] for row in cells], np.uint8
        ),
        "reward_seconds": np.full((num_generations, len(functions)), 0.01, np.float32),
    }
    return Group(**{**fields, **changes})


def make_train_group(
    *,
    ordinal: int = 0,
    sequence: int | None = None,
    prompt_tokens: Sequence[int] = (3, 4, 5),
    prompt: str = "2 + 3 =",
    group: Group | None = None,
    **group_fields: Any,
) -> TrainGroup:
    """Make a group as the buffer holds it; further arguments are those of `make_group`."""
    sequence = ordinal if sequence is None else sequence
    return TrainGroup(
        ordinal=ordinal,
        sequence=sequence,
        prompt_tokens=np.array(prompt_tokens, np.int32),
        prompt=prompt,
        group=group or make_group(ordinal=ordinal, sequence=sequence, **group_fields),
    )


def make_batch(*, step: int = 1, groups: Sequence[TrainGroup] | None = None, num_groups: int = 2) -> Batch:
    """Make the batch of `step`: `groups`, or `num_groups` default ones with consecutive ordinals."""
    if groups is None:
        groups = [make_train_group(ordinal=i) for i in range(num_groups)]
    return Batch(step=step, groups=tuple(groups))
