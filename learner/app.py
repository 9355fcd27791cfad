"""The learner process: builds the parts in order, runs one TaskGroup, ends in one place.

Start: run directory (lock) -> model (compute thread) -> prompts -> incarnation grown and on disk -> sockets -> loops.
What is refused is refused before the incarnation: until then nothing is written (rundir.py).
End: train_loop returns -> last version live, final evaluation -> Drain and Goodbye -> loops end -> sockets close.
Stopped by a signal: the step under way ends, a checkpoint is written, Goodbye; the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from learner.arrivals import Arrivals
from learner.buffer import Buffer
from learner.canaries import choose_canaries
from learner.checkpoint import Checkpoint, latest_checkpoint
from learner.compute import Compute
from learner.config import LearnerConfig
from learner.coordinator import NOTICES_KEPT, Coordinator
from learner.dashboard.terminal import Screen
from learner.deltas import DeltaChain
from learner.dropping import DroppingLedger
from learner.fleet import Fleet
from learner.journal import Journal
from learner.journal_records import IncarnationRecord
from learner.knobs.socket import knob_socket
from learner.leases import RunIdentity
from learner.ledger import Ledger
from learner.monitor import Monitor
from learner.opening import critic_notice, frozen_fingerprint, opening_line
from learner.prompts import PromptRow, Prompts, open_prompts, stop_token_ids
from learner.publish import Publisher
from learner.recorder import Recorder, StepTimer, eval_points
from learner.replay.resume import Replayed, train_again
from learner.resume import begin
from learner.reward_curve import plot_reward_curve
from learner.run import Run
from learner.rundir import RunDirectory
from learner.stats import RunStats
from learner.summary import print_summary, write_summary
from learner.trackers import JsonlTracker, SampleWriter
from learner.weights_archive.archive import PublishedRow, WeightsArchive
from protocol.addresses import is_local, parse_address, tcp_address
from protocol.channel import Listener, bulk_address, check_address, listen
from protocol.free_address import check_free
from protocol.logs import configure_logging
from protocol.loop_lag import LoopLag
from protocol.messages import Int32, WeightsLive
from protocol.security import PLAIN, Security, load_security
from protocol.tasks import on_signals, run_loop
from protocol.waits import Waits
from protocol.weights.serving import WeightsServer
from protocol.weights.staging import clean_staging, default_staging_directory

if TYPE_CHECKING:
    from learner.trainer import Trainer

log = logging.getLogger(__name__)

LEDGERS = {"wait": Ledger, "drop": DroppingLedger}
"""By staleness_policy."""


def run(
    config: LearnerConfig,
    make_trainer: Callable[..., Trainer] | None = None,
    *,
    keep_alive: Callable[[], None] | None = None,
) -> int:
    """Train to the end of the run, or until a signal; return the exit code.

    Args:
        config: complete and checked.
        make_trainer: called with (config, checkpoint=...) on the compute thread; by default the Trainer.
        keep_alive: called on the compute thread every few seconds; ends the run by what it raises.

    Raises:
        ConfigError: something in the configuration cannot work.
        RunStopped: the run ended itself, naming its last checkpoint.
    """
    security = load_security(
        key=config.key, allowed_keys=config.allowed_keys, insecure_plaintext=config.insecure_plaintext
    )
    check_address(config.bind, off_host=security.off_host)
    directory = RunDirectory.open(config)
    try:
        check_free(config.bind)  # after the lock: of two learners of one run that says more
        configure_logging("learner", stderr=False)  # a run that is refused before it has begun leaves no log
        with Screen() as screen:
            return run_loop(lambda: Learner(config, directory, screen, security, make_trainer, keep_alive).main())
    finally:
        if not directory.begun:
            configure_logging("learner")
        directory.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a run is about, before anything is opened."""

    trainer: Trainer
    prompts: Prompts
    eval_rows: Sequence[PromptRow | None]
    canary_tokens: Int32
    stop_token_ids: tuple[int, ...]
    checkpoint: Checkpoint | None
    incarnation: int
    replayed: Replayed | None
    """Steps of the journal that were trained again after the checkpoint."""


class Learner:
    """One process: its parts come to life in the order of the methods below."""

    def __init__(
        self,
        config: LearnerConfig,
        directory: RunDirectory,
        screen: Screen,
        security: Security = PLAIN,
        make_trainer: Callable[..., Trainer] | None = None,
        keep_alive: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.security = security
        self.notices: deque[str] = deque(maxlen=NOTICES_KEPT)
        self.directory = directory
        self.screen = screen
        self.make_trainer = make_trainer or load_trainer
        self.keep_alive = keep_alive
        self.waits = Waits()
        self.lag = LoopLag()
        self.compute = Compute()

    async def main(self) -> int:
        """Load, open, run, close."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.compute.close)
            loaded = await self._load()
            gc.freeze()  # what is loaded stays: a full collection of it would hold the loop for 100 ms (I9)
            channel = await stack.enter_async_context(listen(self.config.bind, self.security, tell=self.notices.append))
            server = stack.enter_context(WeightsServer(bulk_address(channel.address), self.security))
            journal = await asyncio.to_thread(Journal.open, self.directory.journal_dir)
            stack.push_async_callback(journal.close)
            async with asyncio.TaskGroup() as tasks:
                run = await self._build(loaded, channel, server, journal, tasks)
                run.knob_listener = self._open_knobs(stack)
                stack.push_async_callback(run.publisher.close)
                loops = run.start(tasks)
                with on_signals(run.interrupt, signal.SIGTERM, signal.SIGINT):
                    finished = await run.train(tasks)
                for loop in loops:
                    loop.cancel()
        return self._conclude(run, finished)

    async def _load(self) -> Loaded:
        """Model and data, checked against each other and against the run that is continued."""
        config, directory = self.config, self.directory
        checkpoint = await asyncio.to_thread(latest_checkpoint, directory.checkpoints_dir)
        self.screen.print_notice(opening_line(config, checkpoint))
        checkpoint_dir = checkpoint.path if checkpoint else None
        trainer = await self.compute(self.make_trainer, config, checkpoint=checkpoint_dir)
        replayed = await self._replay(trainer)
        directory.require_unfinished(trainer.policy_version, config.max_steps)
        if notice := critic_notice(config, checkpoint_dir):
            self.screen.print_notice(notice)
        prompts = open_prompts(config, trainer.tokenizer)
        eval_prompts = open_prompts(config, trainer.tokenizer, evaluation=True) if config.eval_dataset else None
        fingerprints = {"dataset": prompts.fingerprint, "tokenizer": trainer.tokenizer_digest}
        fingerprints |= await asyncio.to_thread(frozen_fingerprint, config, trainer, checkpoint_dir)
        if eval_prompts is not None:
            fingerprints["eval_dataset"] = eval_prompts.fingerprint
        directory.check_fingerprints(fingerprints)
        longest = config.max_prompt_length + config.max_completion_length
        return Loaded(
            trainer=trainer,
            prompts=prompts,
            eval_rows=await asyncio.to_thread(all_rows, eval_prompts) if eval_prompts else (),
            canary_tokens=await asyncio.to_thread(choose_canaries, prompts, max_length=longest),
            stop_token_ids=stop_token_ids(trainer.tokenizer, config.stop, trainer.eos_token_ids),
            checkpoint=checkpoint,
            incarnation=self._begin(),
            replayed=replayed,
        )

    async def _replay(self, trainer: Trainer) -> Replayed | None:
        """Train again what the journal holds after the checkpoint, where that is asked for."""
        if self.config.resume != "replay" or not self.directory.continued:
            return None
        replayed = await self.compute(train_again, trainer, self.config)
        self.screen.print_notice(replayed.describe(trainer.policy_version))
        return replayed

    def _begin(self) -> int:
        """Write the run down, now that nothing of it can be refused any more; return its incarnation."""
        check_free(self.config.bind)  # again: loading took long
        incarnation = self.directory.begin_incarnation()  # on disk before a socket opens: it fences off the dead
        configure_logging("learner", self.directory.logs_dir / "learner.log", stderr=False)
        return incarnation

    async def _build(
        self, loaded: Loaded, channel: Listener, server: WeightsServer, journal: Journal, tasks: asyncio.TaskGroup
    ) -> Run:
        """Put the parts together; nothing runs yet."""
        config, directory, trainer = self.config, self.directory, loaded.trainer
        ledger = LEDGERS[config.staleness_policy](
            config.granted_bounds, max_attempts=config.max_attempts, max_refill_ratio=config.max_refill_ratio
        )
        start = await asyncio.to_thread(
            begin, ledger, loaded.checkpoint, incarnation=loaded.incarnation, journal_dir=directory.journal_dir,
            replayed=loaded.replayed, too_long=lambda ordinal: loaded.prompts.row(ordinal) is None,
        )  # fmt: skip
        identity = RunIdentity(
            run_id=directory.run_id,
            incarnation=loaded.incarnation,
            vocab_size=trainer.vocab_size,
            model_digest=trainer.model_digest,
            tokenizer_digest=trainer.tokenizer_digest,
            stop_token_ids=loaded.stop_token_ids,
            lora_rank=trainer.adapter.r if trainer.adapter else 0,
        )
        coordinator = Coordinator(
            config=config,
            identity=identity,
            lineage=start.lineage,
            channel=channel,
            ledger=ledger,
            fleet=Fleet(start.lineage, liveness_s=config.liveness_s),
            prompts=loaded.prompts,
            eval_rows=loaded.eval_rows,
            canary_tokens=loaded.canary_tokens,
            notices=self.notices,
            rows=await asyncio.to_thread(rows_under_way, loaded.prompts, ledger),
            knob_history=start.knobs,
        )
        stats, buffer = RunStats(), Buffer()
        arrivals = Arrivals(coordinator, buffer, journal, stats)
        coordinator.tokens.journaled(start.digests)
        arrivals.restore(start.restored)
        archive = WeightsArchive(directory.weights_dir, config.keep_versions)
        coordinator.weights.live_reported = lambda server, live: live_reported(coordinator, archive, server, live)
        publisher = self._publisher(loaded.trainer, coordinator, server, archive, tasks)
        publisher.told = lambda row: note_publish(coordinator, row)
        recorder = make_recorder(directory, trainer, coordinator, journal, stats, self.lag, loaded.checkpoint)
        recorder.published = lambda: publisher.published
        for batch, result, learning_rate in loaded.replayed.unrecorded if loaded.replayed else ():
            groups = [group.group for group in batch.groups]
            for group in groups:
                coordinator.tokens.restored(group)
            coordinator.tokens.trained(groups, mask_truncated_completions=config.mask_truncated_completions)
            recorder.step(batch, result, StepTimer(coordinator.clock), learning_rate=learning_rate)
        monitor = Monitor(coordinator, recorder, buffer, self.waits, self.lag, self.compute, address=channel.address)
        recorder.step_done = lambda row: self.screen.print_step(monitor.view())
        beginning = IncarnationRecord(
            incarnation=loaded.incarnation, resumed_from=trainer.policy_version,
            replayed=loaded.replayed.steps if loaded.replayed else 0, config=config.model_dump_json(),
            numerics=trainer.numerics,
        )  # fmt: skip
        recorder.incarnations = (*start.incarnations, beginning)
        await journal.append(beginning)
        return Run(
            config=config, trainer=trainer, coordinator=coordinator, arrivals=arrivals, buffer=buffer, journal=journal,
            publisher=publisher, recorder=recorder, monitor=monitor, waits=self.waits, lag=self.lag,
            compute=self.compute, screen=self.screen, keep_alive=self.keep_alive,
        )  # fmt: skip

    def _publisher(
        self, trainer: Trainer, coordinator: Coordinator, server: WeightsServer, archive: WeightsArchive,
        tasks: asyncio.TaskGroup,
    ) -> Publisher:  # fmt: skip
        """Clean the staging directory of who has died, and make what publishes into it."""
        config = self.config
        staging = config.staging_dir or default_staging_directory()
        clean_staging(staging)
        return Publisher(
            trainer,
            server,
            DeltaChain(server, coordinator.weights.links, config.delta_weights, keep=config.keep_versions > 0),
            archive,
            directory=staging,
            algorithm="xxh3_128" if is_local(config.bind) else "blake3",
            bulk_address=announced_address(server.address),
            announce=coordinator.weights.announce,
            tasks=tasks,
            waits=self.waits,
        )

    def _open_knobs(self, stack: contextlib.AsyncExitStack) -> socket.socket | None:
        """Open the socket of the knob command; a run directory that can have none is no reason not to train."""
        try:
            return stack.enter_context(knob_socket(self.directory.path))
        except OSError as error:
            self.notices.append(f"no live knobs: {self.directory.path} can have no socket ({error.strerror})")
            return None

    def _conclude(self, run: Run, finished: bool) -> int:
        """Write what is left of the run."""
        summary = run.recorder.summary()
        if finished:
            write_summary(self.directory.summary_path, summary)
            plot_reward_curve(
                self.directory.metrics_path,
                self.directory.path / "reward.png",
                run.recorder.evals,
                max_staleness=self.config.max_staleness,
            )
            print_summary(summary)
            return 0
        self.screen.print_notice(
            f"stopped by {run.interrupted} at step {run.trainer.policy_version}; the same command goes on"
        )
        return 128 + signal.Signals[run.interrupted].value


def live_reported(coordinator: Coordinator, archive: WeightsArchive, server: str, live: WeightsLive) -> None:
    """A server serves a version: keep what that took."""
    archive.live(server, live)
    now_s, note = coordinator.clock(), f"transfer {live.transfer_s:.3g} s, check {live.check_s:.3g} s"
    coordinator.spans.add(server, "swaps", f"swap to {live.version}", now_s - live.pause_s, now_s, note)


def note_publish(coordinator: Coordinator, row: PublishedRow) -> None:
    """A version is ready to be served: draw what that took."""
    now_s, note = coordinator.clock(), f"{row.bytes} bytes"
    begun_s = now_s - row.snapshot_s - row.hash_s - row.delta_s
    coordinator.spans.add("learner", "publishes", f"publish {row.version}", begun_s, now_s, note)


def load_trainer(config: LearnerConfig, *, checkpoint: Path | None) -> Trainer:
    """Load the model. Only now is torch imported: what is wrong before this is said at once."""
    from learner.trainer import Trainer

    return Trainer(config, checkpoint=checkpoint)


def all_rows(prompts: Prompts) -> list[PromptRow | None]:
    """Every row of an evaluation data set."""
    return [prompts.row(index) for index in range(len(prompts))]


def rows_under_way(prompts: Prompts, ledger: Ledger) -> dict[int, PromptRow]:
    """The rows of what a checkpoint left under way: they are a pure function of the ordinal."""
    rows = {entry.ordinal: prompts.row(entry.ordinal) for entry in ledger.entries.values()}
    return {ordinal: row for ordinal, row in rows.items() if row is not None}


def announced_address(bound: str) -> str:
    """The bulk address as servers are told it: any other interface is the host that the server dialed."""
    transport, _, port = parse_address(bound)
    return bound if transport == "ipc" or is_local(bound) else tcp_address("*", port)


def make_recorder(
    directory: RunDirectory,
    trainer: Trainer,
    coordinator: Coordinator,
    journal: Journal,
    stats: RunStats,
    lag: LoopLag,
    checkpoint: Checkpoint | None,
) -> Recorder:
    """Open the run's files, cut back to where this incarnation begins."""
    tracker = JsonlTracker(directory.metrics_path)
    samples = SampleWriter(
        directory.samples_dir,
        coordinator.config.num_completions_logged,
        lambda ids: trainer.tokenizer.decode(ids.tolist()),
    )
    eval_tracker = JsonlTracker(directory.path / "evals.jsonl")
    tracker.truncate_after(trainer.policy_version)
    eval_tracker.truncate_after(trainer.policy_version)
    samples.truncate_after(trainer.policy_version)
    rows = tracker.rows()
    stats.resume(rows)
    if rows:
        coordinator.tokens.resume(rows[-1])
    return Recorder(
        run=directory,
        trainer=trainer,
        coordinator=coordinator,
        journal=journal,
        stats=stats,
        tracker=tracker,
        eval_tracker=eval_tracker,
        samples=samples,
        lag=lag,
        evals=eval_points(eval_tracker.rows()),
        checkpoint=checkpoint.path if checkpoint else None,
        published_before=int(checkpoint.state.counters.get("weights_published", 0)) if checkpoint else 0,
    )
