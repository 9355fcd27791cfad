"""Why seats stood empty: the time in which the engine decoded less than it has room for, by cause. Pure.

A seat is room for one sample. Whoever knows of an event that may change the cause (a lease, samples that came back, a
group that was scored, a heartbeat) settles: what the engine's own integral says was empty since the event before goes
to the cause that held from then on. The causes sum to the most that wall time - occupancy has been: where an engine
counts occupancy step by step, within a step of what was empty.
"""

from __future__ import annotations

from enum import StrEnum


class EmptyBecause(StrEnum):
    """Why a seat had no sample."""

    LEASE = "lease"
    """Nothing more was leased. Why not, the learner knows."""
    ENGINE = "engine"
    """Samples waited that the engine had not begun: a swap, a prompt being computed, a full cache."""
    REWARDS = "rewards"
    """All that was left to do was to score what had been sampled."""
    WEIGHTS = "weights"
    """No weights were live."""


def why_empty(*, live: bool, samples_waiting: int, groups_in_flight: int, groups_scoring: int) -> EmptyBecause:
    """Say what keeps seats empty from now on, if any are."""
    if not live:
        return EmptyBecause.WEIGHTS
    if samples_waiting:
        return EmptyBecause.ENGINE
    if groups_scoring and groups_scoring == groups_in_flight:
        return EmptyBecause.REWARDS
    return EmptyBecause.LEASE


class SeatMeter:
    """Integrals since the start, in seconds of a whole engine's room.

    Example:
        >>> meter = SeatMeter()
        >>> meter.settle(wall_s=4.0, occupancy_s=0.0, cause=EmptyBecause.LEASE)     # four seconds without weights
        >>> meter.settle(wall_s=10.0, occupancy_s=5.0, cause=EmptyBecause.REWARDS)  # six with one seat in six empty
        >>> meter.empty_s[EmptyBecause.WEIGHTS], meter.empty_s[EmptyBecause.LEASE]
        (4.0, 1.0)
    """

    def __init__(self) -> None:
        self.empty_s = dict.fromkeys(EmptyBecause, 0.0)
        self._cause = EmptyBecause.WEIGHTS  # every server begins without
        self._settled_s = 0.0

    def settle(self, *, wall_s: float, occupancy_s: float, cause: EmptyBecause) -> None:
        """Give what was empty since the last call to the cause that held meanwhile; `cause` holds from now on.

        An engine may count its seats when a step ends: then more was taken than what had been settled within the step
        left over. What was counted stays counted, and nothing more is until as much was empty.
        """
        empty_s = wall_s - occupancy_s
        if empty_s > self._settled_s:
            self.empty_s[self._cause] += empty_s - self._settled_s
            self._settled_s = empty_s
        self._cause = cause
