"""From the groups of a step to the rows that a model is run on. Pure: numpy in, numpy out, no model, no device.

    groups --collect--> StepTokens --pack_shared--> MicroBatch: each prompt once, its completions behind it
                                   `-pack_padded--> MicroBatch: every completion with its own copy of the prompt

What does not train never reaches the model: aborted, unscored and (on request) truncated completions, and groups left
with too few. The last token of a completion predicts nothing that is trained, so it is never forwarded; the
last token of a prompt predicts the first token of every completion.

The order is that of the batch (completions of a group by length), so the same batch always gives the same rows.
Shapes: P groups, G generations, N completions that train, C all their tokens, T those of the C that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from learner.batch import Bool, TrainGroup, completions_that_train, step_rewards
from learner.model.balance import pack
from protocol.messages import Float32, Int32

Int64 = npt.NDArray[np.int64]

SHORT_TOKENS = 32
SHORT_SLACK_TOKENS = 8
"""Sequences of up to 32 tokens that differ by up to 8 share an attention call, longer ones only with their equals:
a call costs about as much as the attention of 16 tokens (measured; CPU)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Everything of a step that trains, flat."""

    prompts: tuple[Int64, ...]
    """[P] of [tokens]; of all groups, also those with nothing to train."""
    rewards_PG: Float32
    trains_PG: Bool
    """Which completions train: their order here, row by row, is the order of N."""
    group_N: Int64
    lengths_N: Int64
    """Tokens of each completion; sums to C."""
    tokens_C: Int64
    trained_C: Bool
    """Whether the token trains: its loss_mask. T of them do."""
    step_rewards_C: Float32
    """Of the step that ends with the token, NaN where none does (see batch.step_rewards)."""
    completion_T: Int64
    targets_T: Int64
    """The token ids."""
    behavior_logprobs_T: Float32
    temperature_T: Float32
    """Of the softmax that its logprobs are of."""
    policy_version_T: Int64
    """Of the weights that sampled the token."""


class Bucket:
    """Consecutive sequences of a row that share one causal attention call, right-padded to the longest."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.num_tokens = sum(lengths)
        """Without padding."""
        self.padded_length = max(lengths)
        self.slots: Int64 | None = None
        """[num_tokens] place of every token in the flat padded batch; None where nothing is padded."""
        if min(lengths) < self.padded_length:
            self.slots = np.flatnonzero(np.arange(self.padded_length) < np.array(lengths)[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who attends to whom in a row: prompts first, then the completions of each, in the same order."""

    prompts: tuple[Bucket, ...]
    """Empty where the prompt was forwarded before (see MicroBatch.prompt)."""
    prompt_lengths: tuple[int, ...]
    """Tokens of the prefix of each group, wherever it is."""
    completions: tuple[tuple[Bucket, ...], ...]
    """Per group. Completions with nothing to forward (one token) are not among them."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return sum(bucket.num_tokens for bucket in self.prompts) + sum(self.group_lengths)

    @property
    def group_lengths(self) -> tuple[int, ...]:
        """Completion tokens of each group in the row."""
        return tuple(sum(bucket.num_tokens for bucket in group) for group in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One call of the model: B sequences of L tokens. A shared-prefix row has B = 1, and a layout."""

    tokens_BL: Int64
    positions_BL: Int64
    layout: Layout | None
    predictor_T: Int64
    """For each token that trains here, which hidden state predicts it: index into the flat [B x L], behind the
    prompt's own hidden states where the prompt was forwarded before."""
    index_T: Int64
    """Which of the step's T tokens they are."""
    num_parts: int = 1
    """Ranks that the tokens are divided among (context.py): those here are one part, and the layout is of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that are forwarded and backwarded one after the other."""

    rows: tuple[Rows, ...]
    prompt: Rows | None = None
    """The prompt of a group too large for one row: forwarded once, before its completions, and backwarded after."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model is run on, padding included."""
        return sum(rows.tokens_BL.size for rows in (*self.rows, *([self.prompt] if self.prompt else [])))


def collect(groups: Sequence[TrainGroup], *, mask_truncated_completions: bool, min_scored: int = 2) -> StepTokens:
    """Keep what trains of the step's groups, in their order.

    Args:
        groups: whole and validated.
        mask_truncated_completions: leave completions that hit max_completion_length out, as if unscored.
        min_scored: of a group with fewer completions left, nothing trains.
    """
    num_generations = max(group.group.num_generations for group in groups)
    rewards_PG = np.zeros((len(groups), num_generations), np.float32)
    trains_PG = np.zeros((len(groups), num_generations), np.bool_)
    tokens, trained, steps, logprobs, temperatures, versions = [], [], [], [], [], []
    for p, group in enumerate(entry.group for entry in groups):
        trains_G = completions_that_train(group, mask_truncated_completions=mask_truncated_completions)
        if trains_G.sum() < min_scored:
            # One reward compares with nothing, unless with a critic: nothing to train (and outside all denominators).
            trains_G = np.zeros_like(trains_G)
        trains_PG[p, : trains_G.size] = trains_G
        rewards_PG[p, : trains_G.size] = group.rewards
        kept = np.repeat(trains_G, group.completion_lengths)
        mask = np.ones(kept.size, np.bool_) if group.loss_mask is None else group.loss_mask.astype(np.bool_)
        tokens.append(group.completion_tokens[kept])
        trained.append(mask[kept])
        steps.append(step_rewards(group)[kept])
        logprobs.append(group.behavior_logprobs[kept & mask])
        # Greedy groups carry temperature 0; their logprobs are those of temperature 1 (messages.Sampling).
        temperatures.append(np.full(logprobs[-1].size, group.temperature or 1.0, np.float32))
        versions.append(np.repeat(group.span_versions[:, 1], group.span_lengths)[kept & mask])
    lengths_N = np.concatenate([g.group.completion_lengths for g in groups])[_flat(trains_PG, groups)].astype(np.int64)
    tokens_C, trained_C = np.concatenate(tokens).astype(np.int64), np.concatenate(trained)
    return StepTokens(
        prompts=tuple(entry.prompt_tokens.astype(np.int64) for entry in groups),
        rewards_PG=rewards_PG,
        trains_PG=trains_PG,
        group_N=np.nonzero(trains_PG)[0],
        lengths_N=lengths_N,
        tokens_C=tokens_C,
        trained_C=trained_C,
        step_rewards_C=np.concatenate(steps),
        completion_T=np.repeat(np.arange(lengths_N.size), lengths_N)[trained_C],
        targets_T=tokens_C[trained_C],
        behavior_logprobs_T=np.concatenate(logprobs),
        temperature_T=np.concatenate(temperatures),
        policy_version_T=np.concatenate(versions).astype(np.int64),
    )


def whole_sequences(tokens_NL: Int32) -> StepTokens:
    """Sequences as a step in which everything trains: the first token of each is its prompt, the rest is predicted.

    Args:
        tokens_NL: [N, L], L >= 2; the T = N x (L - 1) predicted tokens keep their order.
    """
    num_sequences, length = tokens_NL.shape[0], tokens_NL.shape[1] - 1
    predicted = np.ascontiguousarray(tokens_NL[:, 1:], np.int64).reshape(-1)
    return StepTokens(
        prompts=tuple(tokens_NL[:, :1].astype(np.int64)),
        rewards_PG=np.zeros((num_sequences, 1), np.float32),
        trains_PG=np.ones((num_sequences, 1), np.bool_),
        group_N=np.arange(num_sequences),
        lengths_N=np.full(num_sequences, length),
        tokens_C=predicted,
        trained_C=np.ones(predicted.size, np.bool_),
        step_rewards_C=np.full(predicted.size, np.nan, np.float32),
        completion_T=np.repeat(np.arange(num_sequences), length),
        targets_T=predicted,
        behavior_logprobs_T=np.zeros(predicted.size, np.float32),
        temperature_T=np.ones(predicted.size, np.float32),
        policy_version_T=np.zeros(predicted.size, np.int64),
    )


def mini_batches(step: StepTokens, num_mini_batches: int) -> list[StepTokens]:
    """Cut a step into consecutive parts of about as many groups that train; fewer parts where there are fewer groups.

    Together they hold every group, completion and token of the step, in its order; each has a token that trains.
    """
    trained = np.unique(step.group_N[step.completion_T])
    parts = np.array_split(trained, min(num_mini_batches, trained.size))
    bounds = [0, *(int(part[0]) for part in parts[1:]), len(step.prompts)]
    return [step] if len(parts) == 1 else [_groups(step, first, last) for first, last in pairwise(bounds)]


def pack_shared(step: StepTokens, token_budget: int) -> list[MicroBatch]:
    """Fill rows with whole groups, each prompt once, up to `token_budget` tokens a row.

    A group that does not fit a row of its own has its prompt forwarded apart and its completions cut into several rows.
    A completion that is longer than the budget gets a row to itself all the same.
    """
    members = [np.flatnonzero(step.group_N == p) for p in range(len(step.prompts))]
    cost_P = [len(prompt) + int((step.lengths_N[n] - 1).sum()) for prompt, n in zip(step.prompts, members, strict=True)]
    training = [p for p in range(len(members)) if members[p].size]
    micro_batches: list[MicroBatch] = []
    for row in pack([cost_P[p] for p in training], token_budget):
        groups = [training[place] for place in row]
        if len(groups) == 1 and cost_P[groups[0]] > token_budget:
            micro_batches.append(_split_group(step, groups[0], members[groups[0]], token_budget))
        else:
            micro_batches.append(MicroBatch(rows=(_shared_row(step, groups, [members[p] for p in groups]),)))
    return micro_batches


def pack_padded(step: StepTokens, token_budget: int) -> list[MicroBatch]:
    """Put prompt and completion of every completion in a row of a right-padded batch, similar lengths together.

    Padding on the right needs no mask: under causal attention no token sees what comes after it.
    """
    prompt_N = np.array([len(prompt) for prompt in step.prompts], np.int64)[step.group_N]
    total_N = prompt_N + step.lengths_N - 1
    starts_N = _starts(step.lengths_N)
    order = np.argsort(total_N, kind="stable")
    micro_batches: list[MicroBatch] = []
    first = 0
    while first < order.size:
        last = first + 1
        while last < order.size and (last + 1 - first) * total_N[order[last]] <= token_budget:
            last += 1
        chosen, first = order[first:last], last
        tokens_BL = np.zeros((chosen.size, total_N[chosen[-1]]), np.int64)
        for row, n in zip(tokens_BL, chosen.tolist(), strict=True):
            row[: prompt_N[n]] = step.prompts[step.group_N[n]]
            row[prompt_N[n] : total_N[n]] = step.tokens_C[starts_N[n] : starts_N[n] + step.lengths_N[n] - 1]
        place, within, token = _token_places(step, chosen)
        predictor = place * tokens_BL.shape[1] + prompt_N[chosen][place] + within - 1
        positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape).copy()
        micro_batches.append(MicroBatch(rows=(_rows(step, tokens_BL, positions_BL, None, predictor, token),)))
    return micro_batches


def buckets(lengths: Sequence[int]) -> tuple[Bucket, ...]:
    """Cut consecutive sequences into buckets of (nearly) equal length. Empty sequences are left out."""
    found: list[list[int]] = []
    low = high = 0
    for length in lengths:
        if not length:
            continue
        low, high = min(low, length), max(high, length)
        if found and (low == high or (high <= SHORT_TOKENS and high - low <= SHORT_SLACK_TOKENS)):
            found[-1].append(length)
        else:
            found.append([length])
            low = high = length
    return tuple(Bucket(bucket) for bucket in found)


def _groups(step: StepTokens, first: int, last: int) -> StepTokens:
    """The groups first <= p < last of a step, as a step of their own."""
    n0, n1 = np.searchsorted(step.group_N, [first, last]).tolist()
    c0, c1 = int(step.lengths_N[:n0].sum()), int(step.lengths_N[:n1].sum())
    t0, t1 = np.searchsorted(step.completion_T, [n0, n1]).tolist()
    return StepTokens(
        prompts=step.prompts[first:last],
        rewards_PG=step.rewards_PG[first:last],
        trains_PG=step.trains_PG[first:last],
        group_N=step.group_N[n0:n1] - first,
        lengths_N=step.lengths_N[n0:n1],
        tokens_C=step.tokens_C[c0:c1],
        trained_C=step.trained_C[c0:c1],
        step_rewards_C=step.step_rewards_C[c0:c1],
        completion_T=step.completion_T[t0:t1] - n0,
        targets_T=step.targets_T[t0:t1],
        behavior_logprobs_T=step.behavior_logprobs_T[t0:t1],
        temperature_T=step.temperature_T[t0:t1],
        policy_version_T=step.policy_version_T[t0:t1],
    )


def _flat(trains_PG: Bool, groups: Sequence[TrainGroup]) -> Bool:
    """Flatten [P, G] over groups that may have fewer than G generations."""
    return np.concatenate([row[: g.group.num_generations] for row, g in zip(trains_PG, groups, strict=True)])


def _split_group(step: StepTokens, p: int, members_N: Int64, token_budget: int) -> MicroBatch:
    """Forward the prompt apart, and the completions in rows of what the budget leaves beside it."""
    prompt = step.prompts[p]
    nothing = np.zeros(0, np.int64)
    layout = Layout(prompts=buckets([prompt.size]), prompt_lengths=(prompt.size,), completions=((),))
    budget = max(1, token_budget - prompt.size)
    return MicroBatch(
        prompt=_rows(step, prompt[None], np.arange(prompt.size)[None], layout, nothing, nothing),
        rows=tuple(
            _shared_row(step, [p], [members_N[row]], prompt_apart=True)
            for row in pack((step.lengths_N[members_N] - 1).tolist(), budget)
        ),
    )


def _shared_row(
    step: StepTokens, groups: Sequence[int], members: Sequence[Int64], *, prompt_apart: bool = False
) -> Rows:
    """Lay out whole groups (or, with the prompt apart, some completions of one) in a single row."""
    ordered = [n[np.argsort(step.lengths_N[n], kind="stable")] for n in members]
    chosen = np.concatenate(ordered)
    prompts = [step.prompts[p] for p in groups]
    prompt_lengths = np.array([prompt.size for prompt in prompts], np.int64)
    group_of = np.repeat(np.arange(len(groups)), [n.size for n in ordered])

    place, within, token = _token_places(step, chosen)
    forwarded = within < step.lengths_N[chosen][place] - 1
    behind_prompts = prompt_lengths.sum() + _starts(step.lengths_N[chosen] - 1)[place] + within - 1
    predictor = np.where(within == 0, (prompt_lengths.cumsum() - 1)[group_of[place]], behind_prompts)
    tokens = step.tokens_C[token[forwarded]]
    positions = prompt_lengths[group_of[place]][forwarded] + within[forwarded]
    if not prompt_apart:
        tokens = np.concatenate([*prompts, tokens])
        positions = np.concatenate([*(np.arange(prompt.size) for prompt in prompts), positions])
    layout = Layout(
        prompts=() if prompt_apart else buckets(prompt_lengths.tolist()),
        prompt_lengths=tuple(prompt_lengths.tolist()),
        completions=tuple(buckets((step.lengths_N[n] - 1).tolist()) for n in ordered),
    )
    return _rows(step, tokens[None], positions[None], layout, predictor, token)


def _token_places(step: StepTokens, chosen: Int64) -> tuple[Int64, Int64, Int64]:
    """For all tokens of the chosen completions: place of the completion in `chosen`, place in it, index into C."""
    lengths = step.lengths_N[chosen]
    place = np.repeat(np.arange(chosen.size), lengths)
    within = np.arange(place.size) - _starts(lengths)[place]
    return place, within, _starts(step.lengths_N)[chosen][place] + within


def _rows(
    step: StepTokens, tokens_BL: Int64, positions_BL: Int64, layout: Layout | None, predictor: Int64, token: Int64
) -> Rows:
    """Drop the predictions of tokens that do not train."""
    trains = step.trained_C[token]
    index_C = step.trained_C.cumsum() - 1
    return Rows(
        tokens_BL=tokens_BL,
        positions_BL=positions_BL,
        layout=layout,
        predictor_T=predictor[trains],
        index_T=index_C[token[trains]],
    )


def _starts(lengths: Int64) -> Int64:
    return lengths.cumsum() - lengths
