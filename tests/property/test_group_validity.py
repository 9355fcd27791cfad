"""I6: whatever a server sends, what reaches the buffer is sound, and what is not is refused with its lease given again.

A good answer to a lease is damaged at random, as often as not in several places, and arrives. Soundness is judged here
by plain loops that share nothing with protocol/validation.py.
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import msgspec
import numpy as np
from hypothesis import event, given, settings

from learner.ledger import State
from protocol.messages import Group
from tests.factories import VOCAB_SIZE
from tests.learners import NUM_GENERATIONS, REWARD_FUNCTIONS, answer, make_desk

MAX_COMPLETION_LENGTH = 8
NUMBERS = {
    "i": st.sampled_from((-(2**31), -1, 0, 1, 2, 7, 31, 32, 1000, 2**31 - 1)),
    "u": st.sampled_from((0, 1, 2, 3, 4, 255)),
    "f": st.sampled_from((math.nan, math.inf, -math.inf, -1e30, -1.0, 0.0, 0.5, 1.0, 1e30)),
}
DAMAGED = (
    "completion_index", "completion_lengths", "completion_tokens", "behavior_logprobs", "finish_reasons", "span_counts",
    "span_lengths", "span_versions", "rewards", "scored", "reward_values", "reward_statuses", "reward_seconds",
    "step_rewards",
)  # fmt: skip


@st.composite
def damages(draw):
    """(field, what is done to its array)"""
    name = draw(st.sampled_from(DAMAGED))
    how = draw(st.sampled_from(("element", "element", "element", "shorter", "longer", "swap", "zero", "shape")))
    return name, how, draw(st.integers(0, 10_000)), draw(st.integers(0, 10_000)), draw(st.data())


def damage(group: Group, name: str, how: str, first: int, second: int, data: st.DataObject) -> Group:
    if getattr(group, name) is None:
        return group
    array = np.array(getattr(group, name))
    flat = array.reshape(-1)
    if how == "element" and flat.size:
        flat[first % flat.size] = data.draw(NUMBERS[array.dtype.kind])
    elif how == "swap" and flat.size:
        a, b = first % flat.size, second % flat.size
        flat[a], flat[b] = flat[b], flat[a]
    elif how == "zero":
        array = np.zeros_like(array)
    elif how == "shorter":
        array = array[:-1]
    elif how == "longer":
        array = np.concatenate([array, array[:1]])
    elif how == "shape":
        array = array[:, None] if array.ndim == 1 else array.reshape(-1)
    return msgspec.structs.replace(group, **{name: array})


def is_sound(group: Group) -> bool:
    """I6 in plain loops."""
    indices = group.completion_index.tolist()
    lengths, counts = group.completion_lengths.tolist(), group.span_counts.tolist()
    if sorted(indices) != list(range(NUM_GENERATIONS)) or not len(lengths) == len(counts) == NUM_GENERATIONS:
        return False
    token = span = 0
    for completion in range(NUM_GENERATIONS):
        length = lengths[completion]
        if not (0 <= length <= MAX_COMPLETION_LENGTH) or group.finish_reasons[completion] > 2:
            return False
        if length == 0 and group.finish_reasons[completion] != 2:
            return False
        if group.step_rewards is not None:
            steps = [reward for reward in group.step_rewards[token : token + length].tolist() if reward == reward]
            if any(map(math.isinf, steps)) or (length and bool(steps) != bool(group.scored[completion])):
                return False
        for _ in range(length):
            if not 0 <= group.completion_tokens[token] < VOCAB_SIZE:
                return False
            if not math.isfinite(group.behavior_logprobs[token]) or group.behavior_logprobs[token] > 0.01:
                return False
            token += 1
        covered, before = 0, (0, 0)
        for _ in range(counts[completion]):
            version = tuple(group.span_versions[span].tolist())
            if group.span_lengths[span] < 1 or version < before or min(version) < 0:
                return False
            covered, before, span = covered + int(group.span_lengths[span]), version, span + 1
        if covered != length:
            return False
        if group.scored[completion] not in (0, 1) or not math.isfinite(group.rewards[completion]):
            return False
        for function in range(len(REWARD_FUNCTIONS)):
            if not math.isfinite(group.reward_values[completion, function]):
                return False
            if group.reward_statuses[completion, function] > 3:
                return False
    if group.step_rewards is not None and len(group.step_rewards) != token:
        return False
    shapes_end = token == len(group.completion_tokens) == len(group.behavior_logprobs) and span == len(
        group.span_lengths
    )
    return shapes_end and len(group.rewards) == len(group.scored) == NUM_GENERATIONS


@settings(max_examples=400, deadline=None)
@given(st.lists(damages(), min_size=1, max_size=3), st.booleans())
def test_what_reaches_the_buffer_is_sound(all_damages, stepwise):
    desk = make_desk(max_completion_length=MAX_COMPLETION_LENGTH, filter_zero_std=False)
    desk.join("north", room=100)
    desk.pump()
    lease = desk.leases()[0]
    group = answer(lease)
    if stepwise:
        steps = np.where(np.arange(group.completion_tokens.size) % 3 == 0, np.float32(0.5), np.float32(math.nan))
        group = msgspec.structs.replace(group, step_rewards=steps)
    for each in all_damages:
        group = damage(group, *each)
    desk.receive(group)
    desk.accept()
    ((_, status, reason),) = desk.acks()
    event(status)
    entry = desk.ledger.find(0)
    if status == "ok":
        assert is_sound(group)
        assert entry is None or entry.state is State.BUFFERED
    else:
        assert reason
        assert entry is not None
        assert entry.state is State.PENDING, "its lease is given out again"
        assert (len(desk.buffer), desk.journal.records) == (0, [])
    assert desk.ledger.unaccounted == 0


def test_the_judge_knows_a_sound_group():
    desk = make_desk(max_completion_length=MAX_COMPLETION_LENGTH)
    desk.join("north", room=100)
    desk.pump()
    assert is_sound(answer(desk.leases()[0]))
