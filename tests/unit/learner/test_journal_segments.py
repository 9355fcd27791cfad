"""Segments: damage is told from a torn end, other versions are refused, and what is superfluous is pruned."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner import journal_segments
from learner.journal import (
    Journal,
    JournalError,
    JournalReport,
    read_journal,
)
from protocol.messages import Purpose
from protocol.versions import PROTOCOL_VERSION
from tests.journals import KNOB, end, group_record, ordinals, segments, step, use, write


def test_a_torn_end_is_cut_off_and_reported(tmp_path: Path) -> None:
    write(tmp_path, group_record(1), group_record(2))
    segment = tmp_path / "000001.log"
    whole = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(segment.read_bytes()[32:200])
    journal = write(tmp_path, group_record(3))
    (damage,) = journal.report.damages
    assert (damage.kind, damage.offset, damage.num_bytes) == ("torn", whole, 168)
    assert str(damage) == (
        f"{segment}: end cut short at byte {whole} (incomplete, or its lengths are wrong); its last 168 bytes are not"
        " read"
    )
    after = JournalReport()
    assert ordinals(tmp_path, after) == [1, 2, 3]
    assert after.damages == []


def test_a_segment_that_was_just_being_made_is_made_again(tmp_path: Path) -> None:
    write(tmp_path, group_record(1))
    for half in (b"", b"\x89HWJ", bytes(32)):
        (tmp_path / "000002.log").write_bytes(half)
        assert ordinals(tmp_path) == [1]
        assert [damage.kind for damage in write(tmp_path).report.damages] == ["torn"]
        assert (tmp_path / "000002.log").stat().st_size == 32
    write(tmp_path, group_record(2))
    assert ordinals(tmp_path) == [1, 2]


def test_zeros_behind_the_last_record_are_torn(tmp_path: Path) -> None:
    """What some file systems leave after a power cut: the size is there, the data is not."""
    write(tmp_path, group_record(1))
    with (tmp_path / "000001.log").open("ab") as file:
        file.write(bytes(5000))
    assert [damage.kind for damage in write(tmp_path, group_record(2)).report.damages] == ["torn"]
    assert ordinals(tmp_path) == [1, 2]


def test_damage_in_the_middle_is_no_torn_end(tmp_path: Path) -> None:
    write(tmp_path, *map(group_record, range(4)))
    segment = tmp_path / "000001.log"
    record_bytes = (segment.stat().st_size - 32) // 4
    intact = segment.read_bytes()
    segment.write_bytes(intact[: 32 + record_bytes + 100] + b"\xff" + intact[32 + record_bytes + 101 :])
    evidence = segment.read_bytes()
    report = JournalReport()
    assert ordinals(tmp_path, report) == [0]
    (damage,) = report.damages
    assert (damage.kind, damage.offset) == ("damaged", 32 + record_bytes)
    assert "DAMAGED at byte" in str(damage)
    write(tmp_path, group_record(9))
    assert segment.read_bytes() == evidence, "left as it is"
    report = JournalReport()
    assert ordinals(tmp_path, report) == [0, 9], "writing goes on in a segment of its own"
    assert [damage.path.name for damage in report.damages] == ["000001.log"]


def test_a_short_segment_before_others_is_damage(tmp_path: Path) -> None:
    write(tmp_path, *map(group_record, range(3)), segment_bytes=100)
    os.truncate(tmp_path / "000002.log", 300)
    report = JournalReport()
    assert ordinals(tmp_path, report) == [0, 2]
    assert [(damage.kind, damage.path.name) for damage in report.damages] == [("damaged", "000002.log")]


def test_a_missing_segment_is_reported(tmp_path: Path) -> None:
    write(tmp_path, *map(group_record, range(3)), segment_bytes=100)
    (tmp_path / "000002.log").unlink()
    report = JournalReport()
    assert ordinals(tmp_path, report) == [0, 2]
    assert str(report.damages[0]).endswith(
        "000002.log: DAMAGED at byte 0 (the file is missing); its last 0 bytes are not read"
    )
    write(tmp_path, group_record(3))
    assert ordinals(tmp_path) == [0, 2, 3]


def test_a_segment_that_the_disk_cannot_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *map(group_record, range(3)), segment_bytes=100)
    read_record = journal_segments._read_record

    def rotten(file: Any, available: int) -> list[memoryview]:
        if file.name.endswith("000002.log"):
            raise OSError(errno.EIO, "Input/output error")
        return read_record(file, available)

    monkeypatch.setattr(journal_segments, "_read_record", rotten)
    report = JournalReport()
    assert ordinals(tmp_path, report) == [0, 2]
    assert [damage.reason for damage in report.damages] == ["cannot be read: Input/output error"]


@pytest.mark.parametrize(("format_version", "protocol_version"), [(2, PROTOCOL_VERSION), (1, 1), (1, 9)])
def test_another_version_is_refused_with_its_numbers(
    tmp_path: Path, format_version: int, protocol_version: int
) -> None:
    write(tmp_path, group_record(1))
    segment = tmp_path / "000001.log"
    head = struct.pack("<8sHHI", journal_segments.SEGMENT_MAGIC, format_version, protocol_version, 1)
    segment.write_bytes(head + journal_segments._head_digest(head) + segment.read_bytes()[32:])
    read = rf"journal format {format_version} and protocol version {protocol_version}"
    text = rf"{read}; this headway has 1 and {PROTOCOL_VERSION}"
    with pytest.raises(JournalError, match=text):
        list(read_journal(tmp_path))
    with pytest.raises(JournalError, match=text):
        Journal.open(tmp_path)


def test_a_whole_record_of_unknown_kind_is_refused_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, group_record(1))
    frames = journal_segments.pack_record([msgspec.msgpack.encode({"record": "from the future"})])
    with (tmp_path / "000001.log").open("ab") as file:
        file.write(b"".join(frames))
    with pytest.raises(JournalError, match="a whole record that this headway cannot read"):
        list(read_journal(tmp_path))


def prune(directory: Path, finished: Callable[[int], bool], **options: Any) -> list[str]:
    removed: list[str] = []

    async def action(journal: Journal) -> None:
        removed.extend(path.name for path in await journal.prune(finished))

    use(directory, action, **options)
    return removed


def test_prune_deletes_what_a_checkpoint_made_superfluous(tmp_path: Path) -> None:
    write(tmp_path, *map(group_record, range(5)), segment_bytes=100)
    assert prune(tmp_path, lambda ordinal: False) == []
    assert prune(tmp_path, lambda ordinal: ordinal < 2) == ["000001.log", "000002.log"]
    assert ordinals(tmp_path) == [2, 3, 4]
    assert prune(tmp_path, lambda ordinal: True) == ["000003.log", "000004.log"], "never the current one"
    report = JournalReport()
    assert ordinals(tmp_path, report) == [4]
    assert report.damages == []
    write(tmp_path, group_record(5), segment_bytes=100)
    assert segments(tmp_path) == ["000005.log", "000006.log"], "numbers go on"


def test_prune_stops_at_the_first_segment_needed(tmp_path: Path) -> None:
    """So that a StepRecord is never deleted while the groups it orders are still there to be replayed."""
    write(tmp_path, group_record(0), group_record(1), step(6, 0), group_record(2), segment_bytes=100)
    assert prune(tmp_path, lambda ordinal: ordinal != 0) == []
    assert prune(tmp_path, lambda ordinal: ordinal != 1) == ["000001.log"]


def test_prune_counts_every_record_that_names_an_ordinal(tmp_path: Path) -> None:
    write(tmp_path, end(3), step(1, 4, 5), group_record(6), segment_bytes=40)
    assert prune(tmp_path, lambda ordinal: ordinal != 3, segment_bytes=40) == []
    assert prune(tmp_path, lambda ordinal: ordinal != 5, segment_bytes=40) == ["000001.log"]
    assert prune(tmp_path, lambda ordinal: True, segment_bytes=40) == ["000002.log"]


def test_prune_keeps_a_knob_until_a_finished_step_used_it(tmp_path: Path) -> None:
    write(tmp_path, KNOB, group_record(1), segment_bytes=40)
    assert prune(tmp_path, lambda ordinal: True, segment_bytes=40) == []
    write(tmp_path, step(1, 1), end(9), segment_bytes=40)
    assert prune(tmp_path, lambda ordinal: ordinal != 1, segment_bytes=40) == []
    assert prune(tmp_path, lambda ordinal: True, segment_bytes=40)[0] == "000001.log"


def test_eval_groups_keep_nothing(tmp_path: Path) -> None:
    write(tmp_path, group_record(3, purpose=Purpose.EVAL), group_record(4), segment_bytes=100)
    assert prune(tmp_path, lambda ordinal: False) == ["000001.log"]


def test_prune_of_a_living_journal_knows_what_was_just_written(tmp_path: Path) -> None:
    async def action(journal: Journal) -> None:
        for ordinal in range(3):
            await journal.append(group_record(ordinal))
        assert [path.name for path in await journal.prune(lambda ordinal: ordinal == 0)] == ["000001.log"]
        await journal.append(group_record(3))

    use(tmp_path, action, segment_bytes=100)
    assert ordinals(tmp_path) == [1, 2, 3]


def test_a_segment_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *map(group_record, range(3)), segment_bytes=100)

    def refuse(path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(JournalError, match=r"000001\.log could not be deleted \(Operation not permitted\)"):
        prune(tmp_path, lambda ordinal: True)
    monkeypatch.undo()
    assert ordinals(tmp_path) == [0, 1, 2]
