"""headway-learner trace RUN_DIR: the run's spans as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

The format is Google's "Trace Event Format": complete events (ph X) in microseconds, one process for the learner and one
for each server, one thread for each row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from learner.config.section import Section
from learner.durable import write_atomic
from learner.spans import FILE, PREVIOUS_FILE, Span, read_spans
from protocol.errors import ConfigError
from protocol.settings import load_settings

LEARNER = "learner"


class TraceCommand(Section):
    """Write a run's spans (steps, waits, publishes, each server's groups and swaps) as a Chrome trace."""

    output: Path = Path("trace.json")
    """File to write; open it in ui.perfetto.dev."""


def trace(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code.

    Raises:
        ConfigError: no run directory, none with spans in it, or a file that cannot be written.
    """
    if not argv or argv[0].startswith("-"):
        load_settings(TraceCommand, argv, prog=f"{prog} RUN_DIR")  # --help, or what is wrong with the flags
        raise ConfigError(
            f"no run directory: {prog} RUN_DIR, the directory under output_dir that has config.json in it"
        )
    run_dir, *flags = argv
    options = load_settings(TraceCommand, flags, prog=f"{prog} RUN_DIR")
    directory = Path(run_dir)
    if not any((directory / name).is_file() for name in (FILE, PREVIOUS_FILE)):
        raise ConfigError(f"{run_dir} holds no {FILE}: name the directory of a run that has trained")
    try:
        events = chrome_events(read_spans(directory))
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{directory / FILE} is damaged: {error}") from None
    try:
        write_atomic(options.output, msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(f"output {options.output}: {error.strerror}") from None
    spans = sum(event["ph"] == "X" for event in events)
    print(f"{spans:,} spans are in {options.output}: open it in ui.perfetto.dev or chrome://tracing")
    return 0


def chrome_events(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Turn spans into trace events; those of a lane that overlap get rows of their own."""
    ordered = sorted(spans, key=lambda span: (span.begun_s, -span.ended_s))
    origin_s = ordered[0].begun_s if ordered else 0.0
    processes: dict[str, int] = {LEARNER: 1}
    lanes: dict[tuple[str, str], _Lane] = {}
    threads: dict[tuple[str, str, int], int] = {}
    events: list[dict[str, Any]] = []
    for span in ordered:
        pid = processes.setdefault(span.process, len(processes) + 1)
        row = lanes.setdefault((span.process, span.lane), _Lane()).place(span)
        tid = threads.setdefault((span.process, span.lane, row), len(threads) + 1)
        event = {
            "ph": "X", "name": span.name, "cat": span.lane, "pid": pid, "tid": tid,
            "ts": round(1e6 * (span.begun_s - origin_s), 3), "dur": round(1e6 * (span.ended_s - span.begun_s), 3),
        }  # fmt: skip
        events.append(event | {"args": {"note": span.note}} if span.note else event)
    for process, pid in processes.items():
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
    for (process, lane, row), tid in threads.items():
        name = lane if row == 0 else f"{lane} {row + 1}"
        events.append({"ph": "M", "name": "thread_name", "pid": processes[process], "tid": tid, "args": {"name": name}})
    return events


class _Lane:
    """Rows of one lane: the lowest row that is free when a span begins takes it."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._taken: list[tuple[float, int]] = []
        self._rows = 0

    def place(self, span: Span) -> int:
        """Spans come in the order in which they began."""
        while self._taken and self._taken[0][0] <= span.begun_s:
            heapq.heappush(self._free, heapq.heappop(self._taken)[1])
        if not self._free:
            self._free, self._rows = [self._rows], self._rows + 1
        row = heapq.heappop(self._free)
        heapq.heappush(self._taken, (span.ended_s, row))
        return row
