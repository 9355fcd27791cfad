"""Where idle.py's questions meet the learner's parts: reads them at every change, and keeps the integrals.

Belongs to the coordinator, runs on the event loop, never waits. `lease_loop` wakes at every change anyway and asks
then; the train loop says when it waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from learner.fleet import Health
from learner.idle import IdleTime, LearnerWaits, NotLeased, Situation, why_learner_waits, why_not_leased
from learner.ledger import State

if TYPE_CHECKING:
    from learner.coordinator import Coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleSeconds:
    """Of one interval, by cause."""

    learner: Mapping[LearnerWaits, float]
    """Seconds in which the train loop waited."""
    leasing: Mapping[NotLeased, float]
    """Seconds in which nothing more was leased: together, all of the interval."""


class IdleWatch:
    """See the module's text. Counts from the first lease on, as the run's wall time does."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        now_s = coordinator.clock()
        self._learner = IdleTime[LearnerWaits](now_s)
        self._leasing = IdleTime[NotLeased](now_s)
        self._waits_for: Literal["batch", "publish"] | None = None
        self.arriving = 0
        """Groups that are here and not on disk yet; kept by arrivals.py."""

    def observe(self) -> None:
        """Something may have changed: ask again."""
        coordinator = self._coordinator
        if coordinator.first_lease_s is None:
            return
        now_s = coordinator.clock()
        self._leasing.switch(self._why_not_leased(), now_s)
        if self._waits_for == "batch":
            self._learner.switch(why_learner_waits(self.situation()), now_s)
        else:
            self._learner.switch(LearnerWaits.PUBLISH if self._waits_for else None, now_s)

    @contextlib.contextmanager
    def waiting(self, what: Literal["batch", "publish"]) -> Iterator[None]:
        """The train loop waits for that, inside."""
        self._waits_for = what
        self.observe()
        try:
            yield
        finally:
            self._waits_for = None
            self.observe()

    def take(self) -> IdleSeconds:
        """Return the integrals since the last call."""
        now_s = self._coordinator.clock()
        return IdleSeconds(learner=self._learner.take(now_s), leasing=self._leasing.take(now_s))

    def situation(self) -> Situation:
        """What decides why the train loop waits. Looks at every group and server: asked only while it does."""
        coordinator = self._coordinator
        ledger, fleet, evaluation, now_s = (
            coordinator.ledger, coordinator.fleet, coordinator.evaluation, coordinator.clock(),
        )  # fmt: skip
        health = {peer: fleet.health(server, now_s) for peer, server in fleet.servers.items()}
        healthy = [fleet.servers[peer] for peer, state in health.items() if state is Health.HEALTHY]
        return Situation(
            prompts_per_step=ledger.bounds.prompts_per_step,
            servers=sum(state in (Health.HEALTHY, Health.JOINING) for state in health.values()),
            healthy=len(healthy),
            seats=sum(server.hello.room for server in healthy),
            seats_taken=sum(server.status.samples_running for server in healthy if server.status is not None),
            free_slots=ledger.can_grant(),
            rows_ready=ledger.cursor in coordinator.stock,
            unplaced=coordinator.unplaced is not None,
            admissible=self._admissible,
            arriving=self.arriving,
            buffered=sum(entry.state is State.BUFFERED for entry in ledger.entries.values()),
            filtered=ledger.filtered_since_batch,
            evaluating=evaluation is not None,
            pinned=self._pinned,
        )

    @property
    def _admissible(self) -> bool:
        """Whether no server's weights are awaited for the oldest group without a server."""
        entry, servers = self._coordinator.unplaced, self._coordinator.fleet.servers.values()
        if entry is None:
            return True
        if self._coordinator.swap_awaited:
            return False
        newest = max((server.live.policy_version for server in servers if server.live is not None), default=-1)
        return newest >= self._coordinator.ledger.min_policy_version(entry.sequence)

    @property
    def _pinned(self) -> bool:
        evaluation = self._coordinator.evaluation
        return evaluation is not None and evaluation.pinned

    def _why_not_leased(self) -> NotLeased:
        coordinator = self._coordinator
        return why_not_leased(
            training=coordinator.training, unplaced=coordinator.unplaced is not None, admissible=self._admissible,
            pinned=self._pinned, free_slots=coordinator.ledger.can_grant(),
        )  # fmt: skip
