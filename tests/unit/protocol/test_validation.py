from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.errors import InvalidGroup
from protocol.messages import FinishReason, Group, RewardStatus
from protocol.validation import MAX_NOTES, check_shapes, validate_group
from protocol.versions import Version
from tests.factories import VOCAB_SIZE, make_group

V3, V4 = Version(1, 3), Version(1, 4)
NAN, INF = float("nan"), float("inf")


def validate(group: Group, **terms: Any) -> None:
    defaults = {
        "num_generations": 4,
        "max_completion_length": 8,
        "vocab_size": VOCAB_SIZE,
        "reward_functions": ("exact_match",),
    }
    validate_group(group, **{**defaults, **terms})


def edited(name: str, edit: Callable[[np.ndarray], Any], **fields: Any) -> Group:
    """Return a group one of whose arrays was edited in place, or replaced by what `edit` returns."""
    group = make_group(ordinal=17, **fields)
    array = getattr(group, name).copy()
    changed = edit(array)
    return msgspec.structs.replace(group, **{name: array if changed is None else changed})


def stepwise(edit: Callable[[np.ndarray], Any], **fields: Any) -> Group:
    """A group whose completions, of 3, 4, 5 and 3 tokens, have a step with the last token each, edited in place."""
    steps = np.full(15, NAN, np.float32)
    steps[[2, 6, 11, 14]] = 0.5
    edit(steps)
    return make_group(ordinal=17, step_rewards=steps, **fields)


def put(index: Any, value: Any) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[index] = value

    return edit


def test_valid_groups_pass():
    validate(make_group())
    validate(make_group(spans=[[(V3, 2), (V4, 1)], [(V3, 4)], [(V4, 1), (V4, 2)], [(V3, 8)]]))
    validate(make_group(rewards=[1.0, None, 0.0, None]))
    validate(make_group(temperature=0.0), reward_functions=["exact_match"])
    validate(
        make_group(
            functions={"a": [1.0, RewardStatus.ERROR, 0.5, RewardStatus.TIMEOUT], "b": [RewardStatus.UNSCORED] * 4},
            rewards=[1.0, None, 0.5, None],
        ),
        reward_functions=("a", "b"),
    )


def test_a_value_set_for_a_timeout_counts_as_scored():
    functions = {"exact_match": [1.0, RewardStatus.TIMEOUT, 0.0, 1.0]}
    validate(make_group(functions=functions, rewards=[1.0, -1.0, 0.0, 1.0]))


def test_an_empty_completion_is_fine_only_when_it_was_aborted():
    reasons = [FinishReason.STOP, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP]
    group = make_group(lengths=[3, 0, 8, 2], finish_reasons=reasons, rewards=[1.0, None, 0.0, 1.0])
    validate(group)
    with pytest.raises(InvalidGroup, match="an empty completion that was not aborted"):
        validate(msgspec.structs.replace(group, finish_reasons=np.zeros(4, np.uint8)))


def test_a_wholly_aborted_group_passes():
    reasons = [FinishReason.ABORT] * 4
    validate(make_group(lengths=[0] * 4, finish_reasons=reasons, rewards=[None] * 4))


def test_optional_arrays_pass_when_they_fit():
    validate(
        make_group(
            loss_mask=np.array([0, 1] * 7 + [1], np.uint8),
            step_rewards=np.linspace(-1, 1, 15, dtype=np.float32),
            sampling_mask=np.zeros((15, 2), np.uint8),
            routed_experts=np.zeros((15, 0), np.uint16),
        )
    )


def test_a_step_may_end_anywhere_and_zero_is_a_reward():
    validate(stepwise(put([0, 6, 8], 0.0)))
    validate(stepwise(put(2, NAN), rewards=[None, 0.0, 1.0, 0.0]))
    reasons = [FinishReason.STOP, FinishReason.ABORT, FinishReason.STOP, FinishReason.STOP]
    lengths = [3, 0, 8, 2]
    steps = np.array([NAN, 1.0, NAN] + [NAN] * 7 + [0.0] + [NAN, -1.0], np.float32)
    validate(make_group(lengths=lengths, finish_reasons=reasons, rewards=[1.0, None, 0.0, -1.0], step_rewards=steps))


def test_completions_may_come_in_any_order():
    validate(edited("completion_index", lambda index: index[::-1].copy()))


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (edited("completion_index", lambda index: index[:3]), r"completion_lengths has shape \(4,\), expected \(3,\)"),
        (edited("completion_index", put(0, 3)), "completion_index is not each of 0 to 3 once"),
        (edited("completion_index", put(0, -1)), "completion_index is not each of 0 to 3 once"),
        (edited("completion_index", lambda index: index.reshape(2, 2)), r"has shape \(2, 2\), expected \[N\]"),
        (edited("completion_lengths", put(0, 4)), r"completion_tokens has shape \(15,\), expected \(16,\)"),
        (edited("completion_lengths", put(0, -3)), "completion_lengths has a negative entry"),
        (edited("completion_lengths", put([0, 1], [4, 3])), "the spans of completion 0 cover 3 tokens, it has 4"),
        (edited("completion_tokens", put(2, VOCAB_SIZE)), rf"tokens from 1 to {VOCAB_SIZE}, allowed are 0 to"),
        (edited("completion_tokens", put(2, -1)), "tokens from -1 to"),
        (edited("completion_tokens", lambda tokens: tokens.reshape(15, 1)), r"completion_tokens has shape \(15, 1\)"),
        (edited("behavior_logprobs", put(0, NAN)), "behavior_logprobs has a NaN or an infinity"),
        (edited("behavior_logprobs", put(0, -INF)), "behavior_logprobs has a NaN or an infinity"),
        (edited("behavior_logprobs", put(0, 0.01)), "behavior_logprobs has 0.01, log probabilities are at most 0"),
        (edited("finish_reasons", put(0, 3)), "finish_reasons has 3, allowed are 0 to 2"),
        (edited("span_counts", put(0, -1)), "span_counts has a negative entry"),
        (edited("span_counts", put([0, 1], [2, 0])), "the spans of completion 0 cover 7 tokens, it has 3"),
        (edited("span_lengths", put(0, 0)), "span_lengths has an entry below 1"),
        (edited("span_lengths", put([0, 1], [4, 3])), "the spans of completion 0 cover 4 tokens, it has 3"),
        (edited("span_versions", put((0, 1), -1)), "span_versions has a negative entry"),
        (edited("span_versions", lambda versions: versions[:, :1]), r"span_versions has shape \(4, 1\)"),
        (edited("rewards", put(1, INF)), "rewards has a NaN or an infinity"),
        (edited("reward_values", put((1, 0), NAN)), "reward_values has a NaN or an infinity"),
        (edited("reward_values", lambda values: values[:, 0]), r"reward_values has shape \(4,\), expected \(4, 1\)"),
        (edited("reward_seconds", put((1, 0), INF)), "reward_seconds has a NaN or an infinity"),
        (edited("reward_seconds", put((1, 0), -1.0)), "reward_seconds has a negative entry"),
        (edited("reward_statuses", put((1, 0), 4)), "reward_statuses has 4, allowed are 0 to 3"),
        (edited("reward_statuses", put((1, 0), 2)), "scored does not agree with reward_statuses"),
        (edited("scored", put(0, 0)), "scored does not agree with reward_statuses"),
        (edited("scored", put(0, 2)), "scored has 2, allowed are 0 and 1"),
        (edited("rewards", put(1, 0.5), rewards=[1.0, None, 0.0, 1.0]), "a completion without a score has a reward"),
        (make_group(ordinal=17, loss_mask=np.ones(14, np.uint8)), r"loss_mask has shape \(14,\), expected \(15,\)"),
        (make_group(ordinal=17, loss_mask=np.full(15, 2, np.uint8)), "loss_mask has 2, allowed are 0 and 1"),
        (make_group(ordinal=17, step_rewards=np.zeros(14, np.float32)), r"step_rewards has shape \(14,\)"),
        (stepwise(put(4, INF)), "step_rewards has an infinity, allowed are finite numbers, and NaN where no step ends"),
        (stepwise(put(4, -INF)), "step_rewards has an infinity"),
        (stepwise(put(slice(7, 12), NAN)), "a completion with a score has no step reward"),
        (stepwise(put(0, 0.5), rewards=[None, 0.0, 1.0, 0.0]), "a completion without a score has a step reward"),
        (make_group(ordinal=17, routed_experts=np.zeros((14, 2), np.uint16)), r"routed_experts has shape \(14, 2\)"),
        (make_group(ordinal=17, sampling_mask=np.zeros(15, np.uint8)), r"sampling_mask has shape \(15,\)"),
        (make_group(ordinal=17, group_id="../../etc"), "group_id is not 32 hexadecimal digits"),
        (make_group(ordinal=17, group_id="a" * 32 + "\n"), "group_id is not 32 hexadecimal digits"),
        (make_group(ordinal=17, num_parts=2), "part 0 of 2, expected the whole group"),
        (make_group(ordinal=17, num_generations=5), "num_generations=5, the lease asked for 4"),
        (make_group(ordinal=17, rewards=[1.0] * 3, num_generations=4), "3 completions, expected num_generations=4"),
        (make_group(ordinal=17, temperature=NAN), "temperature=nan, allowed are finite numbers from 0"),
        (make_group(ordinal=17, generate_s=-1.0), "generate_s=-1.0, allowed are finite numbers from 0"),
        (make_group(ordinal=17, reward_s=INF), "reward_s=inf, allowed are finite numbers from 0"),
        (make_group(ordinal=17, notes=("x",) * (MAX_NOTES + 1)), "notes: allowed are 64 of 2000 characters"),
        (make_group(ordinal=17, notes=("x" * 2001,)), "notes: allowed are 64 of 2000 characters"),
    ],
)  # fmt: skip
def test_whatever_breaks_the_invariant_is_refused_with_its_reason(group, reason):
    with pytest.raises(InvalidGroup, match=f"^group 17: .*{reason}"):
        validate(group)


def test_the_terms_of_the_lease_hold():
    with pytest.raises(InvalidGroup, match="num_generations=4, the lease asked for 64"):
        validate(make_group(), num_generations=64)
    with pytest.raises(InvalidGroup, match="a completion of 5 tokens, allowed are 4"):
        validate(make_group(), max_completion_length=4)
    with pytest.raises(InvalidGroup, match="allowed are 0 to 9"):
        validate(make_group(), vocab_size=10)
    with pytest.raises(InvalidGroup, match=r"1 reward names other than those agreed on: \['other'\]"):
        validate(make_group(), reward_functions=("other",))


def test_rounding_above_zero_is_tolerated():
    validate(edited("behavior_logprobs", put(0, 1e-6)))


def test_versions_that_go_back_inside_a_completion_are_refused():
    whole = [(V4, 4)]
    with pytest.raises(InvalidGroup, match="span versions go back"):
        validate(make_group(spans=[[(V4, 1), (V3, 2)], whole, whole, whole]))
    with pytest.raises(InvalidGroup, match="span versions go back"):
        validate(make_group(spans=[[(Version(2, 0), 1), (Version(1, 9), 2)], whole, whole, whole]))
    validate(make_group(spans=[whole, [(V3, 4)], [(Version(1, 9), 1), (Version(2, 0), 2)], whole]))


def test_sums_cannot_be_made_to_overflow():
    lengths = np.full(4, 2**31 - 1, np.int32)
    with pytest.raises(InvalidGroup, match=r"completion_tokens has shape \(15,\), expected \(8589934588,\)"):
        validate(edited("completion_lengths", lambda _: lengths))


def test_reasons_do_not_repeat_what_the_peer_wrote():
    with pytest.raises(InvalidGroup) as caught:
        validate(make_group(reward_names=("\x1b[2Jevil",)))
    assert "evil" not in str(caught.value)


def test_a_part_is_checked_for_its_shapes_alone():
    part = make_group(num_generations=64, num_parts=3, part=1)
    check_shapes(part)
    with pytest.raises(InvalidGroup, match="group 0: rewards has shape"):
        check_shapes(msgspec.structs.replace(part, rewards=np.zeros(3, np.float32)))
