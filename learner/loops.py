"""The learner's loops, in the order in which a group passes through them.

    receive_loop --> arrivals.queue --> accept_loop --> buffer --> batch_loop --> batches --> train_loop --> publisher
         ^                                  |                                                     |              |
         |                               journal                                               journal    WeightsReady
      servers <----- leases ----- lease_loop <---- slots free ---- WeightsLive <--------- servers <--------------'
                                                         (WeightsStaged, WeightsSwap: one after another)

Each loop says what it consumes, what it waits for, what unblocks it and what it produces. They share one event loop
and never wait for each other but through the three places named above: the queue of arrivals, the buffer, and a queue
of one batch. train_loop is the only finite one: its return ends the run. Clock, channel and trainer are passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

from learner.arrivals import Arrivals
from learner.batch import Batch, StepResult
from learner.buffer import Buffer
from learner.canaries import Canaries
from learner.compute import Compute
from learner.coordinator import Coordinator
from learner.evaluation import Evaluation
from learner.fleet import Server
from learner.journal_records import Record, StepRecord
from learner.leasing import missing_rows, pump
from learner.prompts import PromptRow, Prompts
from learner.publish import Publisher
from learner.recorder import Recorder, StepTimer
from learner.relay_plan import reachable
from learner.token_ledger import TokenEnd
from protocol.errors import ProtocolError, RunStopped, VersionMismatch
from protocol.logs import event
from protocol.messages import (
    AnyMessage,
    Drain,
    Fault,
    Float32,
    Goodbye,
    Group,
    Hello,
    Int32,
    Ping,
    Pong,
    Refused,
    Return,
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsStaged,
)
from protocol.tasks import finish
from protocol.versions import PROTOCOL_VERSION, Version
from protocol.waits import Waits, WaitTimeout

log = logging.getLogger(__name__)


class TrainerLike(Protocol):
    """What train_loop needs of the trainer. Called on the compute thread only."""

    policy_version: int
    peak_learning_rate: float

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""

    def forward_backward(self, batch: Batch) -> StepResult:
        """Gradients of a batch; dropped when the result is not finite."""

    def optimizer_step(self) -> int:
        """Apply them and return the new policy_version."""

    @property
    def step_metrics(self) -> dict[str, float]:
        """Of all updates of the step that optimizer_step has just made."""

    def canary_logprobs(self, tokens: Int32) -> Float32:
        """Logprobs [N, L - 1] of tokens[:, 1:] under the weights as they are, tokens being [N, L]."""


class StepJournal(Protocol):
    """What train_loop needs of the journal."""

    async def append(self, *records: Record) -> None:
        """Return when the records are on disk."""


async def receive_loop(coordinator: Coordinator, arrivals: Arrivals) -> None:
    """Hear every server.

    consumes: messages      waits for: the servers      unblocked by: any message
    produces: arrivals, servers that joined or left, free slots, Pongs
    """
    while True:
        peer, message = await coordinator.channel.recv()
        if isinstance(message, ProtocolError):
            refuse(coordinator, peer, message)
            continue
        if isinstance(message, Hello):
            address = reachable(message.relay_address, coordinator.channel.sender_host)
            coordinator.hello(peer, msgspec.structs.replace(message, relay_address=address))
            continue
        server = coordinator.fleet.heard(peer, coordinator.clock())
        if server is None:  # of a connection this process has never welcomed, or has given up
            reason = "say Hello first: this learner does not know the connection"
            coordinator.reply(peer, Refused(code="hello_required", reason=reason))
        elif isinstance(message, Group):
            arrivals.receive(peer, message)
        else:
            handle(coordinator, server, message)


def handle(coordinator: Coordinator, server: Server, message: AnyMessage) -> None:
    """Act on one message of a welcomed server."""
    match message:
        case Ping():
            coordinator.reported(server, message.status)
            coordinator.send(server, Pong(sent_s=message.sent_s))
        case Return():
            if message.group_id in server.outstanding:  # else it is no longer, or never was, this server's to return
                if not (message.fault or server.draining):
                    server.live = None  # it does not serve what we thought: no lease until it reports a version
                coordinator.lost(message.group_id, fault=message.fault, reason=message.reason)
        case WeightsLive() if coordinator.is_unborn(message.version):
            refuse(coordinator, server.peer, ProtocolError(f"live at {message.version}, which was never published"))
        case WeightsStaged() | WeightsLive():
            coordinator.weights.handle(server, message)
        case WeightsFailed() | WeightsLost():
            coordinator.weights.handle(server, message)
            coordinator.changed.notify()  # its seats may have been waited for
        case Drain():
            server.draining = True
            coordinator.changed.notify()
        case Goodbye():
            coordinator.drop_server(server, message.reason, fault=False)
        case Fault():
            text = f"{server.name}: {message.reason}"
            coordinator.notice("server_fault", text, server=server.name, code=message.code)
        case _:
            refuse(coordinator, server.peer, ProtocolError(f"{type(message).__name__} is not for a learner"))


def refuse(coordinator: Coordinator, peer: bytes, error: ProtocolError) -> None:
    """Count and show what is no message; the process lives on. A wrong protocol version is answered with ours."""
    coordinator.counters["malformed"] += 1
    server = coordinator.fleet.servers.get(peer)
    name = server.name if server else "an unknown peer"
    coordinator.notice("malformed", f"refused a message of {name}: {error}", server=name)
    if isinstance(error, VersionMismatch):
        reason = f"{error}; the learner speaks {PROTOCOL_VERSION}: update the older side"
        coordinator.reply(peer, Refused(code="protocol_version", reason=reason))


async def lease_loop(coordinator: Coordinator, waits: Waits, *, tick_s: float) -> None:
    """Give out what may be leased; declare silent servers dead; say when nothing moves.

    consumes: free slots, room      waits for: a change, or the next tick      unblocked by: coordinator.changed
    produces: leases

    Raises:
        RunStopped: no server for server_wait_s seconds.
    """
    tick_at_s = coordinator.clock()
    while True:
        if coordinator.clock() >= tick_at_s:
            coordinator.tick(waits.current())
            tick_at_s = coordinator.clock() + tick_s
        pump(coordinator)
        coordinator.idle.observe()
        left_s = max(0.0, tick_at_s - coordinator.clock())
        with contextlib.suppress(WaitTimeout):
            await waits.wait(coordinator.changed.wait(), name="change", owner="lease_loop", deadline_s=left_s)


async def stock_loop(coordinator: Coordinator, waits: Waits) -> None:
    """Make the next rows ready, on a thread: tokenizing is no work for the event loop (I9).

    consumes: the data set      waits for: grants      unblocked by: coordinator.changed
    produces: rows in stock
    """
    while True:
        missing = missing_rows(coordinator)
        if not missing:
            await waits.wait(coordinator.changed.wait(), name="change", owner="lease_loop", deadline_s=None)
            continue
        make = asyncio.to_thread(make_rows, coordinator.prompts, missing)
        coordinator.stock |= await waits.wait(make, name="prompts", owner="data set", deadline_s=None)
        coordinator.changed.notify()


def make_rows(prompts: Prompts, ordinals: Sequence[int]) -> dict[int, PromptRow | None]:
    """Rows by ordinal; None where a prompt is too long."""
    return {ordinal: prompts.row(ordinal) for ordinal in ordinals}


async def accept_loop(arrivals: Arrivals, waits: Waits) -> None:
    """Journal, acknowledge and buffer what arrived.

    consumes: arrivals      waits for: groups, the disk      unblocked by: receive_loop
    produces: Acks, buffered groups
    """
    while True:
        await waits.wait(arrivals.accept_next(), name="arrivals", owner="rollout servers", deadline_s=None)


async def batch_loop(coordinator: Coordinator, buffer: Buffer, batches: asyncio.Queue[Batch], waits: Waits) -> None:
    """Form one batch after another, inside the reorder window.

    consumes: buffered groups      waits for: the oldest ones      unblocked by: coordinator.changed
    produces: batches, one ahead of training; an empty one when everything was filtered
    """
    ledger = coordinator.ledger
    while True:
        enough = len(buffer) >= ledger.bounds.prompts_per_step or ledger.refill_exhausted
        selected = ledger.select() if enough else []
        full = len(selected) == ledger.bounds.prompts_per_step
        short = ledger.refill_exhausted and (not selected or ledger.may_train_short(selected))
        if not (full or short):
            await waits.wait(coordinator.changed.wait(), name="groups", owner="rollout servers", deadline_s=None)
            continue
        ledger.batch(selected)
        batch = Batch(step=ledger.policy_version + ledger.batches_formed, groups=buffer.take(selected))
        for expired in buffer.take(coordinator.drop_expired()):
            coordinator.tokens.ended(expired.group, TokenEnd.STALE)
        await waits.wait(batches.put(batch), name="batch place", owner="train_loop", deadline_s=None)


async def evaluate_loop(
    requests: asyncio.Queue[tuple[int, bool]],
    coordinator: Coordinator,
    publisher: Publisher,
    recorder: Recorder,
    waits: Waits,
) -> None:
    """Evaluate what was asked for, one pass at a time.

    consumes: (policy_version, pinned)      waits for: the groups of its leases      unblocked by: coordinator.changed
    produces: evaluation results
    """
    while True:
        policy_version, pinned = await requests.get()
        if pinned:
            publisher.hold(policy_version)
        evaluation = Evaluation(
            policy_version=policy_version,
            pinned=pinned,
            num_rows=len(coordinator.eval_rows),
            max_attempts=coordinator.config.max_attempts,
        )
        coordinator.evaluation = evaluation
        coordinator.changed.notify()
        while not evaluation.done:
            await waits.wait(coordinator.changed.wait(), name="evaluation", owner="rollout servers", deadline_s=None)
        coordinator.evaluation = None
        if pinned:
            publisher.release()
        recorder.evaluated(evaluation)
        requests.task_done()


async def train_loop(
    batches: asyncio.Queue[Batch],
    trainer: TrainerLike,
    compute: Compute,
    publisher: Publisher,
    coordinator: Coordinator,
    journal: StepJournal,
    recorder: Recorder,
    waits: Waits,
) -> None:
    """Train until max_steps. The only finite loop: its return ends the run.

    consumes: one Batch      waits for: batch_loop            unblocked by: batches.put
    produces: version v + 1  waits for: the previous publish  unblocked by: publisher

    Raises:
        RunStopped: max_skipped_steps steps in a row could not be trained.
        StalenessViolation: I4 would be broken.
    """
    config, ledger = coordinator.config, coordinator.ledger
    skipped = 0
    while trainer.policy_version < config.max_steps:
        timer = StepTimer(coordinator.clock)
        with timer.measure("wait_s"), coordinator.idle.waiting("batch"):
            batch = await waits.wait(batches.get(), name="batch", owner="rollout servers", deadline_s=None)
        batch = dataclasses.replace(batch, step=trainer.policy_version + 1)
        sequences = [group.sequence for group in batch.groups]
        ledger.check_staleness(sequences)  # I4: raises, never trains stale
        with timer.measure("forward_backward_s"):
            result = await compute(trainer.forward_backward, batch) if batch.groups else NOTHING_LEFT
        if not result.finite:
            coordinator.skipped(batch, result.reason)  # I2: its slots are free at once
            recorder.step(batch, result, timer, learning_rate=trainer.learning_rate)
            skipped += 1
            if skipped == config.max_skipped_steps:
                raise RunStopped(why_stopped(skipped, result.reason, recorder))
            continue
        skipped = 0
        with timer.measure("wait_publish_s"), coordinator.idle.waiting("publish"):
            await publisher.wait_previous()  # the old snapshot must be complete before the weights change
        applied = asyncio.ensure_future(
            apply_step(batch, result, trainer, compute, coordinator, journal, publisher, recorder, timer)
        )
        await finish(applied)  # a step is applied whole, even when the run is being stopped
        if trainer.policy_version % config.save_steps == 0 or trainer.policy_version == config.max_steps:
            await finish(asyncio.ensure_future(recorder.save(compute)))
        recorder.request_evaluation(trainer.policy_version)


NOTHING_LEFT = StepResult(finite=False, reason="every group was filtered (no reward differences left to learn from)")


async def apply_step(
    batch: Batch,
    result: StepResult,
    trainer: TrainerLike,
    compute: Compute,
    coordinator: Coordinator,
    journal: StepJournal,
    publisher: Publisher,
    recorder: Recorder,
    timer: StepTimer,
) -> None:
    """Journal the step, change the weights, count the groups as trained, publish, note it: together or not at all."""
    incarnation = coordinator.identity.incarnation
    async with coordinator.step_boundary:  # no knob is turned between what is journaled and what is applied
        learning_rate = trainer.learning_rate
        with timer.measure("journal_s"):
            await journal.append(
                StepRecord(
                    incarnation=incarnation,
                    step=batch.step,
                    ordinals=tuple(group.ordinal for group in batch.groups),
                    learning_rate=learning_rate,
                    num_micro_batches=int(result.metrics.get("num_micro_batches", 1)),
                ),
                *coordinator.take_unjournaled(),
            )
        with timer.measure("optimizer_s"):
            policy_version = await compute(trainer.optimizer_step)
    result = dataclasses.replace(result, metrics=trainer.step_metrics)
    coordinator.trained(batch, policy_version)
    last = policy_version == coordinator.config.max_steps
    if policy_version % coordinator.config.weight_sync_steps == 0 or last:
        with timer.measure("canaries_s"):
            canaries = await measure_canaries(coordinator, trainer, compute)
        publisher.start(Version(incarnation, policy_version), canaries)
    recorder.step(batch, result, timer, learning_rate=learning_rate)
    event(log, "trained", step=policy_version, staleness=max(batch.staleness), tokens=result.loss_tokens)


async def measure_canaries(
    coordinator: Coordinator, trainer: TrainerLike, compute: Compute, *, always: bool = False
) -> Canaries | None:
    """Compute what the weights say of the canaries, where an engine will ask. None: none will.

    `always` is for a run's first version, before any server is there: one that joins later should find some.
    """
    tokens = coordinator.canary_tokens
    asked = always or any(server.hello.canaries for server in coordinator.fleet.servers.values())
    if tokens is None or not asked:
        return None
    return Canaries(tokens=tokens, logprobs=await compute(trainer.canary_logprobs, tokens))


def why_stopped(skipped: int, reason: str, recorder: Recorder) -> str:
    """What to tell the user when no step can be trained."""
    good = recorder.checkpoint
    return (
        f"{skipped} steps in a row could not be trained, the last one because: {reason}. The last good checkpoint is"
        f" {good or 'none: no step has been saved yet'}. A task that is solved, hopeless or mis-scored gives"
        " groups whose rewards are all equal; a non-finite loss asks for a lower learning_rate"
    )
