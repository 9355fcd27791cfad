"""Writing segments: everything given to `write` is on disk when it returns, or nothing of it is.

One thread owns a SegmentWriter. It also remembers which ordinals each segment speaks of, so that whole segments can go
once a checkpoint has made them superfluous. Knows nothing of asyncio (journal.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from learner.durable import fsync_directory
from learner.journal_records import EndRecord, Frame, GroupRecord, KnobRecord, Record, StepRecord
from learner.journal_segments import (
    HEAD_BYTES,
    JournalError,
    JournalReport,
    list_segments,
    pack_record,
    scan_journal,
    segment_head,
    segment_path,
)
from protocol.messages import Purpose

log = logging.getLogger(__name__)

Entry: TypeAlias = tuple[Record, list[Frame]]
_IOV_MAX = os.sysconf("SC_IOV_MAX")


@dataclass(slots=True)
class _Segment:
    """What keeps a segment on disk."""

    number: int
    ordinals: set[int] = field(default_factory=set)
    """Prompts it speaks of: needed until a checkpoint knows how each ended."""
    knob_pending: bool = False
    """Holds a knob change after which no step was journaled yet."""


class SegmentWriter:
    """Appends to the highest segment of a directory, after repairing what a crash left of it."""

    def __init__(self, directory: Path, *, segment_bytes: int) -> None:
        """Read the whole journal, cut a torn end off, and begin a segment where needed.

        Raises:
            JournalError: another format or protocol version.
            OSError: the directory cannot be read or written.
        """
        self.report = JournalReport()
        """What was found, as it was before the repair."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments: list[_Segment] = []
        self._fd = -1
        self._end = 0
        self._clean = True
        """Nothing in the current segment after `_end`."""
        self._recover()

    def write(self, entries: Sequence[Entry]) -> None:
        """Append records, in order, and wait for the disk.

        Raises:
            JournalError: the disk refused. The segment is cut back to what it was, so a later write may succeed.
        """
        try:
            self._write(entries)
        except OSError as error:
            raise JournalError(
                f"journal {segment_path(self._directory, self._segments[-1].number)}: {len(entries)} records could not"
                f" be written ({error.strerror}); none of them was kept"
            ) from error
        for record, _ in entries:
            self._remember(record, self._segments[-1])

    def prune(self, finished: Callable[[int], bool]) -> list[Path]:
        """Delete the oldest segments up to the first that is needed, never the current one.

        A segment is needed while it speaks of an ordinal that is not finished, or of a knob that no finished step used.
        Only a prefix goes: so no step or knob is lost whose groups are in an older segment that stays.

        Args:
            finished: whether a durable checkpoint knows how that ordinal ended.

        Returns:
            What was deleted.

        Raises:
            JournalError: the disk refused.
        """
        removed: list[Path] = []
        try:
            for segment in self._segments[:-1]:
                if segment.knob_pending or not all(map(finished, segment.ordinals)):
                    break
                removed.append(segment_path(self._directory, segment.number))
                removed[-1].unlink()
                self._segments.remove(segment)
            if removed:
                fsync_directory(self._directory)
        except OSError as error:
            raise JournalError(f"journal {removed[-1]} could not be deleted ({error.strerror})") from error
        return removed

    def close(self) -> None:
        """Close the current segment; all of it is on disk already."""
        os.close(self._fd)

    def _write(self, entries: Sequence[Entry]) -> None:
        if self._end >= self._segment_bytes:
            self._begin_segment(self._segments[-1].number + 1)
        if not self._clean:
            self._cut_back()
        self._clean = False
        try:
            buffers = [buffer for _, frames in entries for buffer in pack_record(frames)]
            end = _write_fully(self._fd, buffers, self._end)
            os.fdatasync(self._fd)
        except OSError:
            # Also after a failed sync: pages the kernel gave up on are dropped here, and written afresh later.
            self._cut_back()
            raise
        self._end, self._clean = end, True

    def _cut_back(self) -> None:
        os.ftruncate(self._fd, self._end)
        os.fdatasync(self._fd)
        self._clean = True

    def _begin_segment(self, number: int) -> None:
        path = segment_path(self._directory, number)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _write_fully(fd, [segment_head(number)], 0)
            os.fsync(fd)
            fsync_directory(self._directory)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._end, self._clean = fd, HEAD_BYTES, True
        self._segments.append(_Segment(number))

    def _remember(self, record: Record, segment: _Segment) -> None:
        """Note what keeps `segment` on disk now that it holds `record`."""
        match record:
            case GroupRecord():
                # Eval groups have ordinals of their own, and nobody reads them again.
                if record.group.purpose is Purpose.TRAIN:
                    segment.ordinals.add(record.group.ordinal)
            case EndRecord():
                segment.ordinals.add(record.ordinal)
            case KnobRecord():
                segment.knob_pending = True
            case StepRecord():
                segment.ordinals.update(record.ordinals)
                # A checkpoint that knows this step was made under the knobs before it, and holds them.
                for earlier in self._segments:
                    if earlier.knob_pending:
                        earlier.ordinals.update(record.ordinals)
                        earlier.knob_pending = False

    def _recover(self) -> None:
        """Take up a journal where it can be trusted to end, or begin one."""
        paths = list_segments(self._directory)
        if not paths:
            self._begin_segment(1)
            return
        segments = {number: _Segment(number) for number in paths}
        self._segments = list(segments.values())
        for number, record in scan_journal(self._directory, self.report):
            self._remember(record, segments[number])
        for damage in self.report.damages:
            log.warning("journal %s", damage)
        number, path = max(paths.items())
        damages = [damage for damage in self.report.damages if damage.path == path]
        if not damages:
            self._reopen(path, path.stat().st_size)
        elif damages[0].kind == "damaged":
            # Left as it is, for whoever wants to look; nothing may be written behind bytes that are not read.
            self._begin_segment(number + 1)
        elif damages[0].offset > 0:
            self._reopen(path, damages[0].offset)
            self._cut_back()
        else:
            path.unlink()
            self._segments.pop()
            self._begin_segment(number)

    def _reopen(self, path: Path, end: int) -> None:
        self._fd, self._end = os.open(path, os.O_RDWR | os.O_CLOEXEC), end


def _write_fully(fd: int, buffers: list[Frame], offset: int) -> int:
    """Write all buffers at `offset` and return where they end. A disk that takes a part says why at the next try."""
    pending = [buffer for buffer in buffers if len(buffer)]
    done = 0
    while done < len(pending):
        written = os.pwritev(fd, pending[done : done + _IOV_MAX], offset)
        offset += written
        while done < len(pending) and written >= len(pending[done]):
            written -= len(pending[done])
            done += 1
        if written:
            pending[done] = memoryview(pending[done])[written:]
    return offset
