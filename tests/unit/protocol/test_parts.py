from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.codec import decode, encode
from protocol.errors import InvalidGroup
from protocol.messages import FinishReason, Group
from protocol.parts import PartAssembler, group_bytes, merge_groups, split_group
from protocol.versions import Version
from tests.factories import make_group

V3, V4 = Version(1, 3), Version(1, 4)


def make_uneven() -> Group:
    """Return a group whose completions differ in length, spans and outcome."""
    return make_group(
        ordinal=5,
        rewards=[1.0, None, 0.0, 1.0],
        spans=[[(V3, 2), (V4, 1)], [], [(V4, 8)], [(V3, 1), (V3, 1), (V4, 2)]],
        finish_reasons=[FinishReason.STOP, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP],
        loss_mask=np.ones(15, np.uint8),
        routed_experts=np.arange(30, dtype=np.uint16).reshape(15, 2),
    )


def assert_equal(left: Group, right: Group) -> None:
    for name in left.__struct_fields__:
        ours, others = getattr(left, name), getattr(right, name)
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, others, err_msg=name)
            assert ours.dtype == others.dtype, name
        else:
            assert ours == others, name


def edit(group: Group, /, **changes: Any) -> Group:
    return msgspec.structs.replace(group, **changes)


def test_a_small_group_stays_whole():
    group = make_group()
    assert split_group(group, group_bytes(group)) == [group]


def test_each_part_holds_some_completions_as_views():
    group = make_uneven()
    parts = split_group(group, max_bytes=1)
    assert [part.completion_index.tolist() for part in parts] == [[0], [1], [2], [3]]
    assert [(part.part, part.num_parts, part.num_generations) for part in parts] == [(k, 4, 4) for k in range(4)]
    assert [len(part.completion_tokens) for part in parts] == [3, 0, 8, 4]
    assert [part.span_versions.shape for part in parts] == [(2, 2), (0, 2), (1, 2), (3, 2)]
    assert np.shares_memory(parts[2].completion_tokens, group.completion_tokens)
    assert parts[0].loss_mask.tolist() == [1, 1, 1]
    assert parts[0].step_rewards is None


def test_parts_are_filled_up_to_the_limit():
    group = make_group(rewards=[0.0] * 64, lengths=[1024] * 64)
    limit = group_bytes(group) // 4
    parts = split_group(group, limit)
    assert all(group_bytes(part) <= limit for part in parts)
    assert len(parts) == 4
    assert sum(group_bytes(part) for part in parts) == group_bytes(group)


def test_parts_merge_in_any_order():
    group = make_uneven()
    for parts in permutations(split_group(group, max_bytes=1)):
        assert_equal(merge_groups(parts), group)


def test_merged_completions_are_in_the_order_of_their_index():
    whole = make_uneven()
    parts = split_group(whole, max_bytes=1)
    shuffled = [edit(part, part=number) for number, part in zip([2, 0, 3, 1], parts, strict=True)]
    assert_equal(merge_groups(shuffled), whole)


def test_the_assembler_returns_whole_groups_at_once():
    assembler = PartAssembler()
    group = make_group()
    assert assembler.add(group) is group
    assert len(assembler) == 0


def test_the_assembler_waits_for_the_last_part_and_ignores_repetitions():
    group = make_uneven()
    parts = [decode([bytes(frame) for frame in encode(part)]) for part in split_group(group, max_bytes=1)]
    assembler = PartAssembler()
    order = random.Random(3).sample(parts[:3] * 3, 9)
    assert [assembler.add(part) for part in order] == [None] * 9
    assert len(assembler) == 1
    assert_equal(assembler.add(parts[3]), group)
    assert len(assembler) == 0


def test_attempts_and_groups_do_not_mix():
    assembler = PartAssembler()
    first, again = split_group(make_uneven(), 1), split_group(edit(make_uneven(), attempt=2), 1)
    other = split_group(make_group(ordinal=6), 1)
    for part in [*first[:2], *again[2:], *other[:3]]:
        assert assembler.add(part) is None
    assert len(assembler) == 3
    assert assembler.add(again[0]) is None
    assert assembler.add(again[1]).attempt == 2


def test_a_discarded_group_begins_anew():
    assembler = PartAssembler()
    parts = split_group(make_uneven(), 1)
    for part in parts[:3]:
        assembler.add(part)
    assembler.discard(parts[0].group_id)
    assembler.discard("unknown")
    assert len(assembler) == 0
    assert assembler.add(parts[3]) is None


def test_the_group_begun_first_makes_room():
    assembler = PartAssembler(max_groups=2)
    groups = [split_group(make_group(ordinal=k), 1) for k in range(3)]
    for parts in groups:
        for part in parts[:3]:
            assembler.add(part)
    assert len(assembler) == 2
    assert assembler.add(groups[0][3]) is None  # forgotten
    assert assembler.add(groups[2][3]) is not None


def test_a_group_may_not_grow_without_limit():
    parts = split_group(make_uneven(), 1)
    assembler = PartAssembler(max_group_bytes=group_bytes(parts[0]) + group_bytes(parts[1]))
    for part in [parts[0], parts[1], parts[0], parts[1]]:  # repetitions do not count
        assert assembler.add(part) is None
    with pytest.raises(InvalidGroup, match=r"group 5: \d+ bytes, allowed are \d+"):
        assembler.add(parts[2])
    assert len(assembler) == 0


@pytest.mark.parametrize("numbers", [(4, 4), (-1, 4), (0, 0), (1, 1), (0, 5), (0, -1), (2**40, 2**41)])
def test_part_numbers_are_checked(numbers):
    part, num_parts = numbers
    with pytest.raises(InvalidGroup, match=f"group 5: part {part} of {num_parts}, num_generations=4"):
        PartAssembler().add(edit(make_uneven(), part=part, num_parts=num_parts))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_parts": 3}, "its parts differ in num_parts"),
        ({"ordinal": 6}, "its parts differ in ordinal"),
        ({"temperature": 0.5}, "its parts differ in temperature"),
        ({"temperature": float("nan")}, "its parts differ in temperature"),
        ({"reward_names": ("other",)}, "its parts differ in reward_names"),
        ({"loss_mask": None}, "its parts differ in the form of loss_mask"),
        ({"routed_experts": np.zeros((0, 3), np.uint16)}, "its parts differ in the form of routed_experts"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_and_dropped(changes, reason):
    parts = split_group(make_uneven(), 1)
    assembler = PartAssembler()
    assembler.add(parts[0])
    with pytest.raises(InvalidGroup, match=f"group 5: {reason}"):
        assembler.add(edit(parts[1], **changes))
    assert len(assembler) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"completion_tokens": np.zeros(9, np.int32)}, r"completion_tokens has shape \(9,\), expected \(8,\)"),
        ({"completion_lengths": np.array([-1], np.int32)}, "completion_lengths has a negative entry"),
        ({"span_counts": np.array([2], np.int32)}, r"span_lengths has shape \(1,\), expected \(2,\)"),
        ({"completion_index": np.array([1], np.int32)}, "its parts hold 4 completions, expected each of"),
        ({"completion_index": np.array([4], np.int32)}, "its parts hold 4 completions, expected each of"),
    ],
)
def test_a_part_that_does_not_hold_together_is_refused(changes, reason):
    parts = split_group(make_uneven(), 1)
    parts[2] = edit(parts[2], **changes)
    assembler = PartAssembler()
    for part in parts[:3]:
        assembler.add(part)
    with pytest.raises(InvalidGroup, match=f"group 5: {reason}"):
        assembler.add(parts[3])
    assert len(assembler) == 0


def test_merging_needs_every_part_once():
    parts = split_group(make_uneven(), 1)
    with pytest.raises(InvalidGroup, match="3 parts, expected each of 4 once"):
        merge_groups(parts[:3])
    with pytest.raises(InvalidGroup, match="5 parts, expected each of 4 once"):
        merge_groups([*parts, parts[0]])


def test_a_part_with_completions_of_another_is_refused():
    parts = split_group(make_group(ordinal=5), 1)
    doubled = edit(make_group(ordinal=5), part=3, num_parts=4)
    with pytest.raises(InvalidGroup, match="its parts hold 7 completions"):
        merge_groups([*parts[:3], doubled])
