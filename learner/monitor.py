"""Assembles what the screen shows from the learner's parts. Reads only."""

from __future__ import annotations

import dataclasses
import math

from learner.buffer import Buffer
from learner.compute import Compute
from learner.coordinator import Coordinator
from learner.dashboard.view import RunView, StepView
from learner.ledger import State
from learner.recorder import Recorder
from learner.spans import ORDINARY
from protocol.loop_lag import LoopLag
from protocol.waits import Waits


class Monitor:
    """Makes a RunView of this moment."""

    def __init__(
        self,
        coordinator: Coordinator,
        recorder: Recorder,
        buffer: Buffer,
        waits: Waits,
        lag: LoopLag,
        compute: Compute,
        *,
        address: str,
    ) -> None:
        self._coordinator = coordinator
        self._recorder = recorder
        self._buffer = buffer
        self._waits = waits
        self._lag = lag
        self._compute = compute
        self._address = address
        self._started_s = coordinator.clock()
        self._served_s = self._started_s
        self._rollout = (math.nan, math.nan)
        self.phase = "starting"
        """Once the first lease is out: training."""

    def view(self) -> RunView:
        """Return everything the screen shows."""
        coordinator, recorder = self._coordinator, self._recorder
        config, ledger, now_s = coordinator.config, coordinator.ledger, coordinator.clock()
        if coordinator.fleet.servers:
            self._served_s = now_s
        if self.phase == "starting" and coordinator.first_lease_s is not None:
            self.phase = "training"
        steps = config.max_steps - ledger.policy_version
        return RunView(
            run_name=config.name,
            address=self._address,
            total_steps=config.max_steps,
            max_staleness=config.max_staleness,
            slots_total=ledger.bounds.slots_total,
            now_s=now_s,
            elapsed_s=now_s - self._started_s,
            phase=self.phase,
            activity=self._compute.busy_with,
            last=self._last_step(),
            rewards=recorder.stats.rewards,
            evals=recorder.evals,
            eta_s=recorder.stats.eta_s(config.max_steps) if steps else math.nan,
            slots_in_use=ledger.slots_in_use,
            in_flight=ledger.counts()[State.LEASED],
            buffered=len(self._buffer),
            servers=recorder.server_views(),
            serverless_s=now_s - self._served_s,
            waits=[wait for wait in self._waits.current() if wait.name not in ORDINARY],
            notices=list(coordinator.notices),
            loop_lag_ms=self._lag.p99_ms(),
        )

    def _last_step(self) -> StepView:
        """The last step; where it was too short for a server to report, with what they reported before."""
        if self._recorder.last_row is None:
            return StepView()
        last = StepView.of(self._recorder.last_row)
        if not math.isnan(last.rollout_busy):
            self._rollout = (last.rollout_busy, last.rollout_tokens_per_s)
        busy, tokens_per_s = self._rollout
        return dataclasses.replace(last, rollout_busy=busy, rollout_tokens_per_s=tokens_per_s)
