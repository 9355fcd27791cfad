"""Steps from a reward function in its worker, over the wire and the journal, to advantages of single tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from learner.journal import GroupRecord, read_journal
from protocol.completions import unpack_completions
from tests.system.harness import END_S, RUN_S, START_S, Lab, reward
from tests.system.reward_functions import parity, parity_of_pairs

pytestmark = pytest.mark.system
WEIGHTS = (1.0, 0.5)


def expected_steps(ids: list[int]) -> list[float]:
    """What the two functions say of a completion, token by token."""
    rewards = [float("nan")] * len(ids)
    for token, value in parity_of_pairs([ids])[0]:
        rewards[token] = WEIGHTS[0] * value
    rewards[-1] += WEIGHTS[1] * parity([ids])[0]
    return rewards


def test_every_step_that_a_function_judged_trains(lab: Lab) -> None:
    server = lab.server(reward_funcs=[reward("parity_of_pairs"), reward("parity")], reward_weights=list(WEIGHTS))
    learner = lab.learner(advantage_estimator="process", filter_zero_std=True, max_steps=3, num_completions_logged=8)
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0

    groups = [record.group for record in read_journal(lab.run.path / "journal") if isinstance(record, GroupRecord)]
    assert len(groups) >= 12
    for group in groups:
        of_tokens = [expected_steps(completion.completion_tokens.tolist()) for completion in unpack_completions(group)]
        np.testing.assert_array_equal(group.step_rewards, np.concatenate(of_tokens).astype(np.float32))
        np.testing.assert_allclose(group.rewards, [np.nansum(of) for of in of_tokens])

    rows = lab.run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and 0 < row["step_reward"] < 1.5 for row in rows)
    assert all(row["rewards/errors"] == 0 and row["completions/mean_steps"] > 1 for row in rows)
    assert not lab.run.events("step_rewards"), "they are what this estimator wants"
    (sample, *_) = map(json.loads, (lab.run.path / "samples" / "step_000001.jsonl").read_text("utf-8").splitlines())
    assert sum(value for _, value in sample["step_rewards"]) == pytest.approx(sample["reward"])
