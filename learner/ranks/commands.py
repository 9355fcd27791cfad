"""What rank 0 tells the others, and as which bytes: a msgpack header, then arrays as the wire has them. No pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from learner.batch import Batch, TrainGroup
from protocol.codec import Buffer, decode, encode
from protocol.messages import Group


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load the model, or a checkpoint, and shard it."""

    checkpoint: str | None
    logs_dir: str


class GroupHead(msgspec.Struct, frozen=True):
    """A TrainGroup without its arrays: those are the frames, its prompt's tokens first."""

    ordinal: int
    sequence: int
    num_frames: int


class Train(msgspec.Struct, frozen=True, tag=True):
    """forward_backward of a batch: all of it, since advantages and denominators are those of the whole step."""

    step: int
    groups: tuple[GroupHead, ...]


class Update(msgspec.Struct, frozen=True, tag=True):
    """optimizer_step."""

    learning_rate: float
    """Of the step: rank 0 alone is told of live knobs."""


class Save(msgspec.Struct, frozen=True, tag=True):
    """Write what this rank has of a checkpoint into a directory."""

    directory: str


class Stay(msgspec.Struct, frozen=True, tag=True):
    """Nothing to do: rank 0 is alive, and learns whether the others are."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End."""


Command: TypeAlias = Start | Train | Update | Save | Stay | Stop


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    command: Command
    frame_bytes: tuple[int, ...]


_HEADER_LENGTH_BYTES = 4
_decoder = msgspec.msgpack.Decoder(_Envelope)


def to_bytes(command: Command, frames: Sequence[Buffer] = ()) -> bytes:
    """Put a command and its frames into one piece."""
    views = [memoryview(frame).cast("B") for frame in frames]
    header = msgspec.msgpack.encode(_Envelope(command, tuple(view.nbytes for view in views)))
    return b"".join([len(header).to_bytes(_HEADER_LENGTH_BYTES, "little"), header, *views])


def from_bytes(payload: Buffer) -> tuple[Command, list[memoryview]]:
    """Take them apart again; frames are views."""
    view = memoryview(payload)
    start = _HEADER_LENGTH_BYTES + int.from_bytes(view[:_HEADER_LENGTH_BYTES], "little")
    envelope = _decoder.decode(view[_HEADER_LENGTH_BYTES:start])
    frames = []
    for size in envelope.frame_bytes:
        frames.append(view[start : start + size])
        start += size
    return envelope.command, frames


def train_command(batch: Batch) -> bytes:
    """Put a batch into one piece; prompts' texts stay behind."""
    heads, frames = [], []
    for entry in batch.groups:
        own = [np.ascontiguousarray(entry.prompt_tokens, np.int32).data, *encode(entry.group)]
        heads.append(GroupHead(entry.ordinal, entry.sequence, len(own)))
        frames += own
    return to_bytes(Train(batch.step, tuple(heads)), frames)


def batch_of(train: Train, frames: Sequence[Buffer]) -> Batch:
    """Make the batch that `train_command` was given."""
    groups, rest = [], list(frames)
    for head in train.groups:
        (prompt, *message), rest = rest[: head.num_frames], rest[head.num_frames :]
        group = decode(message)
        assert isinstance(group, Group), f"a {type(group).__name__} among the groups"
        tokens = np.frombuffer(prompt, np.int32)
        groups.append(
            TrainGroup(ordinal=head.ordinal, sequence=head.sequence, prompt_tokens=tokens, prompt="", group=group)
        )
    return Batch(step=train.step, groups=tuple(groups))
