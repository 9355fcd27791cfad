"""The ledger: every prompt from grant to end, and the staleness bound. Pure: no I/O, no clock, no tensors.

One entry per granted prompt, keyed by its lease sequence number. Transitions, and the invariant each one keeps:

    grant        -> PENDING               I1: only while a slot is free
    dispatched   PENDING -> LEASED        I4: only to a server live at min_policy_version or above
    lost         LEASED -> PENDING        same ordinal, same sequence number; past max_attempts: ends `quarantined`
    delivered    PENDING|LEASED -> BUFFERED   or is refused as a duplicate or as too old
    end          any untaken -> (gone)    filtered, quarantined, stale: the slot frees at once (I2)
    batch        BUFFERED -> BATCHED      inside the reorder window only
    skip         BATCHED -> (gone)        ends `skipped`: its slots free at once (I2)
    trained      BATCHED -> (gone)        ends `trained`; the slot stays in use until the step's version is live (I2)
    live                                  frees the slots of every step up to that version

I3 holds by counting: granted = ended + batched + buffered + in flight, always (`unaccounted == 0`).

The bound. For an untaken group i let A be the untaken groups before it and O those of the next W - 1 sequence numbers
that may still overtake it. With b batches formed and not trained, the weights about to be trained when i is trained
are of a version of at most

    latest(i) = policy_version + b + (A + O) // P,

so tokens sampled at latest(i) - max_staleness or later are never too old, whatever happens next. That is the
min_version of every lease, retries too. A step that trains fewer than P groups advances the version faster than this
counts on, so it is allowed only where no group under way could become too old (`may_train_short`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict

from learner.staleness import Bounds
from protocol.errors import InvariantViolation, StalenessViolation


class State(StrEnum):
    """Where a granted prompt is."""

    PENDING = "pending"
    LEASED = "leased"
    BUFFERED = "buffered"
    BATCHED = "batched"


class End(StrEnum):
    """How a prompt ends, once."""

    TRAINED = "trained"
    FILTERED = "filtered"
    QUARANTINED = "quarantined"
    STALE = "stale"
    SKIPPED = "skipped"


class Verdict(StrEnum):
    """What to do with a group that arrived."""

    ACCEPT = "accept"
    DUPLICATE = "duplicate"
    STALE = "stale"
    UNKNOWN = "unknown"


@dataclass(slots=True, kw_only=True)
class Entry:
    """One granted prompt that has not ended."""

    ordinal: int
    sequence: int
    state: State = State.PENDING
    attempt: int = 0
    """Leases given out for it so far."""
    faults: int = 0
    """Attempts that failed; max_attempts of them quarantine it."""
    server: str = ""
    """Who holds the lease, while LEASED."""
    floor: int = 0
    """Once LEASED: no token is older than this policy_version."""


class LedgerSnapshot(TypedDict):
    """The ledger inside a checkpoint: what has not ended, and the counts."""

    cursor: int
    next_sequence: int
    entries: list[list[int]]
    ends: dict[str, int]
    granted: int
    policy_version: int
    filtered_since_batch: int


class Ledger:
    """See the module's text. Methods raise InvariantViolation for what can only be a bug of the caller."""

    def __init__(
        self, bounds: Bounds, *, max_attempts: int = 3, max_refill_ratio: int = 4, policy_version: int = 0
    ) -> None:
        self.bounds = bounds
        self.max_attempts = max_attempts
        self.max_refill_ratio = max_refill_ratio
        self.policy_version = policy_version
        self.cursor = 0
        """Next ordinal to grant."""
        self.next_sequence = 0
        self.entries: dict[int, Entry] = {}
        self.ends: Counter[str] = Counter()
        self.granted = 0
        self.filtered_since_batch = 0
        self.batches_formed = 0
        """Batches formed and neither trained nor skipped."""
        self._by_ordinal: dict[int, int] = {}
        self._untaken: list[int] = []
        """Sequences neither batched nor ended, ascending."""
        self._pending: list[int] = []
        """Those of them that wait for a server, ascending."""
        self._awaiting_live: dict[int, int] = {}

    @property
    def slots_in_use(self) -> int:
        """Groups between grant and live weights (I1: <= slots_total)."""
        return len(self.entries) + sum(self._awaiting_live.values())

    def can_grant(self) -> bool:
        """Whether a slot is free."""
        return self.slots_in_use < self.bounds.slots_total

    def grant(self) -> Entry:
        """Give the next ordinal a slot and a sequence number."""
        if not self.can_grant():
            raise InvariantViolation(f"I1: {self.slots_in_use} slots in use of {self.bounds.slots_total}")
        entry = Entry(ordinal=self.cursor, sequence=self.next_sequence)
        self._add(entry)
        self.cursor += 1
        self.next_sequence += 1
        self.granted += 1
        return entry

    def filter_unleased(self) -> int:
        """End the next ordinal `filtered` without slot or lease (its row is too long), and return it."""
        ordinal, self.cursor = self.cursor, self.cursor + 1
        self.granted += 1
        self.ends[End.FILTERED] += 1
        return ordinal

    def pending(self) -> list[Entry]:
        """Entries waiting for a server, oldest first."""
        return [self.entries[sequence] for sequence in self._pending]

    def latest_version(self, sequence: int) -> int:
        """Newest weights that can be about to train when this untaken group trains: see the module's text."""
        before = self._before_it_trains(sequence, self._untaken)
        return self.policy_version + self.batches_formed + before // self.bounds.prompts_per_step

    def min_policy_version(self, sequence: int) -> int:
        """Oldest weights that may still sample for this group."""
        return max(0, self.latest_version(sequence) - self.bounds.max_staleness)

    def dispatched(self, sequence: int, server: str, live_policy_version: int) -> Entry:
        """Lease the group to a server that samples with `live_policy_version` or newer."""
        entry = self._expect(sequence, State.PENDING)
        if live_policy_version < self.min_policy_version(sequence):
            raise InvariantViolation(
                f"I4: group {entry.ordinal} leased to {server} live at {live_policy_version},"
                f" needs >= {self.min_policy_version(sequence)}"
            )
        _drop(self._pending, sequence)
        entry.state, entry.server, entry.floor = State.LEASED, server, live_policy_version
        entry.attempt += 1
        return entry

    def lost(self, sequence: int, *, fault: bool) -> Entry | None:
        """The lease will not be answered. Return the entry to lease again, or None when it ended quarantined."""
        entry = self._expect(sequence, State.LEASED)
        entry.state, entry.server = State.PENDING, ""
        insort(self._pending, sequence)
        entry.faults += fault
        if entry.faults < self.max_attempts:
            return entry
        self.end(sequence, End.QUARANTINED)
        return None

    def find(self, ordinal: int) -> Entry | None:
        """The entry of an ordinal that has not ended."""
        sequence = self._by_ordinal.get(ordinal)
        return None if sequence is None else self.entries[sequence]

    def judge(self, ordinal: int, oldest_policy_version: int) -> Verdict:
        """Say what would become of a group of this ordinal whose oldest token is of that version."""
        entry = self.find(ordinal)
        if entry is None:
            return Verdict.DUPLICATE if ordinal < self.cursor else Verdict.UNKNOWN
        if entry.state in (State.BUFFERED, State.BATCHED):
            return Verdict.DUPLICATE
        if oldest_policy_version < self.min_policy_version(entry.sequence):
            return Verdict.STALE
        return Verdict.ACCEPT

    def delivered(self, ordinal: int, oldest_policy_version: int) -> Entry:
        """Take in a group that `judge` accepted, from whichever server and attempt it came."""
        entry = self.find(ordinal)
        if entry is None or entry.state not in (State.PENDING, State.LEASED):
            raise InvariantViolation(f"I3: group {ordinal} delivered, but it is {entry.state if entry else 'ended'}")
        if entry.state is State.PENDING:
            _drop(self._pending, entry.sequence)
        entry.state, entry.server, entry.floor = State.BUFFERED, "", oldest_policy_version
        return entry

    def end(self, sequence: int, how: End) -> None:
        """End an untaken group; its slot is free at once."""
        entry = self.entries.get(sequence)
        if entry is None or entry.state is State.BATCHED:
            raise InvariantViolation(f"I3: sequence {sequence} cannot end {how}: it is not untaken")
        self._remove(sequence)
        self.ends[how] += 1
        if how is End.FILTERED:
            self.filtered_since_batch += 1

    def select(self) -> list[int]:
        """Sequences that one batch may take now: at most P, oldest first, inside the sliding window."""
        chosen: list[int] = []
        lowest: int | None = None  # of those not chosen
        for sequence in self._untaken:
            if len(chosen) == self.bounds.prompts_per_step:
                break
            if lowest is not None and sequence >= lowest + self.bounds.reorder_window:
                break
            if self.entries[sequence].state is State.BUFFERED:
                chosen.append(sequence)
            elif lowest is None:
                lowest = sequence
        return chosen

    @property
    def refill_exhausted(self) -> bool:
        """Whether this step has had its max_refill_ratio of filtered groups replaced."""
        return self.filtered_since_batch > self.max_refill_ratio * self.bounds.prompts_per_step

    def may_train_short(self, sequences: Sequence[int]) -> bool:
        """Whether a step of fewer than P groups keeps I4 for every group under way."""
        taken = set(sequences)
        left = [sequence for sequence in self._untaken if sequence not in taken]
        for sequence in left:
            entry = self.entries[sequence]
            if entry.state is State.PENDING:
                continue  # its lease is still to be given, and will ask for what it needs
            before = self._before_it_trains(sequence, left)
            latest = self.policy_version + self.batches_formed + 1 + before // self.bounds.prompts_per_step
            if latest - entry.floor > self.bounds.max_staleness:
                return False
        return True

    def batch(self, sequences: Sequence[int]) -> None:
        """Form a batch of buffered groups. With none at all the step is only counted off: it cannot train."""
        self.filtered_since_batch = 0
        for sequence in sequences:
            self._expect(sequence, State.BUFFERED).state = State.BATCHED
            _drop(self._untaken, sequence)
        self.batches_formed += bool(sequences)

    def check_staleness(self, sequences: Iterable[int]) -> None:
        """I4, checked where it matters: on the batch about to train.

        Raises:
            StalenessViolation: a token is older than max_staleness.
        """
        for sequence in sequences:
            entry = self._expect(sequence, State.BATCHED)
            staleness = self.policy_version - entry.floor
            if staleness > self.bounds.max_staleness:
                raise StalenessViolation(
                    f"I4: group {entry.ordinal} has staleness {staleness}, max_staleness is"
                    f" {self.bounds.max_staleness}; the run stops rather than train it"
                )

    def trained(self, sequences: Sequence[int], policy_version: int) -> None:
        """The batch trained into `policy_version`; its slots wait for a server to be live at it."""
        if policy_version != self.policy_version + 1:
            raise InvariantViolation(f"I5: policy_version {self.policy_version} -> {policy_version}")
        self._close_batch(sequences, End.TRAINED)
        self.policy_version = policy_version
        self._awaiting_live[policy_version] = len(sequences)

    def skip(self, sequences: Sequence[int]) -> None:
        """The batch was not trained; its groups end `skipped` and its slots free at once."""
        self._close_batch(sequences, End.SKIPPED)

    def live(self, policy_version: int) -> None:
        """A healthy server samples with `policy_version` or newer: the slots of those steps are free."""
        for step in [step for step in self._awaiting_live if step <= policy_version]:
            del self._awaiting_live[step]

    def counts(self) -> dict[str, int]:
        """How many are in each state and how many ended each way."""
        states = Counter(entry.state.value for entry in self.entries.values())
        return {state.value: states[state.value] for state in State} | {end.value: self.ends[end] for end in End}

    @property
    def unaccounted(self) -> int:
        """I3: granted - ended - under way; anything but 0 is a bug."""
        return self.granted - self.ends.total() - len(self.entries)

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps. Everything under way, batched or not, is untrained and comes back pending."""
        return {
            "cursor": self.cursor,
            "next_sequence": self.next_sequence,
            "entries": [[e.ordinal, e.sequence, e.attempt, e.faults] for _, e in sorted(self.entries.items())],
            "ends": dict(self.ends),
            "granted": self.granted,
            "policy_version": self.policy_version,
            "filtered_since_batch": self.filtered_since_batch,
        }

    def restore(self, snapshot: LedgerSnapshot) -> None:
        """Go on from a checkpoint, into a ledger that has granted nothing yet."""
        self.cursor, self.next_sequence = snapshot["cursor"], snapshot["next_sequence"]
        self.granted, self.policy_version = snapshot["granted"], snapshot["policy_version"]
        self.filtered_since_batch = snapshot["filtered_since_batch"]
        self.ends = Counter({End(how).value: count for how, count in snapshot["ends"].items()})
        for ordinal, sequence, attempt, faults in snapshot["entries"]:
            self._add(Entry(ordinal=ordinal, sequence=sequence, attempt=attempt, faults=faults))

    def _add(self, entry: Entry) -> None:
        self.entries[entry.sequence] = entry
        self._by_ordinal[entry.ordinal] = entry.sequence
        self._untaken.append(entry.sequence)  # sequences grow
        self._pending.append(entry.sequence)

    def _remove(self, sequence: int) -> None:
        entry = self.entries.pop(sequence)
        del self._by_ordinal[entry.ordinal]
        if entry.state is not State.BATCHED:
            _drop(self._untaken, sequence)
        if entry.state is State.PENDING:
            _drop(self._pending, sequence)

    def _before_it_trains(self, sequence: int, untaken: list[int]) -> int:
        """A + O: how many of `untaken` (ascending), or not yet granted, may still train before `sequence` does."""
        window_end = sequence + self.bounds.reorder_window
        not_granted = max(0, window_end - max(self.next_sequence, sequence + 1))
        return bisect_left(untaken, window_end) - 1 + not_granted

    def _expect(self, sequence: int, state: State) -> Entry:
        entry = self.entries.get(sequence)
        if entry is None or entry.state is not state:
            raise InvariantViolation(f"I3: sequence {sequence} is {entry.state if entry else 'ended'}, not {state}")
        return entry

    def _close_batch(self, sequences: Sequence[int], how: End) -> None:
        for sequence in sequences:
            self._expect(sequence, State.BATCHED)
            self._remove(sequence)
            self.ends[how] += 1
        self.batches_formed -= bool(sequences)


def _drop(ascending: list[int], sequence: int) -> None:
    """Remove one that is there."""
    del ascending[bisect_left(ascending, sequence)]
