"""What the journal records, and each record as frames: a msgpack header of scalars, then raw arrays.

The journal must be enough to train steps c+1..k again, bit for bit, from checkpoint c (`replay`): a GroupRecord is all
that the trainer is given of a group, a StepRecord is the order and the recipe of a step, and a KnobRecord takes effect
at its place in the journal. Order is meaning: the group of a StepRecord's ordinal is the last GroupRecord of that
ordinal before it. Groups are framed by protocol/codec.py, so the journal holds what the wire carried. This file knows
no files (journal_segments.py puts frames on disk).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from learner.batch import TrainGroup
from protocol import codec
from protocol.messages import Group, Int32

Frame: TypeAlias = bytes | memoryview


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A group was accepted. On disk before it is acknowledged (I7)."""

    incarnation: int
    """Of the learner that journaled it; the tokens' own versions are in the group."""
    prompt: str
    """The prompt's text, for samples/."""
    prompt_tokens: Int32
    """[P]"""
    group: Group
    """Whole (never a part) and validated."""

    def train_group(self) -> TrainGroup:
        """Return what the buffer is given, live and when restored."""
        return TrainGroup(
            ordinal=self.group.ordinal,
            sequence=self.group.sequence,
            prompt_tokens=self.prompt_tokens,
            prompt=self.prompt,
            group=self.group,
        )


class _Scalars(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record"):
    """Base of the records that are all header."""

    incarnation: int


class StepRecord(_Scalars, frozen=True, kw_only=True, tag="step"):
    """A step is about to be applied. On disk before the optimizer runs."""

    step: int
    """policy_version after the step."""
    ordinals: tuple[int, ...]
    """Of its groups, in training order."""
    learning_rate: float
    num_micro_batches: int
    """How many the groups were packed into; packing itself is a function of groups, order and token_budget."""


class EndRecord(_Scalars, frozen=True, kw_only=True, tag="end"):
    """A lease ended (I3)."""

    ordinal: int
    sequence: int
    """-1 for a row that ended without a lease (an over-long prompt)."""
    end: str
    """trained, filtered, quarantined, stale or skipped."""
    step: int
    """policy_version of the weights when it ended; for trained, after the step."""
    reason: str = ""


class KnobRecord(_Scalars, frozen=True, kw_only=True, tag="knob"):
    """A live knob changed; what follows in the journal happened under the new value."""

    name: str
    value: int | float
    number: int
    """Of the run's knob changes, from 1: a checkpoint and the journal after it may both have a change."""
    old: int | float
    """Its value before."""
    configured: int | float
    """What the configuration said when it was set: the value holds as long as that stays."""
    who: Literal["user", "controller"]
    reason: str
    step: int
    """policy_version of the weights when it was set."""


class Numerics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What beside the configuration decides the bits that arithmetic gives."""

    device: str
    """cpu or cuda."""
    num_threads: int
    """Of one operation."""
    ranks: int
    torch: str
    """Its version."""


class IncarnationRecord(_Scalars, frozen=True, kw_only=True, tag="incarnation"):
    """A learner began. The fields after the first are empty in a journal of an older headway."""

    resumed_from: int
    """policy_version that it went on from: of a checkpoint, or after `replayed` steps; 0 for the initial weights."""
    replayed: int = 0
    """Steps that it trained again from the journal before it went on."""
    config: str = ""
    """The resolved configuration, as JSON: config.json has only that of the last learner."""
    numerics: Numerics | None = None


class _GroupHeader(_Scalars, frozen=True, kw_only=True, tag="group"):
    """Frame 0 of a GroupRecord; frame 1 is prompt_tokens, little-endian int32, the others are the group's."""

    prompt: str


Record: TypeAlias = GroupRecord | StepRecord | EndRecord | KnobRecord | IncarnationRecord

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_GroupHeader | StepRecord | EndRecord | KnobRecord | IncarnationRecord)


def record_frames(record: Record) -> list[Frame]:
    """Return the frames of a record; those of arrays are views of its arrays.

    Raises:
        ValueError: an array of the group is larger than a frame may be.
    """
    if not isinstance(record, GroupRecord):
        return [_encoder.encode(record)]
    header = _GroupHeader(incarnation=record.incarnation, prompt=record.prompt)
    prompt_tokens = np.ascontiguousarray(record.prompt_tokens, np.dtype("<i4"))
    return [_encoder.encode(header), prompt_tokens.data, *codec.encode(record.group)]


def record_from_frames(frames: Sequence[memoryview]) -> Record:
    """Return the record in `frames`; its arrays are read-only views of them.

    Raises:
        msgspec.DecodeError, ProtocolError, ValueError: frames that `record_frames` of this version did not make.
    """
    header: _GroupHeader | StepRecord | EndRecord | KnobRecord | IncarnationRecord = _decoder.decode(frames[0])
    if not isinstance(header, _GroupHeader):
        return header
    group = codec.decode(frames[2:])
    if not isinstance(group, Group):
        raise msgspec.ValidationError(f"a {type(group).__name__} where a Group was expected")
    return GroupRecord(
        incarnation=header.incarnation,
        prompt=header.prompt,
        prompt_tokens=np.frombuffer(frames[1], np.dtype("<i4")),
        group=group,
    )
