"""The write-ahead log: durability, replay and inspection in one.

`append` returns when its records are on disk (invariant I7: then, not before, a group is acknowledged). One thread owns
the file; appends that wait at the same time share one sync (group commit), so that the disk's latency and not its
number of syncs a second is what an append costs. Format and reading: journal_segments.py. What is recorded, and why it
is enough for a replay: journal_records.py.

A learner reads the journal once, with `read_journal`, before it opens it for writing; anyone may read it any time.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from learner.journal_records import (
    EndRecord,
    GroupRecord,
    IncarnationRecord,
    KnobRecord,
    Record,
    StepRecord,
    record_frames,
)
from learner.journal_segments import Damage, JournalError, JournalReport, read_journal
from learner.journal_writer import Entry, SegmentWriter

__all__ = [
    "Damage", "EndRecord", "GroupRecord", "IncarnationRecord", "Journal", "JournalError", "JournalReport", "KnobRecord",
    "Record", "StepRecord", "read_journal",
]  # fmt: skip

SEGMENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Append:
    entries: list[Entry]
    done: Future[None]


@dataclass(frozen=True, slots=True)
class _Call:
    """Anything else for the thread to do, between two appends."""

    action: Callable[[], Any]
    done: Future[Any]
    last: bool = False


class Journal:
    """An open journal. Used from one event loop.

    Example:
        >>> journal = Journal.open(run.journal_dir)
        >>> await journal.append(GroupRecord(incarnation=1, prompt=text, prompt_tokens=tokens, group=group))
        >>> await journal.prune(lambda ordinal: ordinal < 640)  # all that a durable checkpoint knows to have ended
        >>> await journal.close()
    """

    def __init__(self, writer: SegmentWriter) -> None:
        self.report = writer.report
        """What was on disk when it was opened, before its torn end was cut off."""
        self._writer = writer
        self._jobs: queue.SimpleQueue[_Append | _Call] = queue.SimpleQueue()
        self._closed = False
        # A daemon: a process that dies of something else must not wait for a journal that nobody closes.
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> Self:
        """Open a journal for appending, making or repairing it. Reads all of it: for the start of the process.

        Args:
            directory: exists; held by nobody else (the run directory's lock).
            segment_bytes: a segment that has grown to this is followed by a new one.

        Raises:
            JournalError: it is of another version, or cannot be read or written.
        """
        try:
            return cls(SegmentWriter(directory, segment_bytes=segment_bytes))
        except JournalError:
            raise
        except OSError as error:
            raise JournalError(f"journal {directory} cannot be opened ({error.strerror})") from error

    async def append(self, *records: Record) -> None:
        """Put records on disk, together and in order; return when they are there.

        A cancelled append is written or not, as a whole: what is cancelled is the waiting.

        Raises:
            JournalError: the disk refused, or the journal is closed; nothing of this append was kept. When there is
                space again, appending again succeeds.
        """
        entries = [(record, record_frames(record)) for record in records]
        done: Future[None] = Future()
        self._submit(_Append(entries, done))
        await asyncio.wrap_future(done)

    async def prune(self, finished: Callable[[int], bool]) -> list[Path]:
        """Delete the oldest segments that nothing needs any more; return them.

        Args:
            finished: whether a *durable* checkpoint knows how an ordinal ended. Called on the journal's thread, so
                it must look at that checkpoint's ledger, not at the living one.

        Raises:
            JournalError: the disk refused, or the journal is closed.
        """
        done: Future[list[Path]] = Future()
        self._submit(_Call(partial(self._writer.prune, finished), done))
        return await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Finish what was submitted, close the file, and end the thread. Again: does nothing."""
        if self._closed:
            return
        done: Future[None] = Future()
        self._submit(_Call(self._writer.close, done, last=True))
        self._closed = True
        await asyncio.wrap_future(done)
        self._thread.join()

    def _submit(self, job: _Append | _Call) -> None:
        if self._closed:
            raise JournalError("the journal is closed")
        self._jobs.put(job)

    def _run(self) -> None:
        """The thread: write what has gathered, sync once, answer all; repeat."""
        while True:
            appends, call = self._gather()
            if appends:
                entries = [entry for append in appends for entry in append.entries]
                _settle([append.done for append in appends], partial(self._writer.write, entries))
            if call is not None and call.done.set_running_or_notify_cancel():
                _settle([call.done], call.action)
            if call is not None and call.last:
                return

    def _gather(self) -> tuple[list[_Append], _Call | None]:
        """Wait for a job, and take with it every append behind it, up to the next call."""
        appends: list[_Append] = []
        job = self._jobs.get()
        while isinstance(job, _Append):
            if job.done.set_running_or_notify_cancel():
                appends.append(job)
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return appends, None
        return appends, job


def _settle(waiting: list[Future[Any]], action: Callable[[], Any]) -> None:
    """Do `action` and give its result, or what it raised, to everyone who waits for it."""
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - a bug must reach those who wait, not end the thread and leave them
        for done in waiting:
            done.set_exception(error)
    else:
        for done in waiting:
            done.set_result(result)
