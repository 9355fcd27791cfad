"""The vectorized reductions agree with the plain loops that define them, on any valid group."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import TrainGroup
from learner.batch_metrics import completion_staleness, reward_metrics, staleness_metrics, token_staleness
from protocol.completions import unpack_completions
from protocol.messages import FinishReason
from protocol.versions import Version
from tests.factories import make_batch, make_group, make_train_group

STEP = 9

spans = st.lists(
    st.tuples(st.builds(Version, st.integers(1, 2), st.integers(0, STEP - 1)), st.integers(1, 4)), max_size=4
)
rewards = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))


@st.composite
def train_groups(draw: st.DrawFn) -> TrainGroup:
    num_generations = draw(st.integers(2, 5))
    sampled = draw(st.lists(spans, min_size=num_generations, max_size=num_generations))
    num_tokens = sum(length for completion in sampled for _, length in completion)
    reasons = st.lists(st.sampled_from(FinishReason), min_size=num_generations, max_size=num_generations)
    mask = st.lists(st.integers(0, 1), min_size=num_tokens, max_size=num_tokens)
    loss_mask = draw(st.one_of(st.none(), mask))
    group = make_group(
        rewards=draw(st.lists(rewards, min_size=num_generations, max_size=num_generations)),
        spans=sampled,
        finish_reasons=draw(reasons),
        loss_mask=None if loss_mask is None else np.array(loss_mask, np.uint8),
    )
    return make_train_group(group=group)


def loop_over_tokens(train: TrainGroup) -> list[int]:
    """Staleness of each token that can train, the way one would say it."""
    group, place, found = train.group, 0, []
    for i, completion in enumerate(unpack_completions(group)):
        for version, length in completion.spans:
            for _ in range(length):
                masked = group.loss_mask is not None and not group.loss_mask[place]
                if group.scored[i] and completion.finish_reason is not FinishReason.ABORT and not masked:
                    found.append(STEP - 1 - version.policy_version)
                place += 1
    return found


def loop_over_completions(train: TrainGroup) -> list[int]:
    return [
        STEP - 1 - min(version.policy_version for version, _ in completion.spans)
        for i, completion in enumerate(unpack_completions(train.group))
        if completion.spans and train.group.scored[i] and completion.finish_reason is not FinishReason.ABORT
    ]


@settings(max_examples=60, deadline=None)
@given(train_groups())
def test_staleness_of_tokens_and_completions(train):
    staleness, tokens = token_staleness([train.group], STEP - 1)
    assert np.repeat(staleness, tokens).tolist() == loop_over_tokens(train)
    assert completion_staleness([train.group], STEP - 1).tolist() == loop_over_completions(train)


@settings(max_examples=60, deadline=None)
@given(st.lists(train_groups().filter(lambda train: train.group.span_counts.any()), max_size=3))
def test_the_histogram_counts_every_training_token_and_ends_at_the_oldest(groups):
    row = staleness_metrics(make_batch(step=STEP, groups=groups))
    tokens = [staleness for train in groups for staleness in loop_over_tokens(train)]
    assert row["staleness/hist"] == [tokens.count(i) for i in range(row["staleness/max"] + 1)]
    if tokens:
        assert row["staleness/token_mean"] == pytest.approx(statistics.mean(tokens))
        assert max(tokens) <= row["sample/staleness_max"] <= row["staleness/max"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(rewards, min_size=2, max_size=5), max_size=4))
def test_reward_statistics(groups):
    row = reward_metrics([make_group(ordinal=i, rewards=group) for i, group in enumerate(groups)])
    scored = [[reward for reward in group if reward is not None] for group in groups]
    values = [reward for group in scored for reward in group]
    spreads = [statistics.stdev(group) for group in scored if len(group) >= 2]
    assert row["reward"] == pytest.approx(statistics.mean(values) if values else math.nan, nan_ok=True)
    assert row["reward_std"] == pytest.approx(statistics.mean(spreads) if spreads else math.nan, nan_ok=True)
    equal = [float(len(set(group)) == 1) for group in scored if len(group) >= 2]
    assert row["frac_reward_zero_std"] == pytest.approx(statistics.mean(equal) if equal else math.nan, nan_ok=True)
