import json
import math
from dataclasses import replace

import numpy as np
import pytest

from protocol.completions import Completion, unpack_completions
from protocol.errors import MalformedMessage
from protocol.messages import FinishReason, Lease, Purpose, RewardStatus, Sampling
from protocol.versions import Version
from rollout_server.groups import build_group, reward_call
from rollout_server.rewards.base import Scores

OK, TIMEOUT, ERROR, UNSCORED = RewardStatus
STOP, LENGTH, ABORT = FinishReason


def lease(row=None, temperature=0.7):
    row = {"prompt": "2+2=", "columns": {"answer": "4"}} if row is None else row
    return Lease(
        group_id="g", ordinal=3, sequence=5, attempt=2, purpose=Purpose.TRAIN, num_generations=3, seed=9,
        sampling=Sampling(temperature=temperature, max_completion_length=4, stop_token_ids=(2,)),
        min_version=Version(1, 0), prompt_tokens=np.array([7], np.int32),
        row=np.frombuffer(row if isinstance(row, bytes) else json.dumps(row).encode(), np.uint8),
    )  # fmt: skip


def completion(tokens, reason):
    tokens = np.array(tokens, np.int32)
    return Completion(
        completion_tokens=tokens,
        behavior_logprobs=np.full(len(tokens), -0.5, np.float32),
        spans=((Version(1, 4), len(tokens)),),
        finish_reason=reason,
    )


COMPLETIONS = [completion([11, 2], STOP), completion([12, 13, 14, 15], LENGTH), completion([16], ABORT)]


def decode(tokens):
    return " ".join(str(token) for token in tokens)


def scores(values, statuses):
    return Scores(
        values=np.array(values, np.float32),
        statuses=np.array(statuses, np.uint8),
        seconds=np.full(np.shape(values), 0.25, np.float32),
        notes=("second: ValueError",),
    )


def build(values, statuses, temperature=0.7):
    return build_group(
        lease(temperature=temperature), COMPLETIONS, scores(values, statuses), (1.0, 2.0),
        reward_names=("first", "second"), generate_s=1.5, reward_s=0.5,
    )  # fmt: skip


def test_reward_functions_see_text_without_the_stop_token_and_ids_with_it():
    call = reward_call(lease(), COMPLETIONS, decode)
    assert call.prompts == ["2+2="] * 3
    assert call.completions == ["11", "12 13 14 15", "16"]
    assert call.completion_ids == [[11, 2], [12, 13, 14, 15], [16]]
    assert call.finish_reasons == ["stop", "length", "abort"]
    assert call.columns == {"answer": "4"}


def test_a_chat_prompt_makes_chat_completions():
    messages = [{"role": "user", "content": "2+2?"}]
    call = reward_call(lease({"prompt": messages, "columns": {}}), COMPLETIONS[:1], decode)
    assert call.prompts == [messages]
    assert call.completions == [[{"role": "assistant", "content": "11"}]]


NO_ROWS = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": 1, "columns": {}}',
    b'{"prompt": "x"}',
    b'{"prompt": "x", "columns": {}, "other": 1}',
    b'{"prompt": "\xff", "columns": {}}',
    b'{"prompt": "x", "columns": {"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
]


@pytest.mark.parametrize("row", NO_ROWS, ids=range(len(NO_ROWS)))
def test_a_row_that_is_none_is_the_other_sides_fault(row):
    with pytest.raises(MalformedMessage, match=r"row of lease g \(ordinal 3\)"):
        reward_call(lease(row), COMPLETIONS, decode)


def test_a_group_answers_its_lease_and_holds_its_completions():
    group = build([[1, 1], [1, 1], [1, 1]], [[OK, OK]] * 3)
    assert (group.group_id, group.ordinal, group.sequence, group.attempt) == ("g", 3, 5, 2)
    assert (group.purpose, group.num_generations, group.temperature) == (Purpose.TRAIN, 3, 0.7)
    assert (group.part, group.num_parts, group.generate_s, group.reward_s) == (0, 1, 1.5, 0.5)
    assert group.reward_names == ("first", "second")
    assert group.notes == ("second: ValueError",)
    assert group.completion_index.tolist() == [0, 1, 2]
    for before, after in zip(COMPLETIONS, unpack_completions(group), strict=True):
        assert after.completion_tokens.tolist() == before.completion_tokens.tolist()
        assert (after.spans, after.finish_reason) == (before.spans, before.finish_reason)


def test_rewards_are_weighted_and_what_has_no_value_travels_as_zero():
    nan = math.nan
    group = build([[1, 0.5], [nan, nan], [1, 1]], [[OK, OK], [ERROR, UNSCORED], [OK, OK]])
    assert group.rewards.tolist() == [2.0, 0.0, 0.0]
    assert group.scored.tolist() == [1, 0, 0]
    assert group.reward_values.tolist() == [[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]]
    assert group.reward_seconds.tolist() == [[0.25, 0.25]] * 3
    dtypes = [a.dtype for a in (group.rewards, group.scored, group.reward_values, group.reward_statuses)]
    assert dtypes == [np.float32, np.uint8, np.float32, np.uint8]


def test_an_aborted_completion_is_unscored_whatever_the_functions_said():
    group = build([[1, 1], [1, 1], [1, 1]], [[OK, OK], [OK, OK], [OK, TIMEOUT]])
    assert group.scored.tolist() == [1, 1, 0]
    assert group.reward_statuses.tolist() == [[OK, OK], [OK, OK], [UNSCORED, UNSCORED]]
    assert group.reward_values[2].tolist() == [0.0, 0.0]


def test_a_timeout_counts_only_where_it_was_given_a_value():
    group = build([[-1, 1], [math.nan, 1], [1, 1]], [[TIMEOUT, OK], [TIMEOUT, OK], [OK, OK]])
    assert group.rewards.tolist() == [1.0, 2.0, 0.0]
    assert group.reward_statuses[:2, 0].tolist() == [TIMEOUT, TIMEOUT]
    assert group.reward_values[:2, 0].tolist() == [-1.0, 0.0]


def test_steps_travel_and_those_of_an_aborted_completion_do_not():
    of = scores([[1.5, 1], [0, 0.5], [3, 1]], [[OK, OK]] * 3)
    steps = {(0, 0): [(0, 1.0), (1, 0.5)], (1, 0): [(2, 0.0)], (2, 0): [(0, 3.0)]}
    group = build_group(
        lease(), COMPLETIONS, replace(of, steps=steps), (1.0, 2.0),
        reward_names=("first", "second"), generate_s=1.5, reward_s=0.5,
    )  # fmt: skip
    expected = [1.0, 2.5, math.nan, math.nan, 0.0, 1.0, math.nan]
    assert group.step_rewards.tolist() == pytest.approx(expected, nan_ok=True)
    assert (group.rewards.tolist(), group.scored.tolist()) == ([3.5, 1.0, 0.0], [1, 1, 0])
    assert group.reward_values.tolist() == [[1.5, 1.0], [0.0, 0.5], [0.0, 0.0]]
    assert build([[1, 1]] * 3, [[OK, OK]] * 3).step_rewards is None


def test_greedy_logprobs_are_labeled_as_those_of_temperature_one():
    assert build([[1, 1]] * 3, [[OK, OK]] * 3, temperature=0.0).temperature == 1.0


def test_the_group_as_built_has_only_finite_numbers():
    group = build([[math.nan, math.nan]] * 3, [[TIMEOUT, ERROR]] * 3)
    assert all(np.isfinite(a).all() for a in (group.rewards, group.reward_values, group.reward_seconds))
    assert group.scored.tolist() == [0, 0, 0]
