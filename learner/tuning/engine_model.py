"""One server's engine as a model: samples in seats, decoding together, standing still for weights.

Pure: time is an argument. All running samples draw one token per decode step, and a step's duration changes only when a
sample joins or leaves: so time is cut there and nowhere else, and a sample of a thousand tokens costs one event. Seats
are given per sample, in the order of the leases: a straggler holds one seat, and those of its group that ended are free
for the next group's. New weights go in between two steps; what was drawn before them keeps its version.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from learner.tuning.workload import Costs
from protocol.messages import Lease

Spans = list[tuple[int, int]]
"""(policy_version, tokens) of a completion, in order."""
ROUNDING = 1e-6
"""Tokens; keeps a token that is just due from being cut off by the rounding of a float."""

EARLY_S = 1e-8
"""An event loop calls a timer by so much too early at most (its clock's resolution, and rounding)."""


@dataclass(slots=True, eq=False)
class Job:
    """A leased group: its samples, and what has become of them."""

    lease: Lease
    lengths: Sequence[int]
    """Tokens of each sample."""
    seats: float = 1.0
    """That each sample takes; not 1 where one sample stands for a whole group."""
    admitted: int = 0
    ended: int = 0
    spans: list[Spans] = field(default_factory=list)
    """Of each sample."""

    def __post_init__(self) -> None:
        """No sample has begun."""
        self.spans = [[] for _ in self.lengths]


@dataclass(slots=True, eq=False)
class _Running:
    job: Job
    index: int
    joined: float
    """`progress` at which it joined."""
    first_version: int
    """Index into `_versions`."""


class EngineModel:
    """See the module's text. Times are seconds of a clock that only grows."""

    def __init__(self, room: int, costs: Costs, now: float) -> None:
        self.room = room
        self.costs = costs
        self.seat_s = 0.0
        """Integral over time of the seats taken."""
        self.paused_s = 0.0
        self.paused_seat_s = 0.0
        """Part of seat_s."""
        self.drawn = 0.0
        """Tokens: the sum over decode steps of the samples in each."""
        self.drawn_squared = 0.0
        """The sum of their squares."""
        self._now = now
        self._progress = 0.0
        """Decode steps since the start."""
        self._taken = 0.0
        """Seats."""
        self._stall_s = 0.0
        """Of prefilling, still to come before the next decode step."""
        self._swap: tuple[float, int] | None = None
        """(when it ends, policy_version) of the swap going on."""
        self._versions: list[tuple[float, int]] = []
        """(progress, policy_version) of every swap."""
        self._waiting: deque[Job] = deque()
        self._ends: list[tuple[float, int, _Running]] = []
        """Heap of (progress at its end, tie-break, sample)."""
        self._order = 0

    def next_event_s(self) -> float | None:
        """When something will happen by itself; None while nothing will."""
        if self._swap is not None:
            return self._swap[0]
        if not self._ends:
            return None
        return self._now + self._stall_s + max(0.0, self._ends[0][0] - self._progress) * self._step_s()

    @property
    def decode_steps(self) -> float:
        """Since the start."""
        return self._progress

    def samples(self) -> tuple[int, int]:
        """Samples running, and waiting for a seat."""
        waiting = sum(job.lease.num_generations - job.admitted for job in self._waiting)
        return round(self._taken), waiting

    def submit(self, job: Job) -> None:
        """Queue a job at the present; its samples join as seats get free."""
        self._waiting.append(job)
        self._admit()

    def swap(self, policy_version: int) -> None:
        """Stand still for costs.pause_s from now on, then go on with that version."""
        self._swap = (self._now + self.costs.pause_s, policy_version)

    def advance(self, now: float) -> tuple[list[Job], int | None]:
        """Let pass the time to `now`, by which at most the next event was due.

        Returns:
            The jobs that ended with it, and the version that went live with it.
        """
        event_s = self.next_event_s()
        self._move_to(now)
        if event_s is None or event_s > now + EARLY_S:
            return [], None
        if self._swap is None:
            return self._end_samples(), None
        _, version = self._swap
        self._swap = None
        self._versions.append((self._progress, version))
        return [], version

    def _step_s(self) -> float:
        return self.costs.decode_token_s * (1.0 + self.costs.occupancy_cost * self._taken / self.room)

    def _move_to(self, now: float) -> None:
        """Pass the time to `now`, in which nobody joins or leaves."""
        elapsed, self._now = now - self._now, now
        self.seat_s += elapsed * self._taken
        if self._swap is not None:
            self.paused_s += elapsed
            self.paused_seat_s += elapsed * self._taken
            return
        stalled = min(self._stall_s, elapsed)
        self._stall_s -= stalled
        if self._ends:
            steps = (elapsed - stalled) / self._step_s()
            self._progress += steps
            self.drawn += steps * self._taken
            self.drawn_squared += steps * self._taken**2

    def _end_samples(self) -> list[Job]:
        """End every sample that is due now, and fill the seats."""
        self._progress = max(self._progress, self._ends[0][0])  # exactly, whatever the sum of the steps rounded to
        ended = []
        while self._ends and self._ends[0][0] <= self._progress + ROUNDING:
            sample = heapq.heappop(self._ends)[2]
            job = sample.job
            self._taken -= job.seats
            job.spans[sample.index] = self._spans(sample)
            job.ended += 1
            if job.ended == len(job.lengths):
                ended.append(job)
        self._admit()
        return ended

    def _admit(self) -> None:
        """Give free seats to whoever waits longest. A fraction of a seat is rounded: sometimes up, sometimes down."""
        while self._waiting and self._taken + self._waiting[0].seats / 2 <= self.room:
            job = self._waiting[0]
            if job.admitted == 0:
                self._stall_s += self.costs.prefill_s
            sample = _Running(job, job.admitted, self._progress, len(self._versions) - 1)
            self._taken += job.seats
            self._order += 1
            heapq.heappush(self._ends, (self._progress + job.lengths[sample.index], self._order, sample))
            job.admitted += 1
            if job.admitted == len(job.lengths):
                self._waiting.popleft()

    def _spans(self, sample: _Running) -> Spans:
        """Which version drew how many tokens of a sample that ends now."""
        length, drawn = sample.job.lengths[sample.index], 0
        spans: Spans = []
        for index in range(sample.first_version, len(self._versions) - 1):
            until = min(length, int(self._versions[index + 1][0] - sample.joined + ROUNDING))
            if until > drawn:
                spans.append((self._versions[index][1], until - drawn))
                drawn = until
        if length > drawn or not spans:
            spans.append((self._versions[-1][1], length - drawn))
        return spans
