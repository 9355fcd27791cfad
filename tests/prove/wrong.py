"""Rules that were thought of and rejected, as small changes of the shipped ledger. Each breaks the bound.

All but the first are judged without the rule of min_versions: what is asked is whether slots and window alone keep the
bound, as the shipped ones do with one server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from learner.ledger import Entry, Ledger, State
from protocol.errors import StalenessViolation


class SlotsAlone(Ledger):
    """Slots and window without the rule of min_versions. Enough for one server; for two it is the rejected rule
    "a slot frees when the first server is live": the other one still samples with old weights."""

    def min_policy_version(self, sequence: int) -> int:
        return 0


class WindowOfPositions(SlotsAlone):
    """The window counts places in the queue: what overtakes makes room for the next one to overtake."""

    def select(self) -> list[int]:
        first = self._untaken[: self.bounds.reorder_window]
        finished = [sequence for sequence in first if self.entries[sequence].state is State.BUFFERED]
        return finished[: self.bounds.prompts_per_step]


class FreedAtOptimizerStep(SlotsAlone):
    """A slot frees when its step has trained, whatever the servers sample with."""

    def trained(self, sequences: Sequence[int], policy_version: int) -> None:
        super().trained(sequences, policy_version)
        self._awaiting_live.clear()


class FreedAtOptimizerStepButAsked(Ledger):
    """The same with the rule of min_versions: safe, but what is leased too early holds its slot and waits."""

    def trained(self, sequences: Sequence[int], policy_version: int) -> None:
        super().trained(sequences, policy_version)
        self._awaiting_live.clear()


class LostToTheTail(SlotsAlone):
    """A group that was lost goes to the end of the queue, and goes on from the tokens that it has."""

    def lost(self, sequence: int, *, fault: bool) -> Entry | None:
        entry = self._expect(sequence, State.LEASED)
        self._remove(sequence)
        entry.state, entry.sequence = State.PENDING, self.next_sequence
        self.next_sequence += 1
        self._add(entry)
        return entry

    def dispatched(self, sequence: int, server: str, live_policy_version: int) -> Entry:
        entry = self.entries[sequence]
        floor = min(entry.floor, live_policy_version) if entry.attempt else live_policy_version
        return super().dispatched(sequence, server, floor)


class LateSamplesCredited(SlotsAlone):
    """A group trains when most of its samples are there; the others go into the step that trains when they come."""

    late: int | None = None
    """Version of the oldest sample that may still come."""

    def delivered(self, ordinal: int, oldest_policy_version: int) -> Entry:
        self.late = oldest_policy_version if self.late is None else min(self.late, oldest_policy_version)
        return super().delivered(ordinal, oldest_policy_version)

    def check_staleness(self, sequences: Iterable[int]) -> None:
        super().check_staleness(sequences)
        if self.late is not None and self.policy_version - self.late > self.bounds.max_staleness:
            staleness = self.policy_version - self.late
            raise StalenessViolation(f"I4: late samples have staleness {staleness} > {self.bounds.max_staleness}")
