"""The journal: acknowledged is on disk, refused leaves nothing, damage is told from a torn end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from learner import journal_segments
from learner.journal import (
    EndRecord,
    GroupRecord,
    IncarnationRecord,
    Journal,
    JournalError,
    JournalReport,
    KnobRecord,
    Record,
    StepRecord,
    read_journal,
)
from protocol.messages import Group, Purpose
from tests.factories import make_group


def group_record(ordinal: int = 0, *, prompt: str = "2 + 3 =", incarnation: int = 1, **fields: Any) -> GroupRecord:
    return GroupRecord(
        incarnation=incarnation,
        prompt=prompt,
        prompt_tokens=np.array([3, 4, 5], np.int32),
        group=make_group(ordinal=ordinal, **fields),
    )


def end(ordinal: int, *, end: str = "filtered") -> EndRecord:
    return EndRecord(incarnation=1, ordinal=ordinal, sequence=ordinal, end=end, step=0, reason="zero std")


def step(number: int, *ordinals: int) -> StepRecord:
    return StepRecord(incarnation=1, step=number, ordinals=ordinals, learning_rate=1e-5, num_micro_batches=2)


KNOB = KnobRecord(incarnation=1, name="learning_rate", value=2e-6)


def plain(record: Record) -> object:
    """A record as comparable values: equal exactly when every array has the same bytes, shape and dtype."""
    if not isinstance(record, GroupRecord):
        return record
    fields: list[object] = [record.incarnation, record.prompt, record.prompt_tokens.tolist()]
    for value in msgspec.structs.astuple(record.group):
        is_array = isinstance(value, np.ndarray)
        fields.append((value.dtype.str, value.shape, value.tobytes()) if is_array else value)
    return fields


def use(directory: Path, action: Callable[[Journal], Coroutine[Any, Any, None]], **options: Any) -> Journal:
    """Open a journal, run `action` on it, close it."""

    async def main() -> Journal:
        journal = Journal.open(directory, **options)
        try:
            await action(journal)
        finally:
            await journal.close()
        return journal

    return asyncio.run(main())


def write(directory: Path, *records: Record, **options: Any) -> Journal:
    """Append records, each in a sync of its own."""

    async def each(journal: Journal) -> None:
        for record in records:
            await journal.append(record)

    return use(directory, each, **options)


def ordinals(directory: Path, report: JournalReport | None = None) -> list[int]:
    """Read back the ordinals of the group records."""
    return [r.group.ordinal for r in read_journal(directory, report) if isinstance(r, GroupRecord)]


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------- what is recorded


def test_every_record_comes_back_as_it_was(tmp_path: Path) -> None:
    optional = {
        "loss_mask": np.array([1, 0, 1] + [1] * 12, np.uint8),
        "step_rewards": np.linspace(0, 1, 15, dtype=np.float32),
    }
    records: list[Record] = [
        IncarnationRecord(incarnation=3, resumed_from=10),
        group_record(7, prompt="Größe? \x00\n✓", rewards=(1.0, None, 0.5, 0.0)),
        group_record(8, **optional),
        group_record(9, rewards=(0.0, 0.0), lengths=(0, 0)),
        step(11, 8, 7),
        end(9),
        KNOB,
        KnobRecord(incarnation=1, name="filter_zero_std", value=False),
    ]
    write(tmp_path, *records)
    assert [plain(record) for record in read_journal(tmp_path)] == [plain(record) for record in records]


def test_a_restored_group_is_what_the_buffer_had(tmp_path: Path) -> None:
    record = group_record(5, sequence=9)
    write(tmp_path, record)
    (restored,) = read_journal(tmp_path)
    assert isinstance(restored, GroupRecord)
    live, again = record.train_group(), restored.train_group()
    assert (again.ordinal, again.sequence, again.prompt) == (5, 9, "2 + 3 =")
    assert again.prompt_tokens.tolist() == live.prompt_tokens.tolist()
    assert again.oldest_policy_version == live.oldest_policy_version
    assert not again.group.completion_tokens.flags.writeable


def test_an_empty_journal_is_empty(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path)) == []
    write(tmp_path)
    report = JournalReport()
    assert list(read_journal(tmp_path, report)) == []
    assert (report.num_segments, report.num_records, report.damages) == (1, 0, [])


def test_reopening_goes_on_where_it_ended(tmp_path: Path) -> None:
    for ordinal in range(3):
        journal = write(tmp_path, group_record(ordinal))
        assert journal.report.num_records == ordinal
    assert ordinals(tmp_path) == [0, 1, 2]
    assert segments(tmp_path) == ["000001.log"]


# -------------------------------------------------------------------------------------- an ack means: it is on disk


def test_append_returns_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, let_go = threading.Event(), threading.Event()

    async def held(journal: Journal) -> None:
        waiting = asyncio.create_task(journal.append(group_record(1)))
        await asyncio.to_thread(syncing.wait, 10)
        await asyncio.sleep(0)
        assert ordinals(tmp_path) == [1], "written"
        assert not waiting.done(), "but not on disk"
        let_go.set()
        await waiting

    async def opened(journal: Journal) -> None:
        fdatasync = os.fdatasync

        def slow(descriptor: int) -> None:
            syncing.set()
            assert let_go.wait(10)
            fdatasync(descriptor)

        monkeypatch.setattr(os, "fdatasync", slow)
        await held(journal)

    use(tmp_path, opened)


def test_appends_that_wait_together_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    first, let_go = threading.Event(), threading.Event()

    async def many(journal: Journal) -> None:
        fdatasync = os.fdatasync

        def counted(descriptor: int) -> None:
            first.set()
            assert let_go.wait(10)
            fdatasync(descriptor)
            syncs.append(descriptor)

        monkeypatch.setattr(os, "fdatasync", counted)
        waiting = [asyncio.create_task(journal.append(group_record(0)))]
        await asyncio.to_thread(first.wait, 10)
        waiting += [asyncio.create_task(journal.append(group_record(i), end(i))) for i in range(1, 50)]
        await asyncio.sleep(0)  # all have been submitted
        let_go.set()
        await asyncio.gather(*waiting)

    use(tmp_path, many)
    assert len(syncs) == 2
    assert ordinals(tmp_path) == list(range(50)), "in the order of the calls"


def test_a_new_segment_is_in_the_directory_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("fsync", "fdatasync"):
        original = getattr(os, name)

        def logged(descriptor: int, original: Any = original) -> None:
            events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
            original(descriptor)

        monkeypatch.setattr(os, name, logged)
    write(tmp_path, end(1), end(2), segment_bytes=40)
    assert events == ["000001.log", ".", "000001.log", "000002.log", ".", "000002.log"]


def test_segments_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path, *map(group_record, range(5)), segment_bytes=1500)
    assert len(segments(tmp_path)) > 2
    assert ordinals(tmp_path) == [0, 1, 2, 3, 4]
    write(tmp_path, group_record(5), segment_bytes=1500)
    assert ordinals(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_record_with_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    async def together(journal: Journal) -> None:
        await journal.append(*map(group_record, range(120)))

    use(tmp_path, together)
    assert ordinals(tmp_path) == list(range(120))


KILLED_WRITER = """
import asyncio, sys
from pathlib import Path
from learner.journal import Journal
from tests.unit.learner.test_journal import group_record

async def append_for_ever(journal, first):
    for ordinal in range(first, 10**9, 4):
        await journal.append(group_record(ordinal))
        print(ordinal, flush=True)

async def main():
    journal = Journal.open(Path(sys.argv[1]), segment_bytes=1 << 16)
    async with asyncio.TaskGroup() as tasks:
        for first in range(4):
            tasks.create_task(append_for_ever(journal, first))

asyncio.run(main())
"""


def test_killed_while_appending_everything_acknowledged_is_there(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(150)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        assert writer.wait() == -signal.SIGKILL, "it was killed, it did not end by itself"
    found = ordinals(tmp_path)
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found))
    assert len(segments(tmp_path)) > 1, "segments were changed on the way"
    journal = write(tmp_path, group_record(0))
    assert all(damage.kind == "torn" for damage in journal.report.damages)


# -------------------------------------------------------------------------------------------- when the disk refuses


def test_a_full_disk_is_said_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev
    sizes_when_full: list[int] = []

    def fills_up(descriptor: int, buffers: list[bytes], offset: int) -> int:
        if sizes_when_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwritev(descriptor, [buffers[0][:30]], offset)
        sizes_when_full.append(os.fstat(descriptor).st_size)
        return written

    async def refused_then_accepted(journal: Journal) -> None:
        await journal.append(group_record(1))
        size = (tmp_path / "000001.log").stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fills_up)
            with pytest.raises(
                JournalError, match=r"000001\.log: 2 records could not be written \(No space left on device\); none"
            ):
                await journal.append(group_record(2), group_record(3))
        assert sizes_when_full == [size + 30], "a part was written"
        assert (tmp_path / "000001.log").stat().st_size == size
        await journal.append(group_record(4))

    use(tmp_path, refused_then_accepted)
    report = JournalReport()
    assert ordinals(tmp_path, report) == [1, 4]
    assert report.damages == []


def test_a_partial_write_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def a_few_bytes(descriptor: int, buffers: list[bytes], offset: int) -> int:
        return pwritev(descriptor, [memoryview(b"".join(buffers))[:13]], offset)

    monkeypatch.setattr(os, "pwritev", a_few_bytes)
    write(tmp_path, group_record(1), group_record(2))
    monkeypatch.undo()
    assert ordinals(tmp_path) == [1, 2]


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from learner.journal import Journal, JournalError
from tests.unit.learner.test_journal import group_record

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    journal = Journal.open(Path(sys.argv[1]))
    await journal.append(group_record(1))
    limit((Path(sys.argv[1]) / "000001.log").stat().st_size + 100)
    try:
        await journal.append(group_record(2))
    except JournalError as error:
        print(error, flush=True)
    limit(resource.RLIM_INFINITY)
    await journal.append(group_record(3))
    await journal.close()

asyncio.run(main())
"""


def test_a_really_refused_write_is_cut_back(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.stdout.endswith("000001.log: 1 records could not be written (File too large); none of them was kept\n")
    report = JournalReport()
    assert ordinals(tmp_path, report) == [1, 3]
    assert report.damages == []


def test_a_failed_sync_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed sync the kernel may have dropped the pages: they are cut off and written afresh."""
    fdatasync = os.fdatasync
    failures = [True, False]

    def failing_once(descriptor: int) -> None:
        if failures.pop(0) if failures else False:
            raise OSError(errno.EIO, "Input/output error")
        fdatasync(descriptor)

    async def refused_then_accepted(journal: Journal) -> None:
        monkeypatch.setattr(os, "fdatasync", failing_once)
        with pytest.raises(JournalError, match="Input/output error"):
            await journal.append(group_record(1))
        assert ordinals(tmp_path) == []
        await journal.append(group_record(1))

    use(tmp_path, refused_then_accepted)
    assert ordinals(tmp_path) == [1]


def test_what_cannot_even_be_cut_back_is_cut_before_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def refused_then_accepted(journal: Journal) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing)
            patch.setattr(os, "ftruncate", failing)
            for _ in range(2):
                with pytest.raises(JournalError, match="Input/output error"):
                    await journal.append(group_record(1), group_record(2), group_record(3))
        await journal.append(group_record(9))

    use(tmp_path, refused_then_accepted)
    report = JournalReport()
    assert ordinals(tmp_path, report) == [9], "nothing of the longer, refused append shows behind it"
    assert report.damages == []


def test_a_segment_that_cannot_be_begun_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def refused_then_accepted(journal: Journal) -> None:
        await journal.append(group_record(1))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left on device"):
            await journal.append(group_record(2))
        assert segments(tmp_path) == ["000001.log"]
        monkeypatch.setattr(os, "fsync", fsync)
        await journal.append(group_record(2))

    use(tmp_path, refused_then_accepted, segment_bytes=100)
    assert ordinals(tmp_path) == [1, 2]


def test_one_refusal_reaches_everyone_who_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def many(journal: Journal) -> None:
        monkeypatch.setattr(os, "pwritev", full)
        outcomes = await asyncio.gather(*(journal.append(end(i)) for i in range(5)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [JournalError] * 5

    use(tmp_path, many)


def test_what_is_no_record_is_the_callers_error_alone(tmp_path: Path) -> None:
    async def one_bad(journal: Journal) -> None:
        bad = group_record(1, rewards=(1.0, 0.0), loss_mask=np.zeros(3, np.float64))
        with pytest.raises(TypeError, match="float64"):
            await journal.append(group_record(0), bad)
        await journal.append(group_record(2))

    use(tmp_path, one_bad)
    assert ordinals(tmp_path) == [2]


def test_a_bug_in_the_thread_reaches_the_caller(tmp_path: Path) -> None:
    def broken(ordinal: int) -> bool:
        raise KeyError(ordinal)

    async def prune(journal: Journal) -> None:
        await journal.append(end(7))
        await journal.append(end(8))
        with pytest.raises(KeyError, match="7"):
            await journal.prune(broken)
        await journal.append(end(9))

    use(tmp_path, prune, segment_bytes=40)
    assert len(list(read_journal(tmp_path))) == 3


def test_a_cancelled_append_leaves_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, let_go = threading.Event(), threading.Event()

    async def cancel(journal: Journal) -> None:
        fdatasync = os.fdatasync

        def slow(descriptor: int) -> None:
            syncing.set()
            assert let_go.wait(10)
            fdatasync(descriptor)

        monkeypatch.setattr(os, "fdatasync", slow)
        under_way = asyncio.create_task(journal.append(group_record(1)))
        await asyncio.to_thread(syncing.wait, 10)
        not_begun = asyncio.create_task(journal.append(group_record(2)))
        await asyncio.sleep(0)
        under_way.cancel()
        not_begun.cancel()
        outcomes = await asyncio.gather(under_way, not_begun, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
        let_go.set()
        await journal.append(group_record(3))

    use(tmp_path, cancel)
    assert ordinals(tmp_path) == [1, 3]


def test_a_closed_journal_refuses(tmp_path: Path) -> None:
    async def close_twice(journal: Journal) -> None:
        last = asyncio.create_task(journal.append(group_record(1)))
        await asyncio.sleep(0)
        await journal.close()
        await last
        with pytest.raises(JournalError, match="the journal is closed"):
            await journal.append(group_record(2))
        await journal.close()

    use(tmp_path, close_twice)
    assert ordinals(tmp_path) == [1], "what was submitted before was finished"
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]


def test_a_directory_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"file cannot be opened \(Not a directory\)"):
        Journal.open(tmp_path / "file")


# ----------------------------------------------------------------------------------------------- torn and damaged


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


@pytest.mark.parametrize(("format_version", "protocol_version"), [(2, 1), (1, 9)])
def test_another_version_is_refused_with_its_numbers(
    tmp_path: Path, format_version: int, protocol_version: int
) -> None:
    write(tmp_path, group_record(1))
    segment = tmp_path / "000001.log"
    head = struct.pack("<8sHHI", journal_segments.SEGMENT_MAGIC, format_version, protocol_version, 1)
    segment.write_bytes(head + journal_segments._head_digest(head) + segment.read_bytes()[32:])
    text = rf"journal format {format_version} and protocol version {protocol_version}; this headway has 1 and 1"
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


# ---------------------------------------------------------------------------------------------------------- prune


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


def test_groups_are_compared_by_every_field() -> None:
    """The comparison of this file is not blind: it sees one changed logprob."""
    one, other = group_record(1), group_record(1)
    assert plain(one) == plain(other)
    logprobs = other.group.behavior_logprobs.copy()
    logprobs[0] -= 1e-6
    changed: Group = msgspec.structs.replace(other.group, behavior_logprobs=logprobs)
    assert plain(one) != plain(msgspec.structs.replace(other, group=changed))
