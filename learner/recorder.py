"""What a run leaves behind: metrics, samples, evaluation results, checkpoints, summary. Called by train_loop.

    train_loop --step--> notes --record_loop, save--> metrics.jsonl, samples/, screen, depth controller

Everything on disk here can be read while the run goes on and after it; nothing here decides anything. What a step was
like is noted when it is made; it is worked out and written down once its weights are live, for servers wait for those.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from learner.batch import Batch, StepResult
from learner.batch_metrics import Row
from learner.checkpoint import CheckpointState, save_checkpoint
from learner.compute import Compute
from learner.coordinator import Coordinator
from learner.evaluation import Evaluation
from learner.fleet import Server
from learner.idle_watch import IdleSeconds
from learner.journal_records import IncarnationRecord
from learner.ledger import LedgerSnapshot
from learner.rundir import RunDirectory
from learner.stats import EvalPoint, RunStats, ServerView
from learner.summary import Summary, summarize
from learner.token_ledger import TokenEnd, costs
from learner.trackers import JsonlTracker, SampleWriter
from protocol.logs import event
from protocol.loop_lag import LoopLag
from protocol.messages import Group
from protocol.waits import Waits, WaitTimeout

log = logging.getLogger(__name__)


class StepTimer:
    """Seconds of the stages of one iteration of the train loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        self.stages: list[tuple[str, float, float]] = []
        """(stage, begun, ended), in order."""
        self.timings = dict.fromkeys(
            ("wait_s", "forward_backward_s", "wait_publish_s", "optimizer_s", "canaries_s", "journal_s"), 0.0
        )

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        begun_s = self._clock()
        try:
            yield
        finally:
            ended_s = self._clock()
            self.timings[stage] += ended_s - begun_s
            self.stages.append((stage, begun_s, ended_s))

    @property
    def elapsed_s(self) -> float:
        """Since the iteration began."""
        return self._clock() - self._started_s


RECORD_S = 1.0
"""A row waits no longer for the weights of its step to be live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNote:
    """A step, with what only its own moment knew."""

    batch: Batch
    result: StepResult
    filtered: Sequence[Group]
    """Since the step before."""
    policy_version: int
    """After it."""
    learning_rate: float
    timer: StepTimer
    step_time_s: float
    wall_s: float
    idle: IdleSeconds
    servers: list[ServerView]
    counts: Mapping[str, int]
    trained: int
    """Tokens so far."""
    generated: int
    """Tokens so far."""
    others: Row
    """Columns of the token ledger and of the knobs."""


class Saver(Protocol):
    """What a checkpoint needs of the trainer."""

    policy_version: int

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` will write, about."""

    def save(self, directory: Path) -> None:
        """Write model, optimizer and random state into an empty directory."""


class PrunableJournal(Protocol):
    """What a checkpoint does to the journal."""

    async def prune(self, finished: Callable[[int], bool]) -> list[Path]:
        """Delete segments that no resumable checkpoint needs."""


@dataclass(kw_only=True)
class Recorder:
    """See the module's text. One per learner, on the event loop."""

    run: RunDirectory
    trainer: Saver
    coordinator: Coordinator
    journal: PrunableJournal
    stats: RunStats
    tracker: JsonlTracker
    eval_tracker: JsonlTracker
    samples: SampleWriter
    lag: LoopLag
    step_done: Callable[[Row], None] = lambda row: None
    """Told of every row (the screen's plain line)."""
    steered: asyncio.Queue[Row] | None = None
    """Where the rows go that a depth controller reads."""
    requests: asyncio.Queue[tuple[int, bool]] = field(default_factory=asyncio.Queue)
    """Evaluations to make: (policy_version, pinned)."""
    evals: list[EvalPoint] = field(default_factory=list)
    checkpoint: Path | None = None
    """The last good one."""
    published: Callable[[], int] = lambda: 0
    """Versions published by this process."""
    published_before: int = 0
    """By the processes that this run continues."""
    incarnations: tuple[IncarnationRecord, ...] = ()
    """The beginnings of the lineage's learners, this one's last."""
    last_row: Row | None = None
    _saved: deque[LedgerSnapshot] = field(default_factory=deque)
    _notes: deque[StepNote] = field(default_factory=deque)
    """Of steps that have no row yet."""
    _noted: asyncio.Event = field(default_factory=asyncio.Event)
    _refused: OSError | None = None

    def __post_init__(self) -> None:
        """What servers did before the first lease is not this run's."""
        self.coordinator.begun = lambda: self.stats.begin(self.server_views())

    def step(self, batch: Batch, result: StepResult, timer: StepTimer, *, learning_rate: float) -> None:
        """Note one step, trained or skipped: `write_rows` makes a row of it."""
        coordinator = self.coordinator
        ledger, now_s = coordinator.ledger, coordinator.clock()
        first_s = coordinator.first_lease_s if coordinator.first_lease_s is not None else now_s
        note = StepNote(
            batch=batch,
            result=result,
            filtered=self.stats.take_filtered(),
            policy_version=ledger.policy_version,
            learning_rate=learning_rate,
            timer=timer,
            step_time_s=timer.elapsed_s,
            wall_s=now_s - first_s,
            idle=coordinator.idle.take(),
            servers=self.server_views(),
            counts={
                **ledger.counts(),
                "unaccounted": ledger.unaccounted,
                "slots_in_use": ledger.slots_in_use,
                "slots_total": ledger.bounds.slots_total,
                **coordinator.counters,
            },
            trained=coordinator.tokens.ends[TokenEnd.TRAINED],
            generated=coordinator.tokens.generated,
            others={**coordinator.tokens.metrics(), **coordinator.knobs.metrics()},
        )
        self._notes.append(note)
        self._noted.set()

    async def record_loop(self, waits: Waits) -> None:
        """Write down each step once its weights are live.

        consumes: notes             waits for: a step; its weights, RECORD_S at most
        produces: rows, samples     unblocked by: train_loop; the first server that is live
        """
        try:
            while True:
                await waits.wait(self._noted.wait(), name="step", owner="train_loop", deadline_s=None)
                with contextlib.suppress(WaitTimeout):
                    live = self._live(self.trainer.policy_version)
                    await waits.wait(live, name="weights live", owner="rollout servers", deadline_s=RECORD_S)
                self.write_rows()
        except asyncio.CancelledError:
            self.write_rows()
            raise

    async def _live(self, policy_version: int) -> None:
        while policy_version in self.coordinator.weights.made_s:
            await self.coordinator.changed.wait()

    def write_rows(self) -> None:
        """Write down every step noted so far.

        Raises:
            OSError: the disk refused, now or before: behind a gap, or a torn line, nothing is written any more.
        """
        if self._refused is not None:
            raise self._refused
        self._noted.clear()
        try:
            while self._notes:
                self._write(self._notes.popleft())
        except OSError as error:
            self._refused = error
            raise

    def _write(self, note: StepNote) -> None:
        coordinator, batch = self.coordinator, note.batch
        row = self.stats.record_step(
            batch,
            note.result,
            filtered=note.filtered,
            policy_version=note.policy_version,
            learning_rate=note.learning_rate,
            timings=note.timer.timings,
            idle=note.idle,
            step_time_s=note.step_time_s,
            servers=note.servers,
            counts=note.counts,
            wall_s=note.wall_s,
        )
        for stage, begun_s, ended_s in note.timer.stages:
            lane = "waits" if stage.startswith("wait") else "steps"
            coordinator.spans.add("learner", lane, stage.removesuffix("_s"), begun_s, ended_s, f"step {batch.step}")
        row |= coordinator.weights.metrics() | note.others
        totals = self.stats.totals()
        row |= costs(note.trained, note.generated, learner_s=totals.wall_s, servers_s=totals.servers_s)
        row["loop_lag_ms"] = self.lag.p99_ms()
        self.tracker.log(row)
        if note.result.finite:
            self.samples.write(batch, advantages=note.result.advantages or None)
        self.last_row = row
        self.step_done(row)
        if self.steered is not None and not self.steered.full():
            self.steered.put_nowait(row)

    async def save(self, compute: Compute) -> None:
        """Write a checkpoint of this moment; then the journal may forget what none of the kept ones needs."""
        self.write_rows()  # a run that goes on from here has a row of every step before
        config, ledger = self.coordinator.config, self.coordinator.ledger
        snapshot = ledger.snapshot()
        state = CheckpointState(
            run_id=self.run.run_id,
            incarnation=self.coordinator.identity.incarnation,
            forks=tuple(self.coordinator.lineage.forks),
            policy_version=self.trainer.policy_version,
            config_fingerprint=self.run.config_fingerprint,
            ledger=snapshot,
            counters={"weights_published": self.weights_published},
            knobs=tuple(self.coordinator.knobs.history),
            incarnations=self.incarnations,
        )
        begun_s = self.coordinator.clock()
        self.checkpoint = await compute(
            save_checkpoint,
            self.run.checkpoints_dir,
            self.trainer.policy_version,
            self.trainer.save,
            state,
            keep=config.save_total_limit,
            estimate_bytes=self.trainer.checkpoint_bytes,
        )
        self.coordinator.spans.add("learner", "steps", "checkpoint", begun_s, self.coordinator.clock())
        event(log, "saved", checkpoint=self.checkpoint, seconds=self.coordinator.clock() - begun_s)
        self._saved.append(snapshot)
        if len(self._saved) >= config.save_total_limit:
            oldest = self._saved.popleft()
            needed = {ordinal for ordinal, *_ in oldest["entries"]}
            cursor = oldest["cursor"]
            await self.journal.prune(lambda ordinal: ordinal < cursor and ordinal not in needed)

    def request_evaluation(self, policy_version: int) -> None:
        """Ask for an evaluation when one is due and none is going on; the last one is app.py's."""
        config = self.coordinator.config
        due = config.eval_steps and policy_version % config.eval_steps == 0 and policy_version < config.max_steps
        if due and self.coordinator.eval_rows:
            if self.coordinator.evaluation is None and self.requests.empty():
                self.requests.put_nowait((policy_version, False))
            else:
                event(log, "evaluation_left_out", policy_version=policy_version, reason="the previous one is going on")

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep a result."""
        point = evaluation.result()
        self.evals.append(point)
        self.eval_tracker.log(dict(eval_row(point)))
        event(
            log, "evaluated", version=point.label, reward=point.reward, rows=evaluation.num_rows,
            failed=evaluation.failed,
        )  # fmt: skip

    def server_views(self) -> list[ServerView]:
        """What is known of each server now."""
        fleet, now_s = self.coordinator.fleet, self.coordinator.clock()
        return [server_view(server, fleet.health(server, now_s), now_s) for server in fleet.servers.values()]

    @property
    def weights_published(self) -> int:
        """Versions published in the lineage of this run, over all restarts."""
        return self.published_before + self.published()

    def summary(self) -> Summary:
        """The run in one object."""
        config, ledger = self.coordinator.config, self.coordinator.ledger
        return summarize(
            self.stats.totals(),
            task=config.dataset,
            model=config.model,
            max_staleness=config.max_staleness,
            counts={**ledger.counts(), "unaccounted": ledger.unaccounted},
            evals=self.evals,
            weights_published=self.weights_published,
            tokens=self.coordinator.tokens,
            checkpoint=self.checkpoint or Path(),
        )


def server_view(server: Server, health: str, now_s: float) -> ServerView:
    """Reduce a fleet entry to what is shown."""
    return ServerView(
        name=server.name,
        state=str(health),
        policy_version=server.live.policy_version if server.live else None,
        samples_running=server.status.samples_running if server.status else 0,
        room=server.hello.room,
        status=server.status,
        connected_s=now_s - server.joined_s,
    )


def eval_row(point: EvalPoint) -> dict[str, Any]:
    """An evaluation result as evals.jsonl keeps it."""
    return {"step": point.step, "reward": point.reward, "oldest": point.oldest, "newest": point.newest}


def eval_points(rows: Sequence[Mapping[str, Any]]) -> list[EvalPoint]:
    """Read them back."""
    return [EvalPoint(**row) for row in rows]
