"""Packing by hand: what is kept, where it lies, what predicts what."""

from __future__ import annotations

import numpy as np
import pytest

from learner.model.packing import Bucket, buckets, collect, pack_padded, pack_shared
from protocol.messages import FinishReason
from tests.factories import make_completion, make_train_group

STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


def two_groups():
    return [
        make_train_group(ordinal=0, prompt_tokens=[10, 11], rewards=(1.0, 0.0), lengths=[3, 1]),
        make_train_group(ordinal=1, prompt_tokens=[20, 21, 22], rewards=(1.0, 0.0, None), lengths=[2, 4, 5]),
    ]


def keep(groups, **changes):
    return collect(groups, **{"mask_truncated_completions": False, **changes})


# --- collect


def test_flat_arrays():
    groups = two_groups()
    step = keep(groups)
    assert step.lengths_N.tolist() == [3, 1, 2, 4]
    assert step.group_N.tolist() == [0, 0, 1, 1]
    assert step.trains_PG.tolist() == [[True, True, False], [True, True, False]]
    assert step.rewards_PG.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert step.completion_T.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
    kept = [*groups[0].group.completion_tokens, *groups[1].group.completion_tokens[:6]]
    assert step.tokens_C.tolist() == kept == step.targets_T.tolist()


def test_aborted_completions_never_train():
    group = make_train_group(rewards=(1.0, 0.0, 1.0), finish_reasons=[STOP, ABORT, LENGTH])
    assert keep([group]).trains_PG.tolist() == [[True, False, True]]


def test_truncated_completions_train_unless_masked():
    group = make_train_group(rewards=(1.0, 0.0, 1.0), finish_reasons=[STOP, STOP, LENGTH])
    assert keep([group]).trains_PG.all()
    assert keep([group], mask_truncated_completions=True).trains_PG.tolist() == [[True, True, False]]


def test_an_empty_completion_does_not_train():
    completions = [make_completion(0, finish_reason=LENGTH), make_completion(2), make_completion(2, seed=1)]
    assert keep([make_train_group(rewards=(1.0, 0.0, 1.0), completions=completions)]).lengths_N.tolist() == [2, 2]


@pytest.mark.parametrize("rewards", [(None, None, 1.0), (None, None, None)])
def test_a_group_with_fewer_than_two_values_does_not_train(rewards):
    step = keep([make_train_group(rewards=rewards), *two_groups()])
    assert step.group_N.tolist() == [1, 1, 2, 2]
    assert not step.trains_PG[0].any()


def test_masked_tokens_are_context_but_no_target():
    mask = np.array([1, 0, 1, 0, 1], np.uint8)
    group = make_train_group(rewards=(1.0, 0.0), lengths=[3, 2], loss_mask=mask, temperature=0.5)
    step = keep([group])
    assert step.tokens_C.size == 5
    assert step.targets_T.tolist() == group.group.completion_tokens[[0, 2, 4]].tolist()
    assert step.behavior_logprobs_T.tolist() == group.group.behavior_logprobs[[0, 2, 4]].tolist()
    assert step.completion_T.tolist() == [0, 0, 1]
    assert step.temperature_T.tolist() == [0.5] * 3


def test_greedy_groups_have_the_logprobs_of_temperature_one():
    assert set(keep([make_train_group(temperature=0.0)]).temperature_T.tolist()) == {1.0}


def test_received_arrays_may_be_read_only():
    group = make_train_group(rewards=(1.0, 0.0))
    for name in ("completion_tokens", "behavior_logprobs", "rewards", "scored", "completion_lengths"):
        getattr(group.group, name).flags.writeable = False
    step = keep([group])
    assert step.rewards_PG.flags.writeable
    assert step.behavior_logprobs_T.flags.writeable


# --- shared rows


def test_a_shared_row_by_hand():
    step = keep(two_groups())
    (micro_batch,) = pack_shared(step, 100)
    (rows,) = micro_batch.rows
    c = step.tokens_C.tolist()
    # Prompts first, then completions by length within their group, each without its last token.
    assert rows.tokens_BL.tolist() == [[10, 11, 20, 21, 22, c[0], c[1], c[4], c[6], c[7], c[8]]]
    assert rows.positions_BL.tolist() == [[0, 1, 0, 1, 2, 2, 3, 3, 3, 4, 5]]
    # The one-token completion comes first of its group: its token is predicted by the prompt's end, as all first ones.
    assert rows.index_T.tolist() == [3, 0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert rows.predictor_T.tolist() == [1, 1, 5, 6, 4, 7, 4, 8, 9, 10]
    assert rows.layout is not None
    assert rows.layout.prompt_lengths == (2, 3)
    assert rows.layout.group_lengths == (2, 4)
    assert micro_batch.num_tokens == 11


def test_groups_share_rows_up_to_the_budget():
    groups = [make_train_group(ordinal=i, prompt_tokens=[3] * 4, rewards=(1.0, 0.0), lengths=[4, 4]) for i in range(5)]
    micro_batches = pack_shared(keep(groups), 25)  # 4 + 3 + 3 = 10 tokens a group
    assert sorted(m.num_tokens for m in micro_batches) == [10, 20, 20]
    assert all(m.prompt is None and len(m.rows) == 1 for m in micro_batches)


def test_a_small_group_fills_the_row_of_an_earlier_one():
    lengths = [[9, 9], [10, 10], [2, 2]]
    groups = [
        make_train_group(ordinal=i, prompt_tokens=[3], rewards=(1.0, 0.0), lengths=n) for i, n in enumerate(lengths)
    ]
    micro_batches = pack_shared(keep(groups), 20)  # 17, 19 and 3 tokens
    assert [m.num_tokens for m in micro_batches] == [20, 19]


def test_a_group_above_the_budget_has_its_prompt_apart():
    group = make_train_group(prompt_tokens=[5, 6, 7], rewards=(1.0, 0.0, 1.0, 0.0), lengths=[4, 9, 1, 4])
    step = keep([group])
    (micro_batch,) = pack_shared(step, 10)  # 7 tokens are left beside the prompt
    assert micro_batch.prompt is not None
    assert micro_batch.prompt.tokens_BL.tolist() == [[5, 6, 7]]
    assert [rows.tokens_BL.size for rows in micro_batch.rows] == [6, 8]  # lengths 1, 4, 4 | 9, above the budget
    first = micro_batch.rows[0]
    assert first.positions_BL.tolist() == [[3, 4, 5, 3, 4, 5]]
    # Behind the prompt's three hidden states.
    assert first.predictor_T.tolist() == [2, 2, 3, 4, 5, 2, 6, 7, 8]
    assert first.layout is not None
    assert first.layout.prompts == ()
    assert first.layout.prompt_lengths == (3,)


def test_groups_without_anything_to_train_are_not_forwarded():
    groups = [make_train_group(rewards=(None, 1.0)), *two_groups()]
    (micro_batch,) = pack_shared(keep(groups), 100)
    assert micro_batch.num_tokens == 11
    assert pack_shared(keep(groups[:1]), 100) == []
    assert pack_padded(keep(groups[:1]), 100) == []


# --- padded rows


def test_padded_rows_by_hand():
    step = keep(two_groups())
    (micro_batch,) = pack_padded(step, 100)
    (rows,) = micro_batch.rows
    c = step.tokens_C.tolist()
    # Completions 1, 0, 2 and 3 by total length.
    assert rows.tokens_BL.tolist() == [
        [10, 11, 0, 0, 0, 0],
        [10, 11, c[0], c[1], 0, 0],
        [20, 21, 22, c[4], 0, 0],
        [20, 21, 22, c[6], c[7], c[8]],
    ]
    assert rows.index_T.tolist() == [3, 0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert rows.predictor_T.tolist() == [1, 7, 8, 9, 14, 15, 20, 21, 22, 23]
    assert rows.layout is None


def test_padded_rows_keep_the_budget_padding_included():
    step = keep(two_groups())
    assert [m.num_tokens for m in pack_padded(step, 12)] == [12, 6]
    assert [m.num_tokens for m in pack_padded(step, 11)] == [8, 4, 6]
    assert [m.num_tokens for m in pack_padded(step, 1)] == [2, 4, 4, 6]


# --- buckets


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([0, 4, 4, 4], [(4, 4, 4)]),
        ([1, 5, 9, 10], [(1, 5, 9), (10,)]),  # short ones that differ by up to 8
        ([32, 32, 33], [(32, 32), (33,)]),  # long ones only with their equals
        ([64, 64, 65, 200], [(64, 64), (65,), (200,)]),
    ],
)
def test_buckets(lengths, expected):
    assert [bucket.lengths for bucket in buckets(lengths)] == expected


def test_slots_of_a_padded_bucket():
    bucket = Bucket((1, 3))
    assert (bucket.num_tokens, bucket.padded_length) == (4, 3)
    assert bucket.slots is not None
    assert bucket.slots.tolist() == [0, 3, 4, 5]
    assert Bucket((3, 3)).slots is None
