"""A run under way: its loops, its course from the first version to the last, and how a signal stops it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from learner.arrivals import Arrivals
from learner.batch import Batch
from learner.buffer import Buffer
from learner.compute import Compute
from learner.config import LearnerConfig
from learner.coordinator import Coordinator
from learner.dashboard.terminal import Screen, screen_loop
from learner.journal import Journal
from learner.knobs.desk import KnobDesk, knob_loop
from learner.loops import (
    accept_loop,
    batch_loop,
    evaluate_loop,
    lease_loop,
    measure_canaries,
    receive_loop,
    stock_loop,
    train_loop,
)
from learner.monitor import Monitor
from learner.publish import Publisher
from learner.ranks.keep_alive import keep_alive_loop
from learner.recorder import Recorder
from learner.spans import spans_loop
from learner.tuning.steering import steer_loop
from protocol.logs import event
from protocol.loop_lag import LoopLag, loop_lag_gauge
from protocol.messages import Drain, Goodbye
from protocol.versions import Version
from protocol.waits import Waits

if TYPE_CHECKING:
    from learner.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """Parts built by app.py, owned by its TaskGroup."""

    config: LearnerConfig
    trainer: Trainer
    coordinator: Coordinator
    arrivals: Arrivals
    buffer: Buffer
    journal: Journal
    publisher: Publisher
    recorder: Recorder
    monitor: Monitor
    waits: Waits
    lag: LoopLag
    compute: Compute
    screen: Screen
    keep_alive: Callable[[], None] | None = None
    """For other ranks."""
    knob_listener: socket.socket | None = None
    """None: the file system of the run directory has no sockets."""
    batches: asyncio.Queue[Batch] = field(default_factory=lambda: asyncio.Queue(maxsize=1))
    interrupted: str = ""
    knob_desk: KnobDesk = field(init=False)
    _training: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        """Set what a knob reaches to what it was turned to."""
        self.knob_desk = KnobDesk(self.coordinator, self.trainer, self.journal)

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start every loop but the one that ends."""
        loops = {
            "receive_loop": receive_loop(self.coordinator, self.arrivals),
            "lease_loop": lease_loop(self.coordinator, self.waits, tick_s=self.config.heartbeat_s),
            "stock_loop": stock_loop(self.coordinator, self.waits),
            "accept_loop": accept_loop(self.arrivals, self.waits),
            "batch_loop": batch_loop(self.coordinator, self.buffer, self.batches, self.waits),
            "evaluate_loop": evaluate_loop(
                self.recorder.requests, self.coordinator, self.publisher, self.recorder, self.waits
            ),
            "record_loop": self.recorder.record_loop(self.waits),
            "screen_loop": screen_loop(self.monitor.view, self.screen),
            "loop_lag": loop_lag_gauge(self.lag),
            "spans_loop": spans_loop(
                self.coordinator.spans,
                self.waits,
                self.recorder.run.path,
                self.coordinator.identity.incarnation,
                self.coordinator.clock,
            ),
        }
        if self.knob_listener is not None:
            loops["knob_loop"] = knob_loop(self.knob_listener, self.knob_desk)
        if self.config.staleness_control == "auto":
            loops["steer_loop"] = steer_loop(self.recorder, self.coordinator, self.knob_desk, self.waits)
        if self.keep_alive is not None:
            loops["keep_alive_loop"] = keep_alive_loop(self.keep_alive, self.compute)
        return [tasks.create_task(loop, name=name) for name, loop in loops.items()]

    async def train(self, tasks: asyncio.TaskGroup) -> bool:
        """From the first version to Goodbye. False when a signal cut it short."""
        first = self.trainer.policy_version
        canaries = await measure_canaries(self.coordinator, self.trainer, self.compute, always=True)
        self.publisher.start(Version(self.coordinator.identity.incarnation, first), canaries)
        evaluating = bool(self.coordinator.eval_rows)
        if evaluating and not self.recorder.evals and first == 0:
            self.recorder.requests.put_nowait((first, True))
        self._training = tasks.create_task(self._steps(), name="train_loop")
        try:
            await asyncio.shield(self._training)
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
            await self._pause()
            return False
        self.coordinator.stop_training()
        self.monitor.phase = "finishing"
        if evaluating:
            self.recorder.requests.put_nowait((self.trainer.policy_version, True))
            last = self.recorder.requests.join()
            await self.waits.wait(last, name="last evaluation", owner="rollout servers", deadline_s=None)
        self._farewell(Drain(reason=f"all {self.config.max_steps} steps are trained"))
        return True

    def interrupt(self, name: str) -> None:
        """First signal: stop at the step boundary and save. Second, or when nothing is being trained: at once."""
        if self.interrupted or self._training is None or self._training.done():
            raise KeyboardInterrupt
        self.interrupted = name
        event(log, "interrupted", signal=name)
        self._training.cancel()

    async def _steps(self) -> None:
        await train_loop(
            self.batches, self.trainer, self.compute, self.publisher, self.coordinator, self.journal, self.recorder,
            self.waits,
        )  # fmt: skip

    async def _pause(self) -> None:
        """Save what is trained; servers wait for the next incarnation."""
        self.recorder.write_rows()
        if self.recorder.last_row is not None:
            await self.recorder.save(self.compute)
        self._farewell(Goodbye(reason=f"the learner was stopped by {self.interrupted}; it may come back"))

    def _farewell(self, message: Drain | Goodbye) -> None:
        for server in list(self.coordinator.fleet.servers.values()):
            self.coordinator.send(server, message)
