"""The journal: acknowledged is on disk, in order, whatever happens to the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from learner.journal import (
    GroupRecord,
    IncarnationRecord,
    Journal,
    JournalError,
    JournalReport,
    Record,
    read_journal,
)
from protocol.messages import Group
from tests.journals import KNOB, end, group_record, knob, ordinals, plain, segments, step, use, write


def test_every_record_comes_back_as_it_was(tmp_path: Path) -> None:
    optional = {
        "loss_mask": np.array([1, 0, 1] + [1] * 12, np.uint8),
        "step_rewards": np.array([np.nan, 0.0, 1.0] * 5, np.float32),
    }
    records: list[Record] = [
        IncarnationRecord(incarnation=3, resumed_from=10),
        group_record(7, prompt="Größe? \x00\n✓", rewards=(1.0, None, 0.5, 0.0)),
        group_record(8, **optional),
        group_record(9, rewards=(0.0, 0.0), lengths=(0, 0)),
        step(11, 8, 7),
        end(9),
        KNOB,
        knob(2, "depth", 3, old=4, configured=4, step=7),
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


def test_groups_are_compared_by_every_field() -> None:
    """The comparison of this file is not blind: it sees one changed logprob."""
    one, other = group_record(1), group_record(1)
    assert plain(one) == plain(other)
    logprobs = other.group.behavior_logprobs.copy()
    logprobs[0] -= 1e-6
    changed: Group = msgspec.structs.replace(other.group, behavior_logprobs=logprobs)
    assert plain(one) != plain(msgspec.structs.replace(other, group=changed))


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
from tests.journals import group_record

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
