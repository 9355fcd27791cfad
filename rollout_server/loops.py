"""The server's loops. They meet in the LeaseBook and in the connection; each says what it waits for.

    control_loop --Lease--> one group_task each --Group--> learner --Ack--> control_loop
         '---WeightsReady, WeightsSwap--> WeightsReceiver.loop --reports--> report_loop --WeightsLive--> learner

Each lease is one task, owned by the process's TaskGroup. A failure of generation or scoring is data (Return, or a
reward status); an exception out of here is a bug and ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.channel import Dialer
from protocol.completions import Completion
from protocol.errors import MalformedMessage, PeerSilent, ProtocolError, VersionMismatch
from protocol.errors import Refused as RefusedError
from protocol.identity import session_name
from protocol.logs import event
from protocol.loop_lag import LoopLag
from protocol.messages import (
    Ack,
    Cancel,
    Drain,
    Fault,
    Goodbye,
    Group,
    Hello,
    Lease,
    Ping,
    Pong,
    Refused,
    Return,
    WeightsLive,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
    Welcome,
)
from protocol.parts import split_group
from protocol.waits import Reminders, Waits, WaitTimeout
from rollout_server.engines.base import Engine, EngineFailure, GenerationRequest, SamplesWithheld
from rollout_server.groups import build_group, reward_call
from rollout_server.leases import LeaseBook, why_cut
from rollout_server.reporting import going_on, make_status, settle_seats
from rollout_server.rewards.base import Scores
from rollout_server.scorers import Scorer
from rollout_server.seats import SeatMeter
from rollout_server.weights import WeightsReceiver

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Parts:
    """What the loops share; built and owned by app.py."""

    name: str
    address: str
    dialer: Dialer
    engine: Engine
    scorer: Scorer
    reward_weights: Sequence[float]
    decode: Callable[[Sequence[int]], str]
    weights: WeightsReceiver
    tasks: asyncio.TaskGroup
    waits: Waits
    lag: LoopLag
    book: LeaseBook = field(default_factory=LeaseBook)
    started_s: float = field(default_factory=time.monotonic)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_reason: str = ""
    welcome: Welcome = field(default_factory=lambda: Welcome(session="", run_id="", incarnation=0))
    malformed: int = 0
    reward_timeouts: int = 0
    reward_errors: int = 0
    clock: Callable[[], float] = time.monotonic
    """Seconds, as `started_s`."""
    seats: SeatMeter = field(default_factory=SeatMeter)
    scoring: dict[Lease, int] = field(default_factory=dict)
    """Tokens of groups that are sampled and not scored yet, by the lease that the work began with."""
    reminders: Reminders = field(default_factory=Reminders)
    connections: int = 0
    told_of_cuts: bool = False
    """Whether this learner knows that completions are cut here."""
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """Names this process, whatever it is called."""

    def next_session(self) -> str:
        """Name the next connection."""
        self.connections += 1
        return session_name(self.token, self.connections)

    def end(self, reason: str) -> None:
        """Ask the process to drain and end."""
        self.stop_reason = self.stop_reason or reason
        self.stop.set()


async def control_loop(parts: Parts) -> None:
    """Do what the learner says.

    consumes: its messages      waits for: the learner      unblocked by: any message, or its silence
    produces: group tasks, announcements of weights, forgotten groups
    """
    await connect(parts)
    while True:
        try:
            received = parts.dialer.recv(silence_s=parts.welcome.liveness_s)
            message = await parts.waits.wait(received, name="message", owner="learner", deadline_s=None)
        except PeerSilent as silence:
            event(log, "learner_lost", level=logging.WARNING, address=parts.address, reason=silence)
            parts.dialer.reconnect()
            await connect(parts)
            continue
        if isinstance(message, Refused) and message.code == "hello_required":
            event(log, "learner_restarted", address=parts.address)
            parts.dialer.reconnect()
            await connect(parts)
        else:
            handle(parts, message)


async def connect(parts: Parts) -> None:
    """Say Hello until welcomed; what the learner no longer wants is dropped, what is finished is sent again.

    Raises:
        Refused: this server does not fit the learner's run.
    """
    event(log, "waiting_for_learner", address=parts.address)
    while True:
        hello = make_hello(parts)
        parts.dialer.send(hello)
        answered = wait_welcome(parts, hello.session)
        limit_s = parts.welcome.liveness_s
        with contextlib.suppress(WaitTimeout, PeerSilent):
            welcome = await parts.waits.wait(answered, name="welcome", owner="learner", deadline_s=limit_s)
            if welcome is not None:
                welcomed(parts, welcome)
                return
        parts.dialer.reconnect()


async def wait_welcome(parts: Parts, session: str) -> Welcome | None:
    """Wait for the answer to a Hello. None: it was lost with its learner, and another has taken that one's place.

    Raises:
        PeerSilent: the connection broke.
        Refused: this server does not fit the learner's run.
    """
    while True:
        match await parts.dialer.recv():
            case Welcome(session=answered) as welcome if answered == session:
                return welcome
            case Refused(code="hello_required"):
                return None
            case Refused() as answer:
                refused(parts, answer)
            case VersionMismatch() as mismatch:
                raise RefusedError(
                    f"the learner at {parts.address} and this server do not fit: {mismatch}; update the older side"
                )
            case ProtocolError() as error:
                count_malformed(parts, error)


def refused(parts: Parts, answer: Refused) -> None:
    """End, unless that learner is what a crash has left behind: then the right one will come.

    Raises:
        Refused: this server does not fit the learner's run.
    """
    if answer.code != "incarnation":
        raise RefusedError(f"the learner at {parts.address} refused this server ({answer.code}): {answer.reason}")
    event(log, "leftover_learner", level=logging.WARNING, address=parts.address, reason=answer.reason)


def make_hello(parts: Parts) -> Hello:
    """Introduce this server, with what it still holds of an earlier connection."""
    info = parts.engine.info
    return Hello(
        session=parts.next_session(),
        server=parts.name,
        engine=info.engine,
        room=info.room,
        vocab_size=info.vocab_size,
        model_digest=info.model_digest,
        tokenizer_digest=info.tokenizer_digest,
        canaries=info.canaries,
        full_weights=info.full_weights,
        max_lora_rank=info.max_lora_rank,
        reward_functions=parts.scorer.names,
        run_id=parts.welcome.run_id,
        incarnation=parts.welcome.incarnation,
        live=parts.weights.live,
        unacked=tuple(parts.book.unacked),
        in_flight=tuple(parts.book.in_flight),
        relay_address=parts.weights.relay_address,
    )


def welcomed(parts: Parts, welcome: Welcome) -> None:
    """Take up the connection."""
    if parts.welcome.run_id not in ("", welcome.run_id):
        parts.weights.new_run()
    parts.welcome, parts.told_of_cuts = welcome, False
    for group_id in parts.book.keep(welcome.keep):
        parts.engine.abort(group_id)
    for group in list(parts.book.unacked.values()):
        send_group(parts, group)
    parts.weights.welcomed()
    event(
        log, "welcomed", run=welcome.run_id, incarnation=welcome.incarnation, session=welcome.session,
        resent=len(parts.book.unacked), kept=len(parts.book.in_flight),
    )  # fmt: skip


def handle(parts: Parts, message: object) -> None:
    """Act on one message."""
    match message:
        case Lease():
            accept_lease(parts, message)
        case Ack():
            parts.book.acknowledged(message.group_id)
        case Cancel():
            if parts.book.drop(message.group_id) is not None:
                parts.engine.abort(message.group_id)
        case WeightsReady() | WeightsSwap():
            handle_weights(parts, message)
        case Drain():
            parts.end(f"the learner ends the run: {message.reason}")
        case Goodbye():
            event(log, "learner_left", reason=message.reason)
        case Refused():
            refused(parts, message)
        case Fault():
            event(log, "learner_fault", level=logging.WARNING, code=message.code, reason=message.reason)
        case Pong() | Welcome():
            pass  # signs of life: that they came is all they say here
        case ProtocolError():
            refuse(parts, message)
        case _:
            refuse(parts, ProtocolError(f"{type(message).__name__} is not for a rollout server"))


def handle_weights(parts: Parts, message: WeightsReady | WeightsSwap) -> None:
    """Pass on a version that may be fetched, or the turn to swap."""
    if isinstance(message, WeightsSwap):
        parts.weights.swap(message)
        return
    try:
        parts.weights.announce(message)
    except MalformedMessage as error:
        refuse(parts, error)


def refuse(parts: Parts, error: ProtocolError) -> None:
    """Count and tell of a message that is none; the process lives on."""
    count_malformed(parts, error)
    parts.dialer.send(Fault(code="malformed", reason=str(error)))


def count_malformed(parts: Parts, error: ProtocolError) -> None:
    """Note a message that is none."""
    parts.malformed += 1
    event(log, "malformed", level=logging.WARNING, reason=error)


def accept_lease(parts: Parts, lease: Lease) -> None:
    """Begin a group, or give the lease back at once when this engine must not sample it."""
    live = parts.engine.live
    if parts.stop.is_set() or live is None or live < lease.min_version:
        reason = "draining" if parts.stop.is_set() else f"live at {live}, the lease asks for {lease.min_version}"
        parts.dialer.send(Return(group_id=lease.group_id, attempt=lease.attempt, reason=reason, fault=False))
    elif parts.book.accept(lease):
        task = parts.tasks.create_task(group_task(parts, lease), name=f"group {lease.group_id}")
        task.add_done_callback(lambda _: settle_seats(parts))
        settle_seats(parts)
        tell_of_cuts(parts, lease)
    elif lease.group_id in parts.book.unacked:
        send_group(parts, parts.book.unacked[lease.group_id])


def tell_of_cuts(parts: Parts, lease: Lease) -> None:
    """Say, once a connection, that completions may be shorter here than the learner allows them to be."""
    reason = "" if parts.told_of_cuts else why_cut(lease, parts.engine.info.max_length)
    if reason:
        parts.told_of_cuts = True
        event(log, "completions_cut", level=logging.WARNING, reason=reason)
        parts.dialer.send(Fault(code="max_model_length", reason=reason))


async def group_task(parts: Parts, lease: Lease) -> None:
    """Turn one lease into one group: sample, score, send.

    consumes: one Lease      waits for: engine, reward workers      unblocked by: their results, or abort
    produces: one Group, or one Return
    """
    begun_s = parts.clock()
    request = GenerationRequest(
        group_id=lease.group_id,
        prompt_tokens=lease.prompt_tokens,
        num_generations=lease.num_generations,
        sampling=lease.sampling,
        seed=lease.seed,
    )
    try:
        sampling = parts.engine.generate(request)
        completions = await parts.waits.wait(sampling, name="samples", owner="engine", deadline_s=None)
        sampled_s = parts.clock()
        if not parts.book.wants(lease):
            return  # cancelled meanwhile, and perhaps leased anew
        scores = await score(parts, lease, completions)
    except (EngineFailure, MalformedMessage) as error:
        current = parts.book.drop(lease.group_id) if parts.book.wants(lease) else None
        event(log, "group_failed", level=logging.WARNING, group=lease.group_id, ordinal=lease.ordinal, reason=error)
        if current is not None:
            give_back(parts, current, error)
        return
    group = build_group(
        lease, completions, scores, parts.reward_weights, reward_names=parts.scorer.names,
        generate_s=sampled_s - begun_s, reward_s=parts.clock() - sampled_s,
    )  # fmt: skip
    parts.reward_timeouts += int((group.reward_statuses == 1).sum())
    parts.reward_errors += int((group.reward_statuses == 2).sum())
    finished = parts.book.finish(lease, group)
    if finished is not None:
        send_group(parts, finished)
        ping(parts)  # the learner leases by how many samples are left here


async def score(parts: Parts, lease: Lease, completions: Sequence[Completion]) -> Scores:
    """Have a group's completions scored, visibly.

    Raises:
        MalformedMessage: the lease's row is not what the contract says.
    """
    parts.scoring[lease] = sum(len(completion.completion_tokens) for completion in completions)
    settle_seats(parts)
    try:
        # On a thread: turning the tokens of 64 long completions into text would hold the loop for 200 ms (I9).
        made = asyncio.to_thread(reward_call, lease, completions, parts.decode)
        call = await parts.waits.wait(made, name="text", owner="tokenizer", deadline_s=None)
        scored = parts.scorer.score(call)
        return await parts.waits.wait(scored, name="rewards", owner="reward workers", deadline_s=None)
    finally:
        del parts.scoring[lease]


def give_back(parts: Parts, lease: Lease, error: Exception) -> None:
    """Return a lease that failed. Samples that were withheld are no fault of their group."""
    fault = not isinstance(error, SamplesWithheld)
    parts.dialer.send(Return(group_id=lease.group_id, attempt=lease.attempt, reason=str(error)[:500], fault=fault))
    if not fault:
        parts.weights.still_live()


def send_group(parts: Parts, group: Group) -> None:
    """Send a group, in parts when it is large: a whole one on a slow link would look like death."""
    for part in split_group(group):
        parts.dialer.send(part)


async def report_loop(parts: Parts) -> None:
    """Tell the learner what became of weights, as it happens.

    consumes: reports      waits for: WeightsReceiver      unblocked by: its queue
    """
    while True:
        report = await parts.waits.wait(parts.weights.reports.get(), name="report", owner="weights", deadline_s=None)
        gone = isinstance(report, WeightsLive | WeightsStaged) and (
            report.version.incarnation < parts.welcome.incarnation
        )
        if gone:
            continue  # of a learner that is gone: the new one has announced its own
        parts.dialer.send(report)


async def heartbeat_loop(parts: Parts) -> None:
    """Show life, and how this server does.

    waits for: its own timer      produces: one Ping per heartbeat_s, beside those with every group
    """
    while True:
        await asyncio.sleep(parts.welcome.heartbeat_s)
        parts.reminders.tell(going_on(parts.waits), parts.waits.clock())
        if parts.welcome.session:
            ping(parts)


def ping(parts: Parts) -> None:
    """Say how this server does."""
    parts.dialer.send(Ping(sent_s=parts.clock(), status=make_status(parts)))
