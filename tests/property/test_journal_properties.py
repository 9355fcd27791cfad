"""I7 for the journal, whatever the disk does: cut at every byte, flip any bit, refuse any write, crash at any time."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.journal_records import (
    EndRecord,
    GroupRecord,
    IncarnationRecord,
    KnobRecord,
    Record,
    StepRecord,
    record_frames,
    record_from_frames,
)
from learner.journal_segments import HEAD_BYTES, JournalError, JournalReport, list_segments, pack_record, read_journal
from learner.journal_writer import SegmentWriter
from tests.journals import end, group_record, plain, step

ints = st.integers(0, 2**40)
numbers = ints | st.floats(allow_nan=False)
scalars = st.one_of(
    st.builds(
        StepRecord,
        incarnation=ints,
        step=ints,
        ordinals=st.lists(ints, max_size=20).map(tuple),
        learning_rate=st.floats(allow_nan=False),
        num_micro_batches=ints,
    ),
    st.builds(EndRecord, incarnation=ints, ordinal=ints, sequence=ints, end=st.text(), step=ints, reason=st.text()),
    st.builds(
        KnobRecord, incarnation=ints, name=st.text(), value=numbers, number=ints, old=numbers, configured=numbers,
        who=st.sampled_from(("user", "controller")), reason=st.text(), step=ints,
    ),
    st.builds(IncarnationRecord, incarnation=ints, resumed_from=ints),
)  # fmt: skip
groups = st.builds(
    lambda ordinal, lengths, prompt: group_record(
        ordinal, prompt=prompt, lengths=lengths, rewards=[float(i % 2) for i in range(len(lengths))]
    ),
    ordinal=ints,
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    prompt=st.text(),
)
records = st.one_of(scalars, groups)


@contextmanager
def without_syncs() -> Iterator[None]:
    """Syncs take time, and change nothing that a reader sees."""
    with patch.object(os, "fsync", lambda descriptor: None), patch.object(os, "fdatasync", lambda descriptor: None):
        yield


def write(directory: Path, written: list[Record], *, segment_bytes: int = 1 << 20) -> None:
    with without_syncs():
        writer = SegmentWriter(directory, segment_bytes=segment_bytes)
        for record in written:
            writer.write([(record, record_frames(record))])
        writer.close()


def read(directory: Path) -> tuple[list[object], JournalReport]:
    report = JournalReport()
    return [plain(record) for record in read_journal(directory, report)], report


@given(record=records)
@settings(max_examples=100, deadline=None)
def test_any_record_survives_its_frames(record: Record) -> None:
    packed = pack_record(record_frames(record))[1:-1]
    assert plain(record_from_frames([memoryview(frame) for frame in packed])) == plain(record)


def test_cut_at_every_byte_of_the_last_records_loses_only_what_was_cut(tmp_path: Path) -> None:
    """Power cut: of what was not synced, any prefix may be on disk. Every position is tried, not a sample."""
    written: list[Record] = [step(1, 0), group_record(1, lengths=[1, 2], rewards=[1.0, 0.0]), end(2)]
    source, directory = tmp_path / "source", tmp_path / "journal"
    for path in (source, directory):
        path.mkdir()
    write(source, written)
    content = (source / "000001.log").read_bytes()
    ends = [HEAD_BYTES]
    for record in written:
        ends.append(ends[-1] + sum(map(len, pack_record(record_frames(record)))))
    assert ends[-1] == len(content)
    for cut in range(HEAD_BYTES, len(content)):
        (directory / "000001.log").write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends[1:])
        intact = [plain(record) for record in written[:whole]]
        found, report = read(directory)
        assert found == intact, cut
        assert [damage.kind for damage in report.damages] == ["torn"] * (cut not in ends), cut
        if cut % 20 == 0:
            write(directory, [end(99)])
            assert read(directory)[0] == [*intact, end(99)], cut
            assert read(directory)[1].damages == []


SPREAD: list[Record] = [
    record for i in range(3) for record in (group_record(2 * i), group_record(2 * i + 1), step(i + 1, 2 * i, 2 * i + 1))
]
PER_SEGMENT = 3


@functools.cache
def segments() -> list[bytes]:
    """SPREAD on disk: three segments of three records."""
    two_records = sum(len(buffer) for record in SPREAD[:2] for buffer in pack_record(record_frames(record)))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory, SPREAD, segment_bytes=HEAD_BYTES + two_records + 1)
        return [path.read_bytes() for path in list_segments(directory).values()]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_damage_is_reported_and_costs_at_most_the_rest_of_its_segment(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(segments()) - 1))
    content = bytearray(segments()[number])
    position = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, min(40, len(content) - position)))
    content[position : position + length] = bytes(
        byte ^ data.draw(st.integers(1, 255)) for byte in content[position : position + length]
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for i, segment in enumerate(segments()):
            (directory / f"{i + 1:06d}.log").write_bytes(content if i == number else segment)
        found, report = read(directory)
        assert [damage.path.name for damage in report.damages] == [f"{number + 1:06d}.log"]
        assert report.damages[0].offset <= position
        expected = [plain(record) for record in SPREAD]
        kept = len(found) - (len(SPREAD) - PER_SEGMENT)
        assert 0 <= kept < PER_SEGMENT, "a prefix of the damaged segment, never the damaged record"
        start = number * PER_SEGMENT
        assert found == expected[: start + kept] + expected[start + PER_SEGMENT :]
        write(directory, [end(99)])
        assert read(directory)[0] == [*found, end(99)]


@given(garbage=st.binary(max_size=400), with_magic=st.booleans())
@settings(max_examples=100, deadline=None)
def test_garbage_is_never_a_record_and_never_a_crash(garbage: bytes, with_magic: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory, [end(1)])
        with (directory / "000001.log").open("ab") as file:
            file.write(b"\xf5HR\n" * with_magic + garbage)
        assert read(directory)[0] == [end(1)]
        write(directory, [end(2)])
        assert read(directory)[0] == [end(1), end(2)]


class JournalMachine(RuleBasedStateMachine):
    """Against a list: what was acknowledged is read back, in order, minus whole finished segments from the front."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.resources.enter_context(without_syncs())
        self.directory = Path(tempfile.mkdtemp())
        self.acknowledged: list[Record] = []
        self.finished: set[int] = set()
        self.next_ordinal = 0
        self.uncut = False
        """The last append was refused and could not even be cut off: it may show, behind the rest."""
        self.writer = SegmentWriter(self.directory, segment_bytes=1500)

    def make(self, count: int) -> list[Record]:
        made: list[Record] = []
        for _ in range(count):
            ordinal, self.next_ordinal = self.next_ordinal, self.next_ordinal + 1
            made.append(end(ordinal) if ordinal % 3 else group_record(ordinal, lengths=[1, 2], rewards=[1.0, 0.0]))
        return made

    @rule(count=st.integers(1, 6))
    def append(self, count: int) -> None:
        made = self.make(count)
        self.writer.write([(record, record_frames(record)) for record in made])
        self.acknowledged += made
        self.uncut = False

    @rule(count=st.integers(1, 6), space_bytes=st.integers(0, 3000), cut_fails=st.booleans())
    def append_on_a_full_disk(self, count: int, space_bytes: int, cut_fails: bool) -> None:
        made, left, pwritev, ftruncate = self.make(count), [space_bytes], os.pwritev, os.ftruncate

        def full(descriptor: int, buffers: list[bytes], offset: int) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = b"".join(buffers)[: left[0]]
            left[0] -= len(taken)
            return pwritev(descriptor, [taken], offset)

        def failing(descriptor: int, length: int) -> None:
            if cut_fails:
                raise OSError(errno.EIO, "Input/output error")
            ftruncate(descriptor, length)

        with patch.object(os, "pwritev", full), patch.object(os, "ftruncate", failing):
            try:
                self.writer.write([(record, record_frames(record)) for record in made])
            except JournalError:
                self.uncut = cut_fails
            else:
                self.acknowledged += made
                self.uncut = False

    @rule(torn=st.binary(max_size=60), again=st.integers(0, 200))
    def crash(self, torn: bytes, again: int) -> None:
        """Die with an unsynced append on its way to disk: garbage, or the beginning of a record."""
        self.append(1)
        self.writer.close()
        segment = max(list_segments(self.directory).values())
        beginning = b"".join(pack_record(record_frames(group_record(10**6))))[:again]
        with segment.open("ab") as file:
            file.write(beginning + torn)
        self.writer = SegmentWriter(self.directory, segment_bytes=1500)
        assert all(damage.kind == "torn" for damage in self.writer.report.damages)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finished |= set(range(data.draw(st.integers(0, self.next_ordinal))))

    @precondition(lambda self: self.next_ordinal)
    @rule()
    def prune(self) -> None:
        self.writer.prune(self.finished.__contains__)

    @invariant()
    def acknowledged_is_on_disk(self) -> None:
        found, report = read(self.directory)
        expected = [plain(record) for record in self.acknowledged]
        if self.uncut:
            report.damages.clear()
            newest = max((index for index, record in enumerate(found) if record in expected), default=-1)
            found = found[: newest + 1]
        pruned = len(expected) - len(found)
        assert pruned >= 0
        assert found == expected[pruned:]
        for record in self.acknowledged[:pruned]:
            ordinal = record.group.ordinal if isinstance(record, GroupRecord) else record.ordinal  # type: ignore[union-attr]
            assert ordinal in self.finished
        assert report.damages == []

    def teardown(self) -> None:
        self.writer.close()
        shutil.rmtree(self.directory)
        self.resources.close()


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
