"""The ledger of `staleness_policy = "drop"`: what has finished trains, what has become too old ends `stale`. Pure.

What a first-in first-out buffer with a check of versions does. No window holds a finished group back for a straggler
ahead of it, so a straggler may be passed again and again, until no step may train it: then it is dropped, finished or
not, and its slot is free at once. Never trained too old (I4), counted (I3), and biased: what takes long is dropped more
often, so training sees fewer long completions than were leased. The default, `wait` (ledger.py), drops nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from learner.ledger import Entry, Ledger, State


class DroppingLedger(Ledger):
    """See the module's text. Slots are those of Ledger; after each `batch` the caller ends what is `expired`."""

    def latest_version(self, sequence: int) -> int:
        """Weights that train the next batch to be formed: from then on what is too old for them has ended."""
        return self.policy_version + self.batches_formed

    def select(self) -> list[int]:
        """Return up to P finished groups, oldest first, whoever is ahead of them."""
        finished = [sequence for sequence in self._untaken if self.entries[sequence].state is State.BUFFERED]
        return finished[: self.bounds.prompts_per_step]

    def may_train_short(self, sequences: Sequence[int]) -> bool:
        """Allow it: who becomes too old by it is dropped."""
        return True

    def expired(self) -> list[Entry]:
        """Return the leased and finished groups that the next batch may not have any more."""
        oldest = self.policy_version + self.batches_formed - self.bounds.max_staleness
        untaken = (self.entries[sequence] for sequence in self._untaken)
        return [entry for entry in untaken if entry.state is not State.PENDING and entry.floor < oldest]
