"""A whole run on a virtual clock: the shipped loops of both processes, scripted engines, a network that misbehaves.

What is real: every loop, ledger, fleet, coordinator, arrivals, recorder, checkpoints, journal format, resume, the
server's loops, lease book and weights' receiver, the scripted engine. What is played: the model, the bytes of the bulk
plane, threads (simulated.py), engines that die or hang (mortal.py) and sockets (protocol/testing.py). What the trainer
is given is judged here, from the groups themselves: no token too old (I4), none of a version that this history has not
seen, no prompt twice (I3).

The network delays and doubles messages, resets connections, and is cut for longer than liveness_s. It never loses
messages of a connection that lives on: TCP does not, and the protocol builds on that. All follows from the plan's seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.app import LEDGERS, make_recorder, rows_under_way
from learner.arrivals import Arrivals
from learner.batch import Batch
from learner.buffer import Buffer
from learner.canaries import choose_canaries
from learner.checkpoint import latest_checkpoint
from learner.config import LearnerConfig
from learner.coordinator import Coordinator
from learner.fleet import Fleet
from learner.journal_records import IncarnationRecord
from learner.knobs.core import Knob, Knobs
from learner.leases import RunIdentity
from learner.ledger import End, State
from learner.resume import begin
from learner.rollover import TURN_S
from learner.run import Run
from learner.rundir import RunDirectory
from learner.stats import RunStats
from learner.token_ledger import TokenEnd
from learner.tuning.virtual_time import run_virtual
from protocol.channel import Dialer
from protocol.completions import group_versions
from protocol.loop_lag import LoopLag
from protocol.testing import Faults, MemoryNetwork
from protocol.waits import Waits
from rollout_server.app import drain
from rollout_server.config import ScriptedOptions
from rollout_server.loops import Parts, control_loop, heartbeat_loop, report_loop
from rollout_server.scorers import ScriptedScorer
from tests.learners import FakePrompts
from tests.mortal import MortalEngine
from tests.simulated import (
    Killed,
    Life,
    Screen,
    SimCompute,
    SimJournal,
    SimListener,
    SimPublisher,
    SimReceiver,
    SimTrainer,
)

VOCAB_SIZE, STOP_TOKEN = 64, 1
LIVENESS_S = 5.0
PATIENCE_S = 3600.0
"""Virtual seconds that a run may take."""
FAULTS = Faults(delay_s=0.01, jitter_s=0.05, duplication=0.03)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated."""

    seed: int
    max_steps: int = 25
    servers: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    """Of the learner's configuration."""
    faults: Faults = FAULTS
    chaos: tuple[str, ...] = ()
    """Of `Simulation.CHAOS`: what happens every few seconds, by turns."""
    skip: float = 0.05
    """Probability of a step to be not finite."""
    fail: float = 0.02
    """Probability of a group to fail in the engine, and of a version to fail to load."""


@dataclass
class Served:
    """A server's process."""

    task: asyncio.Task[None]
    parts: Parts | None = None


class Simulation:
    """One run from its first learner to its last step."""

    CHAOS = (
        "cut", "reset", "kill server", "drain server", "kill engine", "stick swap", "turn knob", "kill learner",
        "stop learner",
    )  # fmt: skip

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan, self.directory = plan, directory
        self.dice = random.Random(plan.seed)
        self.network = MemoryNetwork(plan.seed, plan.faults)
        self.config = LearnerConfig(
            **{
                "model": "sim", "dataset": "sim", "eval_dataset": "sim", "output_dir": directory, "run_name": "sim",
                "num_generations": 4,
                "max_completion_length": 24, "prompts_per_step": 3, "max_staleness": 2, "max_steps": plan.max_steps,
                "save_steps": 3, "seed": plan.seed, "liveness_s": LIVENESS_S, "max_skipped_steps": 50,
                "num_completions_logged": 0, **plan.options,
            }
        )  # fmt: skip
        self.prompts = FakePrompts(too_long=range(5, 10_000, 17))
        self.servers: dict[str, Served] = {}
        self.witness: Counter[str] = Counter()
        self.trace: list[tuple[float, int, tuple[int, ...], int]] = []
        """(time, version before the step, ordinals, staleness) of every batch that was computed."""
        self.staleness_max = 0
        self.slots_before_drain = 0
        """In use when a knob was last turned or a learner began, or in use or allowed at the last step."""
        self.engines: list[MortalEngine] = []
        """Of all server processes there have been."""
        self.tokens: dict[int, int] = {}
        """ordinal -> tokens of its group, when it was last about to train."""
        self.drawn: dict[int, int] = {}
        """ordinal -> tokens of the group that the learner last wrote down, or restored."""
        self.run: Run | None = None
        self.finished = asyncio.Event()
        self._learner: asyncio.Task[bool] | None = None
        self._life = Life()
        self._next_server = 0
        self._cut: set[str] = set()

    async def main(self) -> None:
        """Run until max_steps are trained and everyone has gone."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.plan.servers):
                self.begin_server(tasks)
            chaos = tasks.create_task(self.chaos(tasks))
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.learners(tasks)
            except TimeoutError:
                raise AssertionError(self.describe()) from None
            chaos.cancel()
            self.finished.set()
            await asyncio.sleep(30.0)  # who heard the farewell ends; who was cut off then would wait for ever
            for served in self.servers.values():
                served.task.cancel()

    async def learners(self, tasks: asyncio.TaskGroup) -> None:
        """One learner after another, until one gets to the end."""
        while True:
            self._life = Life()
            self._learner = tasks.create_task(self.learner(self._life))
            await asyncio.wait([self._learner])
            if not self._learner.cancelled() and self._learner.result():
                return
            await asyncio.sleep(self.dice.uniform(0.2, 8.0))

    async def learner(self, life: Life) -> bool:
        """One incarnation, put together as app.py does. True when it got to the end."""
        directory = RunDirectory.open(self.config)
        listener = SimListener(self.network, life)
        journal = None
        try:
            checkpoint = latest_checkpoint(directory.checkpoints_dir)
            incarnation = directory.begin_incarnation()
            ledger = LEDGERS[self.config.staleness_policy](
                self.config.granted_bounds, max_attempts=self.config.max_attempts
            )
            start = begin(ledger, checkpoint, incarnation=incarnation, journal_dir=directory.journal_dir)
            journal = listener.journal = SimJournal(directory.journal_dir, life, self.dice)
            self.drawn |= {o: group.group.completion_tokens.size for o, group in start.restored.items()}
            journal.drawn = self.drawn
            trainer = SimTrainer(self.judge, checkpoint.path if checkpoint else None, self.spoil_step)
            coordinator = Coordinator(
                config=self.config,
                identity=RunIdentity(
                    run_id=directory.run_id, incarnation=incarnation, vocab_size=VOCAB_SIZE, model_digest="",
                    tokenizer_digest="", stop_token_ids=(STOP_TOKEN,),
                ),
                lineage=start.lineage,
                channel=listener,
                ledger=ledger,
                fleet=Fleet(start.lineage, liveness_s=LIVENESS_S),
                prompts=self.prompts,
                eval_rows=[self.prompts.row(ordinal) for ordinal in range(6 if self.config.eval_steps else 0)],
                canary_tokens=choose_canaries(self.prompts, max_length=3),  # type: ignore[arg-type]
                rows=rows_under_way(self.prompts, ledger),
                knob_history=start.knobs,
                clock=asyncio.get_running_loop().time,
            )  # type: ignore[arg-type]  # fmt: skip
            self.slots_before_drain = ledger.slots_in_use
            if start.knobs:
                assert ledger.depth == coordinator.knobs.depth == Knobs(coordinator.knobs.ranges, start.knobs).depth
                self.witness["knobs kept"] += 1
            rollover = coordinator.weights.rollover
            rollover.expire = functools.partial(self.count_expired, rollover.expire)  # type: ignore[method-assign]
            stats, buffer, lag = RunStats(), Buffer(), LoopLag()
            arrivals = Arrivals(coordinator, buffer, journal, stats)
            coordinator.tokens.journaled(start.digests)
            arrivals.restore(start.restored)
            self.witness["groups restored"] += coordinator.counters["groups_restored"]
            recorder = make_recorder(directory, trainer, coordinator, journal, stats, lag, checkpoint)  # type: ignore[arg-type]
            await journal.append(
                IncarnationRecord(incarnation=incarnation, resumed_from=checkpoint.policy_version if checkpoint else 0)
            )
            try:
                async with asyncio.TaskGroup() as tasks:
                    screen = Screen()
                    run = self.run = Run(
                        config=self.config, trainer=trainer, coordinator=coordinator, arrivals=arrivals, buffer=buffer,
                        journal=journal, publisher=SimPublisher(coordinator.weights.announce, tasks, self.dice),
                        recorder=recorder, monitor=screen, waits=Waits(asyncio.get_running_loop().time), lag=lag,
                        compute=SimCompute(life, self.dice), screen=screen,
                    )  # type: ignore[arg-type]  # fmt: skip
                    loops = run.start(tasks)
                    finished = await run.train(tasks)
                    for loop in loops:
                        loop.cancel()
            except* Killed:
                finished = False
            if not life.over:
                self.check_accounts(run, trainer)
            return finished
        finally:
            life.over = True
            await listener.close()
            if journal is not None:
                self.witness["segments pruned"] += journal.pruned
                self.witness["acks"] += listener.acks
                journal.close()
            directory.close()

    def judge(self, trainer: SimTrainer, batch: Batch) -> None:
        """What is about to train, against what the groups themselves say."""
        assert self.run is not None
        coordinator = self.run.coordinator
        assert trainer is self.run.trainer
        for group in batch.groups:
            assert group.ordinal not in trainer.trained, f"I3: {group.ordinal} is trained twice in one lineage"
            versions = group_versions(group.group)
            assert all(version in coordinator.lineage for version in versions), "tokens of orphaned weights"
            staleness = trainer.policy_version - min(version.policy_version for version in versions)
            assert 0 <= staleness <= self.config.max_staleness, f"I4: staleness {staleness}"
            assert max(version.policy_version for version in versions) <= trainer.policy_version, "I5"
            self.staleness_max = max(self.staleness_max, staleness)
            self.tokens[group.ordinal] = int(group.group.completion_lengths.sum())
        self.judge_tokens(coordinator)
        ledger = coordinator.ledger
        assert ledger.slots_in_use <= ledger.bounds.slots_total, "I1"
        assert ledger.slots_in_use <= max(ledger.slots_allowed, self.slots_before_drain), "a lower depth drains first"
        if self.config.staleness_control == "auto":  # who turned the knob since then, after a step, cannot be asked
            self.slots_before_drain = max(ledger.slots_in_use, ledger.slots_allowed)
        assert trainer.peak_learning_rate == coordinator.knobs.learning_rate
        self.witness["steps at a lower depth"] += ledger.depth < ledger.bounds.steps_ahead
        assert ledger.unaccounted == 0, "I3"
        # A lone server that is heard but hears nothing looks healthy, for minutes: a fault that goes on is no stall.
        lone = self.plan.servers == 1 and "cut" in self.plan.chaos
        assert lone or coordinator.counters["stalls"] == 0, f"I8: {self.describe()}"
        now_s = asyncio.get_running_loop().time()
        ordinals = tuple(group.ordinal for group in batch.groups)
        self.trace.append((now_s, trainer.policy_version, ordinals, max(batch.staleness, default=0)))

    def judge_tokens(self, coordinator: Coordinator) -> None:
        """Every token once: no more than the engines have sampled, no less than they have said."""
        tokens = coordinator.tokens
        assert tokens.generated == sum(tokens.ends.values()) + tokens.under_way
        assert tokens.under_way >= 0
        assert all(count >= 0 for count in tokens.ends.values())
        assert tokens.generated <= sum(engine.status().tokens_generated for engine in self.engines), "counted twice"
        if coordinator.idle.arriving == 0:
            assert self.run is not None
            taken_in = (State.BUFFERED, State.BATCHED)
            here = sum(self.drawn[e.ordinal] for e in coordinator.ledger.entries.values() if e.state in taken_in)
            queued = sum(a.group.completion_tokens.size for a in self.run.arrivals.queue._queue if a.counts)
            held = sum(server.held for server in tokens._servers.values())
            assert tokens.under_way - held == here + queued, "an end was not told, or told twice"
        if not self.learners_ended:
            statuses = [server.status for server in coordinator.fleet.servers.values() if server.status is not None]
            assert tokens.generated >= sum(status.tokens_generated for status in statuses), "forgotten"

    @property
    def learners_ended(self) -> int:
        """Learners that did not get to the end."""
        return self.witness["kill learner"] + self.witness["stop learner"]

    def spoil_step(self) -> bool:
        """Whether this step's loss is not finite."""
        return self.dice.random() < self.plan.skip

    def check_accounts(self, run: Run, trainer: SimTrainer) -> None:
        """I3 over all that happened in this lineage."""
        ledger = run.coordinator.ledger
        assert ledger.unaccounted == 0
        assert ledger.ends[End.TRAINED] == len(trainer.trained)
        self.judge_tokens(run.coordinator)
        ends = run.coordinator.tokens.ends
        assert ends[TokenEnd.TRAINED] == sum(self.tokens[ordinal] for ordinal in trainer.trained)
        too_long = sum(self.prompts.row(ordinal) is None for ordinal in range(ledger.cursor))
        assert (ends[TokenEnd.FILTERED] > 0) == (ledger.ends[End.FILTERED] > too_long)
        assert (ends[TokenEnd.EVAL] > 0) == bool(self.config.eval_steps)
        for end, count in ends.items():
            self.witness[f"tokens {end}"] += count
        assert set(trainer.trained) <= set(range(ledger.cursor))
        assert not any(self.prompts.row(ordinal) is None for ordinal in trainer.trained)
        assert run.coordinator.counters["groups_refused"] == 0, "an honest server's group was refused"
        assert run.coordinator.counters["malformed"] == 0
        assert run.coordinator.counters["groups_overflowed"] == 0

    def begin_server(self, tasks: asyncio.TaskGroup, name: str = "") -> None:
        """Start a server's process, a new one or one of an earlier name."""
        if not name:
            name, self._next_server = f"server-{self._next_server}", self._next_server + 1
        served = Served(tasks.create_task(self.server(name), name=name))
        self.servers[name] = served

    async def server(self, name: str) -> None:
        """One server's process, put together as its app.py does."""
        dice = random.Random(f"{self.plan.seed} {name} {self.dice.random()}")
        options = ScriptedOptions(
            seed=self.plan.seed, vocab_size=VOCAB_SIZE, mean_length=8.0, length_sigma=0.8,
            token_s=dice.choice((0.02, 0.04, 0.12)), swap_s=0.05, fail_probability=self.plan.fail,
            fail_load_probability=self.plan.fail,
        )  # fmt: skip
        dialer: Dialer
        waits = Waits(asyncio.get_running_loop().time)
        async with (
            MortalEngine(options, dice.choice((4, 8, 16)), canaries=dice.random() < 0.5) as engine,
            self.network.dialer(name) as dialer,
            contextlib.AsyncExitStack() as stack,
        ):
            self.engines.append(engine)
            receiver = SimReceiver(engine, waits, dice, self.directory / "staging")
            stack.callback(self.server_gone, engine, receiver)
            async with asyncio.TaskGroup() as tasks:
                parts = Parts(
                    name=name, address="memory", dialer=dialer, engine=engine, scorer=ScriptedScorer(),
                    reward_weights=(1.0,), decode=str, weights=receiver, tasks=tasks, waits=waits,
                    lag=LoopLag(), clock=waits.clock, started_s=waits.clock(),
                )  # type: ignore[arg-type]  # fmt: skip
                self.servers[name].parts = parts
                loops = [
                    tasks.create_task(loop)
                    for loop in (
                        control_loop(parts),
                        report_loop(parts),
                        heartbeat_loop(parts),
                        receiver.loop(),
                        receiver.engine_loop(),
                    )
                ]
                await parts.stop.wait()
                await drain(parts, 3.0)
                await asyncio.sleep(1.0)  # the Goodbye leaves
                for task in loops:
                    task.cancel()

    def server_gone(self, engine: MortalEngine, receiver: SimReceiver) -> None:
        """Witness what its engine has gone through."""
        receiver._stage.discard()
        self.witness["versions checked"] += engine.checked
        self.witness["engines restarted"] += engine.restarted

    async def chaos(self, tasks: asyncio.TaskGroup) -> None:
        """Something goes wrong every few seconds."""
        while self.plan.chaos:
            what = self.dice.choice(self.plan.chaos)
            # A learner killed again before it has saved anything new gets nowhere; servers may go at any time.
            await asyncio.sleep(self.dice.uniform(2.0, 30.0 if what.endswith("learner") else 8.0))
            alive = sorted(name for name, served in self.servers.items() if not served.task.done())
            if what.endswith("learner"):
                await self.end_learner(what)
            elif alive:
                tasks.create_task(self.disturb(what, self.dice.choice(alive), tasks))

    async def end_learner(self, what: str) -> None:
        """kill -9, or a signal; `learners` begins the next one."""
        if self._learner is None or self._learner.done() or self.run is None or self._life.over:
            return
        if what == "stop learner":
            with contextlib.suppress(KeyboardInterrupt):
                self.run.interrupt("SIGTERM")
        else:
            self._life.over = True
            self._learner.cancel()
        self.witness[what] += 1

    async def disturb(self, what: str, name: str, tasks: asyncio.TaskGroup) -> None:
        """Take a server away for a while."""
        served = self.servers[name]
        if what == "cut" and name in self._cut:
            return  # the end of one cut must not end another: each lasts long enough to be noticed
        if what == "turn knob" and not await self.turn_knob():
            return
        if what in ("kill engine", "stick swap") and not self.disturb_engine(what, served):
            return
        self.witness[what] += 1
        if what == "cut":
            self._cut.add(name)
            to_listener, to_dialer = self.dice.choice(((True, True), (True, False), (False, True)))
            self.network.cut(name, to_listener=to_listener, to_dialer=to_dialer)
            await asyncio.sleep(self.dice.uniform(LIVENESS_S + 3.0, 15.0))
            self.network.heal(name)
            self._cut.discard(name)
        elif what == "reset":
            self.network.reset(name)
        elif what == "kill server":
            served.task.cancel()
            await asyncio.sleep(self.dice.uniform(0.1, 8.0))
            if not self.finished.is_set():
                self.begin_server(tasks, name)
        elif what == "drain server" and served.parts is not None:
            served.parts.end("SIGTERM")
            await asyncio.sleep(self.dice.uniform(0.1, 8.0))
            if not self.finished.is_set():
                self.begin_server(tasks)

    async def turn_knob(self) -> bool:
        """Turn one after another to what it is not, of all that it may be; False where no learner is there to do it."""
        if self.run is None or self._life.over:
            return False
        run, knobs = self.run, self.run.coordinator.knobs
        knob = list(Knob)[self.witness["turn knob"] % len(Knob)]
        allowed = knobs.ranges[knob]
        value: float = self.dice.uniform(1e-6, 1e-3)
        if knob is Knob.DEPTH:
            depths = range(int(allowed.lowest), int(allowed.highest) + 1)
            value = self.dice.choice([depth for depth in depths if depth != knobs.depth] or [knobs.depth])
        elif knob is Knob.CONCURRENCY:
            value = self.dice.choice((0, int(allowed.lowest), int(allowed.lowest) + 3))
        try:
            await run.knob_desk.turn(knob, value, who="user", reason="chaos")
        except Killed:
            return False
        self.slots_before_drain = run.coordinator.ledger.slots_in_use
        return True

    def disturb_engine(self, what: str, served: Served) -> bool:
        """Let an engine die, or hang in its next swap; False where that cannot happen now."""
        if served.parts is None:
            return False
        engines = [s.parts.engine for s in self.servers.values() if s.parts is not None and not s.task.done()]
        engine = served.parts.engine
        assert isinstance(engine, MortalEngine)
        if what == "kill engine":
            if engine.live is None:
                return False
            engine.die(self.dice.uniform(0.0, 6.0), withhold=self.dice.random() < 0.5)
        elif any(isinstance(other, MortalEngine) and (other.stuck_s or other.is_stuck) for other in engines):
            return False  # when all hang, one after another, none is left that could go on (I8)
        else:
            engine.stuck_s = self.dice.uniform(TURN_S + 3.0, TURN_S + 15.0)
        return True

    def count_expired(self, expire: Callable[[float], list[bytes]], now_s: float) -> list[bytes]:
        """Take back turns as the shipped rollover does, and witness it."""
        late = expire(now_s)
        self.witness["turns expired"] += len(late)
        return late

    def describe(self) -> str:
        """Where everything is, for a run that hangs."""
        assert self.run is not None
        coordinator = self.run.coordinator
        lines = [
            f"{asyncio.get_running_loop().time():.0f} s: {coordinator.ledger.counts()} {dict(coordinator.counters)}",
            f"policy_version {coordinator.ledger.policy_version}, {coordinator.ledger.slots_in_use} slots in use",
            *(f"waits {wait.name} ({wait.owner}) since {wait.started_s:.0f}" for wait in self.run.waits.current()),
            *(repr(entry) for entry in coordinator.ledger.entries.values()),
            *(f"{s.name}: live {s.live}, holds {s.outstanding}" for s in coordinator.fleet.servers.values()),
            *(
                f"{name}: {served.task.done()=} live {served.parts and served.parts.engine.live}"
                f" {served.parts and served.parts.book.in_flight.keys()}"
                f" {served.parts and served.parts.book.unacked.keys()}"
                for name, served in self.servers.items()
            ),
            *coordinator.notices,
        ]
        return "\n".join(lines)


def simulate(plan: Plan, directory: Path) -> Simulation:
    """Simulate a run to its end."""

    async def main() -> Simulation:
        simulation = Simulation(plan, directory)
        await simulation.main()
        return simulation

    return run_virtual(main())
