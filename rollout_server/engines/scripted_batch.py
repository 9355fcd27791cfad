"""The scripted engine's clockwork: a batch whose samples take time but need no model. Pure: time is an argument.

All running samples advance together, one token per decode step, and a step's duration changes only when a sample joins
or leaves: so time is cut there and nowhere else, and a sample of a thousand tokens costs one event. Events happen at
the moment they were due, however late `advance` is called: lateness does not add up.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.messages import FinishReason
from protocol.versions import Version
from rollout_server.engines.base import EngineStatus, GenerationRequest
from rollout_server.engines.marks import Spans, VersionMarks

Outcome = dict[int, tuple[Spans, FinishReason]]
"""Of each sample of a group: its version spans and how it ended."""
ROUNDING = 1e-6
"""Tokens; keeps a token that is just due from being cut off by the rounding of a float."""


@dataclass(slots=True, eq=False)
class ScriptedJob:
    """A request and the outcome it will have."""

    request: GenerationRequest
    lengths: list[int]
    """[G] tokens each sample will draw."""
    reasons: list[FinishReason]
    """[G]"""
    fails: bool
    """Fail the group when its first sample ends."""
    reply: Callable[[Outcome | None], None]
    """Called once; None when the job fails."""
    admitted: int = 0
    ended: Outcome = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Running:
    job: ScriptedJob
    index: int
    joined: float
    """`progress` at which it joined."""
    marks: VersionMarks


@dataclass(frozen=True, slots=True)
class _Swap:
    version: Version
    seconds: float
    reply: Callable[[bool], None]


class ScriptedBatch:
    """Samples in `room` places. Times are seconds of any clock that only grows.

    Args:
        room: samples decoded at once.
        token_s: duration of a decode step of one sample; 0 makes every sample end at once.
        occupancy_cost: a step takes token_s x (1 + occupancy_cost x running / room).
        now: the time to start at.
    """

    def __init__(self, *, room: int, token_s: float, occupancy_cost: float, now: float) -> None:
        self.room = room
        self.live: Version | None = None
        self._token_s, self._occupancy_cost = token_s, occupancy_cost
        self._now = now
        self._progress = 0.0
        """Decode steps since the start."""
        self._swaps: deque[_Swap] = deque()
        """The first is going on, and ends at `_swap_ends_s`; the others come after it."""
        self._swap_ends_s = now
        self._waiting: deque[ScriptedJob] = deque()
        self._running: dict[_Running, None] = {}
        """A set in the order of joining: the same script always replies in the same order."""
        self._ends: list[tuple[float, int, _Running]] = []
        """Heap of (progress at the end, tie-break, sample); may hold samples that were taken out."""
        self._order = itertools.count()
        self._tokens_ended = 0
        self._busy_s = self._paused_s = self._occupancy_s = 0.0

    def next_event_s(self) -> float | None:
        """When something will happen by itself; None while nothing will."""
        if self._swaps:
            return self._swap_ends_s
        while self._ends and self._ends[0][2] not in self._running:
            heapq.heappop(self._ends)
        if not self._ends:
            return None
        return self._now + max(0.0, self._ends[0][0] - self._progress) * self._step_s()

    def advance(self, now: float) -> None:
        """Let everything happen that was due by `now`."""
        while (event_s := self.next_event_s()) is not None and event_s <= now:
            self._move_to(event_s)
            if self._swaps:
                self._end_swap()
            else:
                self._end_samples()
        self._move_to(max(now, self._now))

    def submit(self, job: ScriptedJob, now: float) -> None:
        """Queue a job; its samples join as places get free."""
        self.advance(now)
        self._waiting.append(job)
        self._admit()
        self.advance(now)

    def abort(self, group_id: str, now: float) -> None:
        """End the group's samples with what they have drawn."""
        self.advance(now)
        for job in [job for job in self._jobs() if job.request.group_id == group_id]:
            for sample in [sample for sample in self._running if sample.job is job]:
                self._take_out(sample, FinishReason.ABORT)
            for index in range(job.admitted, job.request.num_generations):
                job.ended[index] = ((), FinishReason.ABORT)
            self._forget(job)
            job.reply(job.ended)
        self._admit()
        self.advance(now)

    def load(self, version: Version, seconds: float, reply: Callable[[bool], None], now: float) -> None:
        """Stand still for `seconds`, then go on as `version`; after the loads asked for before.

        Args:
            version: what samples every token from then on.
            seconds: length of the pause.
            reply: called once: True when the version is live, False when `clear` came first.
            now: the time.
        """
        self.advance(now)
        self._swaps.append(_Swap(version, seconds, reply))
        if len(self._swaps) == 1:
            self._swap_ends_s = self._now + seconds
        self.advance(now)

    def clear(self) -> None:
        """Drop every job and load, failing it."""
        for job in self._jobs():
            self._forget(job)
            job.reply(None)
        while self._swaps:
            self._swaps.popleft().reply(False)

    def status(self) -> EngineStatus:
        """Counters and gauges, as of the last call with a time."""
        drawn = sum(self._drawn(sample) for sample in self._running)
        return EngineStatus(
            samples_running=len(self._running),
            samples_waiting=sum(job.request.num_generations - job.admitted for job in self._waiting),
            tokens_generated=self._tokens_ended + drawn,
            tokens_held=drawn
            + sum(count for job in self._jobs() for spans, _ in job.ended.values() for _, count in spans),
            busy_s=self._busy_s,
            paused_s=self._paused_s,
            occupancy_s=self._occupancy_s,
        )

    def _step_s(self) -> float:
        return self._token_s * (1.0 + self._occupancy_cost * len(self._running) / self.room)

    def _drawn(self, sample: _Running) -> int:
        """Whole tokens drawn so far."""
        return min(int(self._progress - sample.joined + ROUNDING), sample.job.lengths[sample.index])

    def _move_to(self, now: float) -> None:
        """Pass the time to `now`, in which nobody joins or leaves."""
        elapsed, self._now = now - self._now, now
        self._occupancy_s += elapsed * len(self._running) / self.room
        if self._swaps:
            self._paused_s += elapsed
        elif self._running and elapsed > 0:
            self._busy_s += elapsed
            self._progress += elapsed / self._step_s()

    def _end_samples(self) -> None:
        """End every sample that is due at the time moved to, and fill the places."""
        self._progress = max(self._progress, self._ends[0][0])  # exactly, whatever the sum of the steps rounded to
        while self._ends and self._ends[0][0] <= self._progress + ROUNDING:
            sample = heapq.heappop(self._ends)[2]
            if sample not in self._running:
                continue
            job = sample.job
            self._take_out(sample, job.reasons[sample.index])
            if job.fails:
                self._forget(job)
                job.reply(None)
            elif len(job.ended) == job.request.num_generations:
                job.reply(job.ended)
        self._admit()

    def _end_swap(self) -> None:
        swap = self._swaps.popleft()
        self.live = swap.version
        for sample in self._running:
            sample.marks.switch(swap.version, self._drawn(sample))
        if self._swaps:
            self._swap_ends_s = self._now + self._swaps[0].seconds
        swap.reply(True)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.room:
            assert self.live is not None  # no job is taken without
            job = self._waiting[0]
            sample = _Running(job, job.admitted, self._progress, VersionMarks(self.live))
            self._running[sample] = None
            end = self._progress + job.lengths[sample.index]
            heapq.heappush(self._ends, (end, next(self._order), sample))
            job.admitted += 1
            if job.admitted == job.request.num_generations:
                self._waiting.popleft()

    def _take_out(self, sample: _Running, reason: FinishReason) -> None:
        drawn = self._drawn(sample)
        del self._running[sample]
        self._tokens_ended += drawn
        sample.job.ended[sample.index] = (sample.marks.spans(drawn), reason)

    def _jobs(self) -> list[ScriptedJob]:
        """Every job with a sample running or waiting, each once."""
        return list(dict.fromkeys([*(sample.job for sample in self._running), *self._waiting]))

    def _forget(self, job: ScriptedJob) -> None:
        for sample in [sample for sample in self._running if sample.job is job]:
            self._take_out(sample, FinishReason.ABORT)
        if job in self._waiting:
            self._waiting.remove(job)
