"""Spans: what took how long, kept in the run directory for `headway-learner trace`.

    loops --add, begin, end--> Spans (a list in memory) --every FLUSH_S--> spans.jsonl, on a thread

Adding a span is an append to a list: nothing is encoded or written on the event loop. The file is bounded: one that has
grown to LIMIT_BYTES becomes spans.1.jsonl, in place of the one before. A disk that refuses ends the recording, not the
run: these are for people to look at, and nothing is recovered from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from protocol.logs import event
from protocol.tasks import finish
from protocol.waits import Waits

ORDINARY = ("change", "arrivals", "batch place", "step")
"""Waits that are the ordinary state of a loop with nothing to do."""
log = logging.getLogger(__name__)

FILE, PREVIOUS_FILE = "spans.jsonl", "spans.1.jsonl"
LIMIT_BYTES = 64 << 20
FLUSH_S = 2.0
KEPT = 100_000
"""Spans in memory at most: in FLUSH_S there are far fewer, but not every run has somebody who writes them down."""


class Clock(msgspec.Struct, frozen=True, kw_only=True, tag="clock"):
    """A line that says how to read the times of the following ones."""

    incarnation: int
    clock_s: float
    unix_s: float


class Span(msgspec.Struct, frozen=True, kw_only=True, tag="span", omit_defaults=True, gc=False):
    """One line: something that lasted."""

    process: str
    """learner, or the name of a server."""
    lane: str
    """Spans of one lane are drawn in one row, or in as many as it takes."""
    name: str
    begun_s: float
    ended_s: float
    note: str = ""


class Spans:
    """Collects spans. One per learner, on the event loop."""

    def __init__(self) -> None:
        self._done: deque[Span] = deque(maxlen=KEPT)
        self._open: dict[str, tuple[str, str, str, float]] = {}

    def add(self, process: str, lane: str, name: str, begun_s: float, ended_s: float, note: str = "") -> None:
        """Something lasted from then to then."""
        self._done.append(Span(process=process, lane=lane, name=name, begun_s=begun_s, ended_s=ended_s, note=note))

    def begin(self, key: str, process: str, lane: str, name: str, now_s: float) -> None:
        """Something begins that `end` will end."""
        self._open[key] = (process, lane, name, now_s)

    def end(self, key: str, now_s: float, note: str = "") -> None:
        """It has ended, if it was going on."""
        begun = self._open.pop(key, None)
        if begun is not None:
            self.add(*begun, now_s, note)

    def take(self) -> list[Span]:
        """Hand over what has ended since the last call."""
        done = list(self._done)
        self._done.clear()
        return done


class SpanFile:
    """Appends to the file. Used by one thread at a time."""

    def __init__(self, directory: Path, header: Clock, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path, self._previous = directory / FILE, directory / PREVIOUS_FILE
        self._header = b"\n" + msgspec.json.encode(header) + b"\n"  # a crash may have left half a line before it
        self._limit_bytes = limit_bytes
        self._begun = False

    def write(self, spans: list[Span]) -> None:
        """Append them.

        Raises:
            OSError: the disk refused.
        """
        if self._path.exists() and self._path.stat().st_size > self._limit_bytes:
            self._path.replace(self._previous)
            self._begun = False
        lines = b"".join(msgspec.json.encode(span) + b"\n" for span in spans)
        with self._path.open("ab") as file:
            file.write(lines if self._begun else self._header + lines)
        self._begun = True


async def spans_loop(spans: Spans, waits: Waits, directory: Path, incarnation: int, clock: Callable[[], float]) -> None:
    """Write down what has lasted, the waits that ended among it.

    consumes: spans      waits for: its own timer      produces: spans.jsonl
    """
    file = SpanFile(directory, Clock(incarnation=incarnation, clock_s=clock(), unix_s=time.time()))
    try:
        while True:
            await asyncio.sleep(FLUSH_S)
            await finish(asyncio.ensure_future(asyncio.to_thread(file.write, collect(spans, waits))))
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            file.write(collect(spans, waits))  # the last two seconds
        raise
    except OSError as error:
        event(log, "spans_not_kept", level=logging.WARNING, reason=error)


def collect(spans: Spans, waits: Waits) -> list[Span]:
    """What has ended since the last call: spans, and waits worth showing."""
    while waits.spans:
        wait = waits.spans.popleft()
        if wait.name not in ORDINARY:
            spans.add("learner", f"waits: {wait.name}", f"for {wait.owner}", wait.started_s, wait.ended_s)
    return spans.take()


def read_spans(directory: Path) -> Iterator[Span]:
    """Spans of a run directory, with times in seconds since 1970. A line torn by a crash is left out.

    Raises:
        msgspec.DecodeError: another line is damaged.
    """
    decoder = msgspec.json.Decoder(Clock | Span)
    for path in (directory / PREVIOUS_FILE, directory / FILE):
        if not path.exists():
            continue
        offset_s, torn = 0.0, None
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or line == b"\n":
                    continue
                try:
                    entry = decoder.decode(line)
                except msgspec.DecodeError as error:
                    torn = torn or error
                    continue
                if isinstance(entry, Clock):  # whoever wrote the line before it has ended there
                    offset_s, torn = entry.unix_s - entry.clock_s, None
                elif torn is not None:
                    break
                else:
                    yield msgspec.structs.replace(
                        entry, begun_s=entry.begun_s + offset_s, ended_s=entry.ended_s + offset_s
                    )
        if torn is not None:
            raise torn
