"""Whose completions train, and how fast: `wait` against `drop` on one engine with heavy-tailed lengths.

The shipped ledgers on a virtual clock. One engine of so many places decodes all running samples alike, a token in
t0 (1 + b / places) at occupancy b; a place is a sample's, not a group's. Training takes as long as its tokens take the
full engine. Lengths are lognormal with p99 / p50 = 10, cut at 20 medians: the regime with heavy tails of tests/bench.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field

from learner.dropping import DroppingLedger
from learner.ledger import End, Ledger
from learner.staleness import derive_bounds

PROMPTS, SAMPLES, PLACES = 16, 16, 64
MEDIAN, LONGEST = 100.0, 2000.0
SIGMA = math.log(10.0) / 2.3263
"""Of the log of a length: the standard normal's 99 % quantile is 2.3263."""
LIVE_DELAY = 0.02
"""Of a step: until servers sample with its weights."""
BATCHES_AHEAD = 3
"""One that trains, one in the queue, one in batch_loop's hands."""


@dataclass
class Outcome:
    """A run."""

    leased: list[int] = field(default_factory=list)
    """Lengths of all samples of groups that ended."""
    trained: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    """Of groups that trained, in that order."""
    wasted: float = 0.0
    """Tokens of groups that were dropped, as far as they had come."""
    stale: int = 0
    seconds: float = 0.0
    """In units of t0."""
    staleness_max: int = 0

    @property
    def ratio(self) -> float:
        """Mean length of what trained over that of what was leased."""
        return (sum(self.trained) / len(self.trained)) / (sum(self.leased) / len(self.leased))

    @property
    def wasted_share(self) -> float:
        """Of all tokens generated."""
        return self.wasted / (self.wasted + sum(self.trained))


def lengths_of(seed: int, ordinal: int, alike: float) -> list[int]:
    """Tokens of the samples of a prompt: its own, whenever it is sampled.

    Args:
        seed: of the run.
        ordinal: the prompt.
        alike: share of the log-length's variance that is the prompt's own; the rest is the sample's. 0: all prompts
            are alike; 1: all samples of a prompt are.
    """
    dice = random.Random(f"{seed} {ordinal}")
    own = math.sqrt(alike) * dice.gauss(0.0, 1.0)
    deviates = [own + math.sqrt(1.0 - alike) * dice.gauss(0.0, 1.0) for _ in range(SAMPLES)]
    return [max(1, round(min(LONGEST, MEDIAN * math.exp(SIGMA * deviate)))) for deviate in deviates]


class Line:
    """An engine and a learner around a ledger."""

    def __init__(self, ledger: Ledger, seed: int, alike: float) -> None:
        self.ledger, self.seed, self.alike = ledger, seed, alike
        self.outcome = Outcome()
        self.now = self.decoded = 0.0
        """Time, and tokens that a sample running all the time would have by now."""
        self.running: list[tuple[float, int, float]] = []
        """Heap of (decoded at its end, sequence, decoded at its begin)."""
        self.queue: deque[tuple[int, int]] = deque()
        self.lengths: dict[int, list[int]] = {}
        self.left: dict[int, int] = {}
        self.batches: deque[list[int]] = deque()
        self.training: tuple[float, list[int]] | None = None
        self.swaps: deque[tuple[float, int]] = deque()
        self.live = 0

    def run(self, steps: int) -> Outcome:
        """Train so many steps."""
        while self.ledger.policy_version < steps:
            self._lease()
            self._form()
            self._advance()
        self.outcome.seconds = self.now
        return self.outcome

    def _lease(self) -> None:
        while self.ledger.can_grant():
            self.ledger.grant()
        for entry in self.ledger.pending():
            self.ledger.dispatched(entry.sequence, "engine", self.live)
            self.lengths[entry.sequence] = lengths_of(self.seed, entry.ordinal, self.alike)
            self.left[entry.sequence] = SAMPLES
            self.queue.extend((entry.sequence, length) for length in self.lengths[entry.sequence])
        while self.queue and len(self.running) < PLACES:
            sequence, length = self.queue.popleft()
            heapq.heappush(self.running, (self.decoded + length, sequence, self.decoded))

    def _form(self) -> None:
        ledger = self.ledger
        while ledger.batches_formed < BATCHES_AHEAD and len(chosen := ledger.select()) == PROMPTS:
            ledger.batch(chosen)
            self.batches.append(chosen)
            for entry in ledger.expired():
                ledger.end(entry.sequence, End.STALE)
                self._drop(entry.sequence)
        if self.training is None and self.batches:
            batch = self.batches.popleft()
            ledger.check_staleness(batch)
            tokens = sum(sum(self.lengths[sequence]) for sequence in batch)
            self.training = (self.now + tokens * 2.0 / PLACES, batch)

    def _advance(self) -> None:
        """To the next thing that happens."""
        token_s = 1.0 + len(self.running) / PLACES
        sample = self.now + (self.running[0][0] - self.decoded) * token_s if self.running else math.inf
        train = self.training[0] if self.training else math.inf
        swap = self.swaps[0][0] if self.swaps else math.inf
        then = min(sample, train, swap)
        assert then < math.inf, "nothing is going on"
        self.decoded += (then - self.now) / token_s
        self.now = then
        if then == sample:
            self.decoded, sequence, _ = heapq.heappop(self.running)
            self.left[sequence] -= 1
            if not self.left[sequence]:
                entry = self.ledger.entries[sequence]
                self.ledger.delivered(entry.ordinal, entry.floor)
        elif then == train:
            self._trained()
        else:
            self.live = self.swaps.popleft()[1]
            self.ledger.live(self.live)

    def _trained(self) -> None:
        assert self.training is not None
        ledger, outcome, (_, batch) = self.ledger, self.outcome, self.training
        for sequence in batch:
            entry = ledger.entries[sequence]
            outcome.staleness_max = max(outcome.staleness_max, ledger.policy_version - entry.floor)
            outcome.ordinals.append(entry.ordinal)
            lengths = self.lengths.pop(sequence)
            outcome.leased += lengths
            outcome.trained += lengths
        ledger.trained(batch, ledger.policy_version + 1)
        self.swaps.append((self.now * (1.0 + LIVE_DELAY / max(1, ledger.policy_version)), ledger.policy_version))
        self.training = None

    def _drop(self, sequence: int) -> None:
        """Cancel what runs of a group, and count what it had come to."""
        lengths, left = self.lengths.pop(sequence), self.left.pop(sequence)
        unfinished = [sample for sample in self.running if sample[1] == sequence]
        waiting = [length for owner, length in self.queue if owner == sequence]
        self.running = [sample for sample in self.running if sample[1] != sequence]
        heapq.heapify(self.running)
        self.queue = deque(item for item in self.queue if item[0] != sequence)
        assert len(unfinished) + len(waiting) == left
        rest = sum(end - self.decoded for end, _, _ in unfinished) + sum(waiting)
        self.outcome.wasted += sum(lengths) - rest
        self.outcome.leased += lengths
        self.outcome.stale += 1


def play(policy: str, max_staleness: int, *, alike: float, seed: int, steps: int) -> Outcome:
    """Run one policy."""
    bounds = derive_bounds(
        max_staleness=max_staleness, prompts_per_step=PROMPTS, reorder_window=1 if policy == "drop" else None
    )
    return Line({"wait": Ledger, "drop": DroppingLedger}[policy](bounds), seed, alike).run(steps)


def play_one(job: tuple[str, int, float, int, int]) -> tuple[float, float, float, int]:
    """One run, in a process of the pool: (ratio of lengths, share of tokens wasted, time, groups dropped)."""
    policy, bound, alike, seed, steps = job
    outcome = play(policy, bound, alike=alike, seed=seed, steps=steps)
    return outcome.ratio, outcome.wasted_share, outcome.seconds, outcome.stale
