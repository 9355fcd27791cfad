"""Evaluation: leases that hold no slot, results labelled with the versions that sampled them. Pure.

A *pinned* evaluation (the first and the last of a run) asks for exactly one version: it goes only to servers live at
it, and no newer version is announced while it lasts (publish.py holds). The others go to servers live at their version
or newer, and the result names the oldest and the newest version seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from learner.stats import EvalPoint
from protocol.completions import group_versions
from protocol.messages import Group


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """One pass over the evaluation rows. Row indices move pending -> leased -> done."""

    policy_version: int
    pinned: bool
    num_rows: int
    max_attempts: int = 3
    pending: deque[int] = field(default_factory=deque)
    leased: set[int] = field(default_factory=set)
    failed: int = 0
    """Rows given up after max_attempts that failed."""
    _rewards: list[float] = field(default_factory=list)
    _attempts: dict[int, int] = field(default_factory=dict)
    _faults: dict[int, int] = field(default_factory=dict)
    _versions: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with every row pending."""
        self.pending.extend(range(self.num_rows))

    @property
    def done(self) -> bool:
        """Whether every row is answered or given up."""
        return not self.pending and not self.leased

    def dispatched(self, row: int) -> int:
        """Lease a pending row; return the number of the attempt."""
        self.pending.remove(row)
        self.leased.add(row)
        self._attempts[row] = self._attempts.get(row, 0) + 1
        return self._attempts[row]

    def lost(self, row: int, *, fault: bool) -> None:
        """The lease will not be answered: again, or given up."""
        if row not in self.leased:
            return
        self.leased.discard(row)
        self._faults[row] = self._faults.get(row, 0) + fault
        if self._faults[row] < self.max_attempts:
            self.pending.append(row)
        else:
            self.failed += 1

    def delivered(self, row: int, group: Group) -> bool:
        """Take in a result. False for a duplicate, or for a pinned evaluation's group of another version."""
        if row not in self.leased:
            return False
        versions = {version.policy_version for version in group_versions(group)}
        if self.pinned and versions - {self.policy_version}:
            self.lost(row, fault=False)
            return False
        self.leased.discard(row)
        self._versions |= versions
        self._rewards.extend(group.rewards[group.scored == 1].tolist())
        return True

    def result(self) -> EvalPoint:
        """Mean reward over all scored completions, with the versions that sampled them."""
        versions = self._versions or {self.policy_version}
        return EvalPoint(
            step=self.policy_version,
            reward=float(np.mean(self._rewards)) if self._rewards else float("nan"),
            oldest=min(versions),
            newest=max(versions),
        )
