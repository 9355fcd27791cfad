"""When the disk refuses: said in one line, nothing half-written stays, and the next append succeeds."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.journal import Journal, JournalError, JournalReport
from tests.journals import end, group_record, ordinals, segments, use, write


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
from tests.journals import group_record

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
