"""The journal on disk: the format of a segment, and reading segments that may be torn or damaged.

    journal/000001.log, 000002.log, ...        only the highest is written to
    segment := head record*
    head    := magic[8] format:u16 protocol_version:u16 number:u32 blake3[16]                     32 bytes
    record  := magic[4] num_frames:u32 length:u64[num_frames] frame[num_frames] blake3[32]        little-endian

Each BLAKE3 covers everything before it in its head or record. Two kinds of bad bytes are told apart:
- *torn*: the end of the highest segment, with no whole record after it. Writing was cut short before it was
  acknowledged (or the very last record has rotted, which looks the same).
- *damaged*: anything else, such as a flipped byte with whole records after it. What follows in that segment is not
  trusted: the order of records is their meaning. The segments after it are read on. A power cut that wrote the blocks
  of the last, unacknowledged append out of order is called damage too; nothing is lost by that.
Reading never modifies, and never fails over bad bytes; it reports them. Knows frames, not what they mean.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Literal

import blake3
import msgspec

from learner.journal_records import Frame, Record, record_from_frames
from protocol.errors import HeadwayError, ProtocolError
from protocol.versions import PROTOCOL_VERSION

FORMAT_VERSION = 1
SEGMENT_MAGIC = b"\x89HWJRN\r\n"
RECORD_MAGIC = b"\xf5HR\x0a"
HEAD_BYTES = 32
DIGEST_BYTES = 32
MAX_FRAMES = 64
_HEAD = struct.Struct("<8sHHI")
_RECORD = struct.Struct("<4sI")


class JournalError(HeadwayError, OSError):
    """The journal cannot be written (nothing of the append stays on disk), or is not of this version."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are not records."""

    path: Path
    offset: int
    """Where the first bad byte may be; everything before it was read."""
    num_bytes: int
    """From there to the end of the segment."""
    kind: Literal["torn", "damaged"]
    reason: str

    def __str__(self) -> str:
        what = "end cut short" if self.kind == "torn" else "DAMAGED"
        return (
            f"{self.path}: {what} at byte {self.offset} ({self.reason}); its last {self.num_bytes} bytes are not read"
        )


@dataclass(slots=True)
class JournalReport:
    """What reading met. Complete when the reading has ended."""

    num_segments: int = 0
    num_records: int = 0
    damages: list[Damage] = field(default_factory=list)


class _BadRecord(Exception):
    """These bytes are no record; the text says why. Never leaves this module."""


def segment_path(directory: Path, number: int) -> Path:
    """Name a segment."""
    return directory / f"{number:06d}.log"


def list_segments(directory: Path) -> dict[int, Path]:
    """Return the segments of a journal by number, ascending."""
    found = {int(path.stem): path for path in directory.iterdir() if re.fullmatch(r"\d{6,}\.log", path.name)}
    return dict(sorted(found.items()))


def segment_head(number: int) -> bytes:
    """Return the first HEAD_BYTES of a segment."""
    head = _HEAD.pack(SEGMENT_MAGIC, FORMAT_VERSION, PROTOCOL_VERSION, number)
    return head + _head_digest(head)


def pack_record(frames: Sequence[Frame]) -> list[Frame]:
    """Return the buffers to write for one record: what describes the frames, the frames as bytes, the digest."""
    flat = [frame if isinstance(frame, bytes) else _as_bytes(frame) for frame in frames]
    head = _RECORD.pack(RECORD_MAGIC, len(flat)) + struct.pack(f"<{len(flat)}Q", *map(len, flat))
    digest = blake3.blake3(head)
    for frame in flat:
        digest.update(frame)
    return [head, *flat, digest.digest()]


def read_journal(directory: Path, report: JournalReport | None = None) -> Iterator[Record]:
    """Yield every record that can be trusted, in the order written; bad bytes go to `report`.

    Safe beside a learner that is writing: what it is writing at the moment then looks torn.

    Raises:
        JournalError: a segment is of another format or protocol version.
    """
    for _, record in scan_journal(directory, report if report is not None else JournalReport()):
        yield record


def scan_journal(directory: Path, report: JournalReport) -> Iterator[tuple[int, Record]]:
    """Like `read_journal`, with the number of each record's segment."""
    segments = list_segments(directory)
    for number, path in segments.items():
        if report.num_segments and number - 1 not in segments:
            missing = segment_path(directory, number - 1)
            report.damages.append(Damage(missing, 0, 0, "damaged", "the file is missing"))
        report.num_segments += 1
        for record in _scan_segment(path, report, last=number == max(segments)):
            report.num_records += 1
            yield number, record


def _scan_segment(path: Path, report: JournalReport, *, last: bool) -> Iterator[Record]:
    """Yield the records of one segment up to its end or its first bad byte, which is reported."""
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        return  # a learner that goes on has pruned it since the journal was listed
    with opened as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        kind: Literal["torn", "damaged"] = "damaged"
        try:
            _check_head(path, file.read(HEAD_BYTES))
            end = HEAD_BYTES
            while end < size:
                frames = _read_record(file, size - end)
                end = file.tell()
                yield _decode(path, frames)
        except JournalError:
            raise
        except _BadRecord as bad:
            if last and not _holds_record(file, end + 1, size):
                kind = "torn"
            report.damages.append(Damage(path, end, size - end, kind, str(bad)))
        except OSError as error:  # a file system with checksums of its own refuses to read what has rotted
            report.damages.append(Damage(path, end, size - end, kind, f"cannot be read: {error.strerror}"))


def _check_head(path: Path, head: bytes) -> None:
    if len(head) < HEAD_BYTES:
        raise _BadRecord("the head is incomplete")
    magic, format_version, protocol_version, _ = _HEAD.unpack_from(head)
    if magic != SEGMENT_MAGIC or _head_digest(head[: _HEAD.size]) != head[_HEAD.size :]:
        raise _BadRecord("the head is not what was written")
    if (format_version, protocol_version) != (FORMAT_VERSION, PROTOCOL_VERSION):
        raise JournalError(
            f"{path} was written with journal format {format_version} and protocol version {protocol_version}; this"
            f" headway has {FORMAT_VERSION} and {PROTOCOL_VERSION}: continue the run with the version that wrote it, or"
            " begin a new one"
        )


def _decode(path: Path, frames: list[memoryview]) -> Record:
    try:
        return record_from_frames(frames)
    except (msgspec.DecodeError, ProtocolError, ValueError, IndexError) as error:
        # The digest is right, so these are the bytes that were written: by software that is not this one.
        raise JournalError(f"{path}: a whole record that this headway cannot read ({error})") from error


def _read_record(file: BufferedReader, available: int) -> list[memoryview]:
    """Read the record at the file's position, of at most `available` bytes; nothing is allocated beyond those.

    Raises:
        _BadRecord: there is none.
    """
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        raise _BadRecord("incomplete")
    magic, num_frames = _RECORD.unpack(head)
    if magic != RECORD_MAGIC or num_frames > MAX_FRAMES:
        raise _BadRecord("not the beginning of a record")
    head += file.read(8 * num_frames)
    if len(head) < _RECORD.size + 8 * num_frames:
        raise _BadRecord("incomplete")
    lengths = struct.unpack_from(f"<{num_frames}Q", head, _RECORD.size)
    if len(head) + sum(lengths) + DIGEST_BYTES > available:
        raise _BadRecord("incomplete, or its lengths are wrong")
    body = memoryview(file.read(sum(lengths)))
    if blake3.blake3(head).update(body).digest() != file.read(DIGEST_BYTES):
        raise _BadRecord("does not hash to what was written")
    frames, start = [], 0
    for length in lengths:
        frames.append(body[start : start + length])
        start += length
    return frames


def _holds_record(file: BufferedReader, start: int, size: int) -> bool:
    """Whether a whole record begins anywhere in [start, size)."""
    file.seek(start)
    rest = file.read(size - start)
    at = rest.find(RECORD_MAGIC)
    while at >= 0:
        file.seek(start + at)
        try:
            _read_record(file, size - start - at)
        except _BadRecord:
            at = rest.find(RECORD_MAGIC, at + 1)
        else:
            return True
    return False


def _head_digest(head: bytes) -> bytes:
    return blake3.blake3(head).digest(HEAD_BYTES - _HEAD.size)


def _as_bytes(view: memoryview) -> Frame:
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else b""
