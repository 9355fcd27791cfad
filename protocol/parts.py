"""Large groups travel in parts: a whole one on a slow link looks like death, and a part is a sign of life.

A part is a Group with some of the completions and the header of the whole; parts may come in any order and more than
once. Splitting makes views, no copies. Pure: no I/O, no clock. What a part holds is checked where it is taken apart;
whether the merged group is any good is for validation.py to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidGroup
from protocol.messages import Group
from protocol.validation import check_shapes

Array: TypeAlias = npt.NDArray[Any]

PART_BYTES: Final = 1 << 20
MAX_HELD_GROUPS: Final = 256
MAX_HELD_BYTES: Final = 1 << 30
"""Of one group."""

_BY_COMPLETION: Final = (
    "completion_index", "completion_lengths", "finish_reasons", "span_counts", "rewards", "scored", "reward_values",
    "reward_statuses", "reward_seconds",
)  # fmt: skip
_BY_TOKEN: Final = (
    "completion_tokens", "behavior_logprobs", "loss_mask", "step_rewards", "sampling_mask", "routed_experts",
)  # fmt: skip
_BY_SPAN: Final = ("span_lengths", "span_versions")
_SAME_IN_ALL_PARTS: Final = (
    "group_id", "ordinal", "sequence", "attempt", "purpose", "num_generations", "temperature", "reward_names",
    "num_parts",
)  # fmt: skip


def group_bytes(group: Group) -> int:
    """Return the bytes of a group's arrays."""
    arrays = (getattr(group, name) for name in (*_BY_COMPLETION, *_BY_TOKEN, *_BY_SPAN))
    return sum(array.nbytes for array in arrays if array is not None)


def split_group(group: Group, max_bytes: int = PART_BYTES) -> list[Group]:
    """Cut a whole group into parts of at most `max_bytes` of arrays each, or of one completion where that is more.

    Returns:
        The group itself when it is small enough; else parts whose arrays are views of it.
    """
    if group_bytes(group) <= max_bytes:
        return [group]
    layout = _Layout(group)
    cuts, held = [0], 0
    for completion in range(len(group.completion_index)):
        size = layout.bytes_of(completion)
        if held and held + size > max_bytes:
            cuts.append(completion)
            held = 0
        held += size
    cuts.append(len(group.completion_index))
    return [
        msgspec.structs.replace(group, part=part, num_parts=len(cuts) - 1, **layout.cut(first, last))
        for part, (first, last) in enumerate(pairwise(cuts))
    ]


def merge_groups(parts: Sequence[Group]) -> Group:
    """Put the parts of one group together, its completions in the order of completion_index.

    Args:
        parts: each exactly once, in any order.

    Raises:
        InvalidGroup: a part does not hold together, or they are not of one group, or completions are missing.
    """
    parts = sorted(parts, key=lambda part: part.part)
    first = parts[0]
    for part in parts:
        check_shapes(part)
        _check_same_group(first, part)
    if [part.part for part in parts] != list(range(first.num_parts)):
        raise InvalidGroup(f"group {first.ordinal}: {len(parts)} parts, expected each of {first.num_parts} once")
    index = np.concatenate([part.completion_index for part in parts])
    if not np.array_equal(np.sort(index), np.arange(first.num_generations)):
        raise InvalidGroup(
            f"group {first.ordinal}: its parts hold {len(index)} completions, expected each of"
            f" num_generations={first.num_generations} once"
        )
    whole = msgspec.structs.replace(first, part=0, num_parts=1, **_concatenate(parts))
    if (index[1:] > index[:-1]).all():
        return whole
    layout = _Layout(whole)
    singles = [msgspec.structs.replace(whole, **layout.cut(k, k + 1)) for k in np.argsort(index).tolist()]
    return msgspec.structs.replace(whole, **_concatenate(singles))


class PartAssembler:
    """Holds parts until their group is whole. One per learner; its owner discards what is no longer wanted.

    Bounded whatever peers send: `max_groups` unfinished groups (beyond that the one begun first is dropped: more than
    are leased cannot be wanted) of `max_group_bytes` each.
    """

    def __init__(self, max_groups: int = MAX_HELD_GROUPS, max_group_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_groups = max_groups
        self._max_group_bytes = max_group_bytes
        self._held: dict[tuple[str, int], dict[int, Group]] = {}

    def __len__(self) -> int:
        """Return the number of unfinished groups."""
        return len(self._held)

    def add(self, part: Group) -> Group | None:
        """Take a part, or a whole group; return the group when it is whole. A part already held is ignored.

        Parts of different attempts at a group never mix.

        Raises:
            InvalidGroup: the part contradicts itself or those held, which are then dropped.
        """
        if part.num_parts == 1 and part.part == 0:
            return part
        key = part.group_id, part.attempt
        held = self._held.setdefault(key, {})
        if part.part in held:
            return None
        try:
            self._check(part, held)
        except InvalidGroup:
            del self._held[key]
            raise
        held[part.part] = part
        if len(held) == part.num_parts:
            del self._held[key]
            return merge_groups(list(held.values()))
        if len(self._held) > self._max_groups:
            del self._held[next(iter(self._held))]
        return None

    def discard(self, group_id: str) -> None:
        """Forget the parts of a group, of all attempts. An unknown id is no error."""
        for key in [key for key in self._held if key[0] == group_id]:
            del self._held[key]

    def _check(self, part: Group, held: Mapping[int, Group]) -> None:
        if not 0 <= part.part < part.num_parts <= part.num_generations:
            raise InvalidGroup(
                f"group {part.ordinal}: part {part.part} of {part.num_parts}, num_generations={part.num_generations}"
            )
        _check_same_group(next(iter(held.values()), part), part)
        size = sum(map(group_bytes, held.values())) + group_bytes(part)
        if size > self._max_group_bytes:
            raise InvalidGroup(f"group {part.ordinal}: {size} bytes, allowed are {self._max_group_bytes}")


class _Layout:
    """Where the completions of a group lie in its arrays."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._token = np.concatenate([[0], np.cumsum(group.completion_lengths, dtype=np.int64)]).tolist()
        self._span = np.concatenate([[0], np.cumsum(group.span_counts, dtype=np.int64)]).tolist()
        self._bytes = [_bytes_per_entry(group, names) for names in (_BY_COMPLETION, _BY_TOKEN, _BY_SPAN)]

    def bytes_of(self, completion: int) -> int:
        """Return the bytes of one completion in all arrays."""
        per_completion, per_token, per_span = self._bytes
        tokens = self._token[completion + 1] - self._token[completion]
        spans = self._span[completion + 1] - self._span[completion]
        return int(per_completion + tokens * per_token + spans * per_span)

    def cut(self, first: int, last: int) -> dict[str, Array | None]:
        """Return all arrays of completions [first, last), as views."""
        ranges = (
            (_BY_COMPLETION, first, last),
            (_BY_TOKEN, self._token[first], self._token[last]),
            (_BY_SPAN, self._span[first], self._span[last]),
        )
        arrays = {}
        for names, start, stop in ranges:
            for name in names:
                array: Array | None = getattr(self._group, name)
                arrays[name] = None if array is None else array[start:stop]
        return arrays


def _bytes_per_entry(group: Group, names: Sequence[str]) -> int:
    arrays = (getattr(group, name) for name in names)
    return sum(array.strides[0] for array in arrays if array is not None)


def _check_same_group(first: Group, part: Group) -> None:
    for name in _SAME_IN_ALL_PARTS:
        if getattr(part, name) != getattr(first, name):
            raise InvalidGroup(f"group {first.ordinal}: its parts differ in {name}")
    for name in _BY_TOKEN:
        ours, others = getattr(part, name), getattr(first, name)
        if (ours is None) != (others is None) or (ours is not None and ours.shape[1:] != others.shape[1:]):
            raise InvalidGroup(f"group {first.ordinal}: its parts differ in the form of {name}")


def _concatenate(parts: Sequence[Group]) -> dict[str, Array | None]:
    arrays: dict[str, Array | None] = {}
    for name in (*_BY_COMPLETION, *_BY_TOKEN, *_BY_SPAN):
        pieces = [getattr(part, name) for part in parts]
        arrays[name] = None if pieces[0] is None else np.concatenate(pieces)
    return arrays
