"""How long a step of a regime should take: its trace through the shipped ledger and the scripted engine's clockwork.

An event simulation without processes, messages or costs of their own: leases, groups and batches are where they belong
in no time, and weights are live `live_s` after their step. Pure; a run of 215 steps takes about a second.
"""

from __future__ import annotations

import heapq
from collections import deque

from learner.ledger import Ledger
from learner.staleness import Bounds
from protocol.length_trace import LengthTrace
from protocol.messages import FinishReason
from protocol.versions import Version
from rollout_server.engines.base import GenerationRequest
from rollout_server.engines.scripted_batch import Outcome, ScriptedBatch, ScriptedJob
from tests.bench.regime_trace import PROMPTS_PER_STEP, WARM_UP_STEPS, Regime, Speeds
from tests.factories import make_lease, make_sampling

BATCHES_AHEAD = 2
"""One in the queue between batch_loop and train_loop, and one in the hands of batch_loop."""


class Model:
    """The state of one simulated run."""

    def __init__(self, regime: Regime, trace: LengthTrace, bounds: Bounds, live_s: float) -> None:
        speeds = Speeds.of(regime, trace)
        self._lengths, self._train_token_s, self._live_s = trace.lengths, speeds.train_token_s, live_s
        self._engine = ScriptedBatch(room=regime.seats, token_s=speeds.token_s, occupancy_cost=1.0, now=0.0)
        self._engine.load(Version(1, 0), 0.0, lambda live: None, 0.0)
        self._ledger = Ledger(bounds)
        self._batches: deque[list[int]] = deque()
        self._training: list[int] = []
        self._events: list[tuple[float, int]] = []
        """Heap of (when, policy_version to be live); the end of training is 0."""
        self.step_ends: list[float] = []

    def run(self, steps: int) -> None:
        """Train so many steps."""
        now = 0.0
        while len(self.step_ends) < steps:
            self._settle(now)
            engine_s = self._engine.next_event_s()
            now = min(
                time_s for time_s in (engine_s, self._events[0][0] if self._events else None) if time_s is not None
            )
            self._engine.advance(now)
            while self._events and self._events[0][0] <= now:
                self._happen(heapq.heappop(self._events)[1], now)

    def _settle(self, now: float) -> None:
        """Let everything happen that takes no time."""
        ledger = self._ledger
        while ledger.can_grant():
            ledger.grant()
        live = self._engine.live
        assert live is not None
        for entry in ledger.pending():
            if ledger.min_policy_version(entry.sequence) > live.policy_version:
                break
            ledger.dispatched(entry.sequence, "server", live.policy_version)
            self._engine.submit(self._job(entry.ordinal, live.policy_version), now)
        while len(self._batches) < BATCHES_AHEAD:
            selected = ledger.select()
            if len(selected) < PROMPTS_PER_STEP:
                break
            ledger.batch(selected)
            self._batches.append(selected)
        if not self._training and self._batches:
            self._training = self._batches.popleft()
            ledger.check_staleness(self._training)
            tokens = sum(int(self._lengths[ledger.entries[s].ordinal].sum()) for s in self._training)
            heapq.heappush(self._events, (now + tokens * self._train_token_s, 0))

    def _happen(self, live: int, now: float) -> None:
        if live:
            self._engine.load(Version(1, live), 0.0, lambda live: None, now)
            self._ledger.live(live)
            return
        version = self._ledger.policy_version + 1
        self._ledger.trained(self._training, version)
        self._training = []
        self.step_ends.append(now)
        heapq.heappush(self._events, (now + self._live_s, version))

    def _job(self, ordinal: int, oldest: int) -> ScriptedJob:
        lengths = self._lengths[ordinal].tolist()

        def reply(outcome: Outcome | None) -> None:
            versions = [version for spans, _ in (outcome or {}).values() for version, _ in spans]
            self._ledger.delivered(ordinal, min(version.policy_version for version in versions))

        request = GenerationRequest(
            group_id=str(ordinal), prompt_tokens=make_lease().prompt_tokens, num_generations=len(lengths),
            sampling=make_sampling(max_completion_length=max(lengths)), seed=ordinal,
        )  # fmt: skip
        return ScriptedJob(request, lengths, [FinishReason.STOP] * len(lengths), fails=False, reply=reply)


def predict_step_s(regime: Regime, trace: LengthTrace, bounds: Bounds, *, live_s: float, steps: int) -> float:
    """Seconds of a mean step, of those that are measured."""
    model = Model(regime, trace, bounds, live_s)
    model.run(WARM_UP_STEPS + steps)
    return (model.step_ends[-1] - model.step_ends[WARM_UP_STEPS - 1]) / steps
