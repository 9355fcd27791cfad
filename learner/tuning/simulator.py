"""A run under a virtual clock: the shipped scheduler, and everything it schedules played from costs and a length trace.

    forecast = simulate(workload, Dial(prompts_per_step=16, num_generations=16, max_staleness=4), steps=200)

What is real: ledger, buffer, fleet, coordinator, leasing, the rollover of weights, arrivals, and the loops that
receive, lease, accept, batch and train. What is played: engines, model, publishing, disk and network (played.py,
engine_model.py). The same arguments give the same forecast, to the last bit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from learner.arrivals import Arrivals
from learner.batch import Batch, StepResult
from learner.buffer import Buffer
from learner.config import LearnerConfig
from learner.coordinator import Coordinator
from learner.fleet import Fleet
from learner.leases import RunIdentity
from learner.ledger import Ledger
from learner.loops import accept_loop, batch_loop, lease_loop, receive_loop, train_loop
from learner.recorder import StepTimer
from learner.tuning.fitting import Fullness
from learner.tuning.forecast import Forecast, Step, reduce_steps
from learner.tuning.played import (
    INCARNATION,
    VOCAB_SIZE,
    Book,
    EveryRow,
    NoJournal,
    PatientWaits,
    PlayedCompute,
    PlayedListener,
    PlayedPublisher,
    PlayedServer,
    PlayedTrainer,
)
from learner.tuning.virtual_time import Deadlock, run_virtual
from learner.tuning.workload import Costs, Dial, Workload
from protocol.channel import Listener
from protocol.errors import ConfigError, HeadwayError
from protocol.messages import Group
from protocol.versions import Lineage, Version

if TYPE_CHECKING:
    from learner.compute import Compute
    from learner.prompts import Prompts
    from learner.publish import Publisher
    from learner.recorder import Recorder

FOREVER_S = 1e12
"""Of patience: nobody sends heartbeats, and nobody dies."""
MOST_SKIPPED = 1000
"""In a row, since all groups were filtered."""
WARMUP_STEPS = 15
"""Until a run is as far ahead as it may be."""


class SimulationStuck(HeadwayError, RuntimeError):
    """Nothing can happen any more, and steps are left: a deadlock of the scheduler. The text says where all are."""


def simulate(
    workload: Workload,
    dial: Dial,
    *,
    steps: int,
    warmup_steps: int = WARMUP_STEPS,
    each_step: Callable[[Simulation, Step], None] | None = None,
) -> Forecast:
    """Simulate warmup_steps + steps, and say what the last `steps` of them were like.

    Args:
        workload: who does what, and what it costs.
        dial: how far rollouts may run ahead.
        steps: to measure.
        warmup_steps: before them.
        each_step: called after every step, for what turns the dial in mid-run.

    Raises:
        ConfigError: the dial cannot progress.
        SimulationStuck: the scheduler deadlocked.
        StalenessViolation: the bound was broken.
    """
    return Simulation(workload, dial, steps=steps, warmup_steps=warmup_steps, each_step=each_step).run()


def fullness(workload: Workload, dial: Dial, *, steps: Collection[int]) -> Fullness:
    """Simulate a run's beginning, and say how full the seats were in those of its steps.

    Raises:
        ConfigError: the dial cannot progress.
        SimulationStuck: the scheduler deadlocked.
    """
    sums, before = np.zeros(5), np.zeros(5)

    def note(simulation: Simulation, step: Step) -> None:
        """Add what has come in since the step before."""
        nonlocal sums, before
        engines = [server.engine for server in simulation.advanced()]
        each = [(e.decode_steps, e.drawn, e.drawn_squared, e.seat_s, e.paused_seat_s) for e in engines]
        whole = np.sum(each, axis=0)
        if step.policy_version in steps:
            sums = sums + whole - before
        before = whole

    Simulation(workload, dial, steps=max(steps), warmup_steps=0, each_step=note).run()
    decode_steps, drawn, drawn_squared, seat_s, paused_seat_s = sums.tolist()
    if not drawn:
        raise ConfigError(f"nothing is sampled in steps {min(steps)} to {max(steps)} of such a run: record more steps")
    return Fullness(
        decoding_share=1 - paused_seat_s / seat_s,
        steps_per_token=decode_steps / drawn,
        mean_batch=drawn_squared / drawn,
    )


@dataclass(slots=True)
class _Mark:
    """Where the measured part begins."""

    at_s: float = 0.0
    seat_s: float = 0.0
    paused_s: float = 0.0


class Simulation:
    """One simulated run. Its parts exist while it runs: `each_step` may look at them and turn them."""

    coordinator: Coordinator
    servers: list[PlayedServer]

    def __init__(
        self,
        workload: Workload,
        dial: Dial,
        *,
        steps: int,
        warmup_steps: int,
        each_step: Callable[[Simulation, Step], None] | None,
    ) -> None:
        self.workload, self.dial = workload, dial
        self.bounds = dial.bounds
        self.steps: list[Step] = []
        self._num_steps, self._warmup_steps = steps, warmup_steps
        self._each_step = each_step
        self._book = Book(workload=workload, costs=self._costs(0))
        self._groups_by_server: Counter[str] = Counter()
        self._trained_tokens = 0
        self._full_seats_s = 0.0
        self._skipped_s = 0.0
        """Waits since the last step that trained."""
        self._mark = _Mark()

    def run(self) -> Forecast:
        """See `simulate`."""
        try:
            run_virtual(self._main())
        except Deadlock as error:
            raise SimulationStuck(self.describe()) from error
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        book, groups = self._book, len(self.steps) * self.dial.prompts_per_step
        return reduce_steps(
            self.steps[self._warmup_steps :],
            since_s=self._mark.at_s,
            seat_s=self._seat_s() - self._mark.seat_s,
            paused_s=self._paused_s() - self._mark.paused_s,
            seats=self.workload.servers * self.workload.room,
            servers=self.workload.servers,
            full_seats_s=self._full_seats_s,
            max_staleness=self.dial.max_staleness,
            unaccounted=self.coordinator.ledger.unaccounted,
            length_ratio=(self._trained_tokens / groups) / (book.leased_tokens / book.leased_groups),
            groups_by_server=[self._groups_by_server[server.name] for server in self.servers],
        )

    def describe(self) -> str:
        """Where everything is."""
        ledger = self.coordinator.ledger
        return (
            f"step {ledger.policy_version} of {self._warmup_steps + self._num_steps}: {ledger.counts()},"
            f" {ledger.slots_in_use} of {ledger.bounds.slots_total} slots in use; {self.bounds}"
        )

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        listener, buffer = PlayedListener(), Buffer()
        config = self._config()
        ledger = Ledger(self.bounds)
        lineage = Lineage([(INCARNATION, 0)])
        self.coordinator = coordinator = Coordinator(
            config=config,
            identity=RunIdentity(
                run_id="simulated", incarnation=INCARNATION, vocab_size=VOCAB_SIZE, model_digest="",
                tokenizer_digest="", stop_token_ids=(),
            ),
            lineage=lineage,
            channel=cast(Listener, listener),
            ledger=ledger,
            fleet=Fleet(lineage, liveness_s=FOREVER_S),
            prompts=cast("Prompts", None),  # all rows are in stock
            stock=EveryRow(),
            clock=loop.time,
        )  # fmt: skip
        journal, waits = NoJournal(), PatientWaits(loop.time)
        arrivals = Arrivals(coordinator, buffer, journal, self)
        arrivals.validate = lambda group, **terms: None  # it has come over no wire
        trainer = PlayedTrainer(self._book)
        publisher = PlayedPublisher(coordinator.weights.announce)
        batches: asyncio.Queue[Batch] = asyncio.Queue(maxsize=1)
        self.servers = [
            PlayedServer(f"server-{number}", self._book, listener) for number in range(self.workload.servers)
        ]
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(receive_loop(coordinator, arrivals)),
                tasks.create_task(lease_loop(coordinator, waits, tick_s=FOREVER_S)),
                tasks.create_task(accept_loop(arrivals, waits)),
                tasks.create_task(batch_loop(coordinator, buffer, batches, waits)),
            ]
            for server in self.servers:
                server.join()
            publisher.start(Version(INCARNATION, 0))
            await train_loop(
                batches, trainer, cast("Compute", PlayedCompute(trainer)), cast("Publisher", publisher), coordinator,
                journal, cast("Recorder", self), waits,
            )  # fmt: skip
            for task in loops:
                task.cancel()

    def _config(self) -> LearnerConfig:
        dial = self.dial
        return LearnerConfig(
            model="simulated", dataset="simulated", num_generations=dial.num_generations,
            prompts_per_step=dial.prompts_per_step, max_staleness=dial.max_staleness,
            reorder_window=dial.reorder_window, weight_sync_steps=dial.weight_sync_steps,
            max_steps=self._warmup_steps + self._num_steps, save_steps=self._warmup_steps + self._num_steps,
            filter_zero_std=self.workload.filtered_share > 0, max_skipped_steps=MOST_SKIPPED,
            buffer_bytes=1 << 62, heartbeat_s=FOREVER_S / 2, liveness_s=FOREVER_S,
        )  # fmt: skip

    # What the train loop asks of its recorder, and arrivals of their statistics.

    def step(self, batch: Batch, result: StepResult, timer: StepTimer, *, learning_rate: float) -> None:
        """Note a step; let the costs be those of its version."""
        waited_s = timer.timings["wait_s"] + timer.timings["wait_publish_s"] + self._skipped_s
        if not result.finite:  # every group was filtered
            self._skipped_s = waited_s
            return
        self._skipped_s = 0.0
        book, version, now_s = self._book, self.coordinator.ledger.policy_version, self.coordinator.clock()
        by_staleness: Counter[int] = Counter()
        for group in batch.groups:
            outcome = book.outcomes.pop(group.ordinal)
            self._groups_by_server[outcome.server] += 1
            for drawn_by, tokens in outcome.by_version.items():
                by_staleness[version - 1 - drawn_by] += tokens
        self._trained_tokens += result.loss_tokens
        step = Step(
            policy_version=version,
            ended_s=now_s,
            waited_s=waited_s,
            trained_s=timer.timings["forward_backward_s"],
            tokens=result.loss_tokens,
            staleness=tuple(batch.staleness),
            tokens_by_staleness=by_staleness,
        )
        self.steps.append(step)
        costs, room = book.costs, self.workload.room
        if version > self._warmup_steps:
            busy_s = result.loss_tokens * costs.full_seat_token_s(room) + len(batch.groups) * costs.prefill_s
            self._full_seats_s += busy_s / self.workload.servers
        elif version == self._warmup_steps:
            self.advanced()
            self._mark = _Mark(now_s, self._seat_s(), self._paused_s())
        if version == self._warmup_steps + self._num_steps:
            self.advanced()
        if (changed := self._costs(version)) != costs:
            book.costs = changed
            for server in self.servers:
                server.change_costs(changed)
        if self._each_step is not None:
            self._each_step(self, step)

    async def save(self, compute: object) -> None:
        """Nothing is kept."""

    def request_evaluation(self, policy_version: int) -> None:
        """Nothing is evaluated."""

    def record_filtered(self, group: Group) -> None:
        """Forget a group that will not train."""
        del self._book.outcomes[group.ordinal]

    def _costs(self, policy_version: int) -> Costs:
        costs_at = self.workload.costs_at
        return self.workload.costs if costs_at is None else costs_at(policy_version)

    def advanced(self) -> list[PlayedServer]:
        """The servers, brought to the present."""
        for server in self.servers:
            server.advance()
        return self.servers

    def _seat_s(self) -> float:
        return sum(server.engine.seat_s for server in self.servers)

    def _paused_s(self) -> float:
        return sum(server.engine.paused_s for server in self.servers)
