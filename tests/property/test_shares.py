"""The shares of all ranks together are the step, whatever the groups: each token trained once, by the rows it had."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from learner.model.packing import StepTokens, collect, pack_padded, pack_shared
from learner.model.shares import TOLERATED_IMBALANCE, TokenCost, divide, of_whole_step, restrict
from tests.factories import make_batch, make_train_group

COST = TokenCost(layers=10.0, attention=0.1, head=5.0)


@st.composite
def steps(draw) -> StepTokens:
    num_groups = draw(st.integers(1, 6))
    groups = []
    for ordinal in range(num_groups):
        lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=8))
        rewards = draw(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=len(lengths), max_size=len(lengths)))
        prompt = list(range(2, 2 + draw(st.integers(1, 20))))
        mask = np.array(draw(st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths))), np.uint8)
        groups.append(
            make_train_group(ordinal=ordinal, lengths=lengths, rewards=rewards, prompt_tokens=prompt, loss_mask=mask)
        )
    step = collect(make_batch(groups=groups).groups, mask_truncated_completions=False)
    assume(step.lengths_N.size)  # else the trainer skips it
    return step


@pytest.mark.parametrize("pack", [pack_shared, pack_padded])
@given(step=steps(), num_ranks=st.integers(1, 5), token_budget=st.integers(1, 60))
def test_every_token_is_trained_once_after_the_tokens_that_come_before_it(pack, step, num_ranks, token_budget):
    rank_N = divide(step, COST, num_ranks)
    seen = []
    for rank in range(num_ranks):
        part, index_T = restrict(step, rank_N == rank)
        for micro_batch in pack(part, token_budget):
            for rows in of_whole_step(micro_batch, index_T).rows:
                seen += rows.index_T.tolist()
        assert np.array_equal(part.targets_T, step.targets_T[index_T])
        assert np.array_equal(part.behavior_logprobs_T, step.behavior_logprobs_T[index_T])
    assert sorted(seen) == list(range(step.targets_T.size))


def costs(step: StepTokens) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, and of each completion."""
    length_P = np.array([prompt.size for prompt in step.prompts])
    return COST.prompts(length_P), COST.completions(length_P[step.group_N], step.lengths_N)


def loads(step: StepTokens, rank_N: np.ndarray, num_ranks: int) -> np.ndarray:
    """Costs of all ranks, each prompt counted on every rank that forwards it."""
    prompt_P, completion_N = costs(step)
    load = np.bincount(rank_N, completion_N, minlength=num_ranks)
    for p, rank in {(p, rank) for p, rank in zip(step.group_N.tolist(), rank_N.tolist(), strict=True)}:
        load[rank] += prompt_P[p]
    return load


@given(step=steps(), num_ranks=st.integers(1, 5))
def test_no_rank_has_more_than_its_share_and_one_completion_and_prompt(step, num_ranks):
    rank_N = divide(step, COST, num_ranks)
    load = loads(step, rank_N, num_ranks)
    prompt_P, completion_N = costs(step)
    largest = completion_N.max() + 2 * prompt_P.max()
    assert load.max() <= TOLERATED_IMBALANCE * load.mean() + largest


def equal_groups(num_groups: int) -> StepTokens:
    groups = [make_train_group(ordinal=p, rewards=[0.0, 1.0] * 4, lengths=[6] * 8) for p in range(num_groups)]
    return collect(make_batch(groups=groups).groups, mask_truncated_completions=False)


def test_equal_groups_stay_whole():
    step = equal_groups(4)
    rank_N = divide(step, COST, 2)
    assert all(len(set(rank_N[step.group_N == p])) == 1 for p in range(4))


def test_fewer_groups_than_ranks_are_cut():
    step = equal_groups(1)
    rank_N = divide(step, COST, 4)
    assert np.bincount(rank_N, minlength=4).min() >= 1, "nobody is idle"
    assert (np.diff(rank_N) >= 0).all()
