"""Versions: of the wire, and of the policy.

The wire has one number, carried by every message; a peer with another one is refused at Hello with both named.
The policy has a pair, ordered lexicographically: the learner's incarnation (grows at every start of the learner) and
its policy_version (batches trained; 0 = initial weights). The incarnation is the fencing token: after a crash the
learner may go back to an older policy_version, and the pair still only grows (invariant I5).
"""

from __future__ import annotations

from typing import NamedTuple

PROTOCOL_VERSION = 5


class Version(NamedTuple):
    """The version of the weights that sampled a token, or that a server is live at.

    Example:
        >>> Version(1, 7) < Version(2, 5)
        True
        >>> str(Version(2, 5))
        '2.5'
    """

    incarnation: int
    policy_version: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.policy_version}"


class Lineage:
    """Which versions belong to the history of the weights being trained now.

    Resuming from checkpoint c forks the history: what the old incarnation trained after c is orphaned. A fork is
    (incarnation, first policy_version of that incarnation); the versions of an incarnation are valid from its first
    one up to the first one of the next incarnation (both sides of a fork have the same bytes).

    Example:
        >>> lineage = Lineage([(1, 0), (2, 5)])   # incarnation 1 reached 8, then 2 resumed from checkpoint 5
        >>> Version(1, 5) in lineage, Version(1, 6) in lineage, Version(2, 6) in lineage
        (True, False, True)
    """

    def __init__(self, forks: list[tuple[int, int]]) -> None:
        self.forks = [(int(incarnation), int(first)) for incarnation, first in forks]

    def fork(self, incarnation: int, policy_version: int) -> None:
        """Begin `incarnation` at `policy_version`; everything later of the earlier ones is orphaned.

        Raises:
            ValueError: the incarnation does not grow.
        """
        if self.forks and incarnation <= self.forks[-1][0]:
            raise ValueError(f"incarnation {incarnation} must be above {self.forks[-1][0]}")
        self.forks.append((incarnation, policy_version))

    def at(self, policy_version: int) -> Version:
        """The first name under which that policy_version belongs to this history."""
        for incarnation, _ in self.forks:
            if (version := Version(incarnation, policy_version)) in self:
                return version
        raise ValueError(f"policy_version {policy_version} is before {self.forks[0]}")

    def __contains__(self, version: Version) -> bool:
        began = False
        for incarnation, first in self.forks:
            if incarnation == version.incarnation:
                began = version.policy_version >= first
            elif incarnation > version.incarnation and version.policy_version > first:
                return False
        return began
