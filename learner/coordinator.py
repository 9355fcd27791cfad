"""The learner's side of the conversation: who gets which lease, and what becomes of it when a server goes.

Puts the pure state machines (ledger, fleet, evaluation) and the connection together. Runs on the event loop only, never
waits, does no I/O but queueing messages. What arrives from servers is arrivals.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from learner.admission import NameOwners, why_refused
from learner.batch import Batch
from learner.config import LearnerConfig
from learner.evaluation import Evaluation
from learner.fleet import Fleet, Health, Server
from learner.idle_watch import IdleWatch
from learner.journal_records import EndRecord, KnobRecord, Record
from learner.knobs.core import Knobs, knob_ranges
from learner.leases import RunIdentity
from learner.ledger import End, Entry, Ledger, State
from learner.links import Links
from learner.progress import Progress
from learner.prompts import PromptRow, Prompts
from learner.spans import ORDINARY, Spans
from learner.token_ledger import TokenEnd, TokenLedger
from learner.weights_desk import WeightsDesk
from protocol.addresses import is_local
from protocol.channel import Listener
from protocol.errors import PeerGone, RunStopped
from protocol.identity import group_id, is_overtaken
from protocol.logs import event
from protocol.messages import AnyMessage, Cancel, Hello, Int32, Purpose, Refused, ServerStatus, Welcome
from protocol.signals import Signal
from protocol.versions import Lineage, Version
from protocol.waits import Reminders, Waiting

log = logging.getLogger(__name__)

NOTICES_KEPT = 8
COUNTED = (
    "malformed", "servers_refused", "groups_refused", "groups_duplicate", "groups_stale", "groups_restored",
    "rows_too_long", "stalls",
)  # fmt: skip
"""Counters that every row of metrics.jsonl shows, from 0 on."""
LEAST_QUARANTINED = 16
"""Groups quarantined in a row that stop a run, at least."""


@dataclass(kw_only=True)
class Coordinator:
    """See the module's text. One per learner."""

    config: LearnerConfig
    identity: RunIdentity
    lineage: Lineage
    channel: Listener
    ledger: Ledger
    fleet: Fleet
    prompts: Prompts
    eval_rows: Sequence[PromptRow | None] = ()
    """Rows to evaluate on; None where one is too long."""
    canary_tokens: Int32 | None = None
    """[N, L] what engines try new weights on."""
    clock: Callable[[], float] = time.monotonic
    changed: Signal = field(default_factory=Signal)
    """Something happened that may let a lease, a batch or an evaluation go on."""
    evaluation: Evaluation | None = None
    training: bool = True
    """Whether new groups are granted and leased."""
    reward_functions: tuple[str, ...] = ()
    rows: dict[int, PromptRow] = field(default_factory=dict)
    """Rows of ordinals under way."""
    stock: dict[int, PromptRow | None] = field(default_factory=dict)
    """Rows of the next ordinals."""
    ids: dict[str, int] = field(default_factory=dict)
    """Ordinals under way by group id."""
    begun: Callable[[], None] = lambda: None
    """Called at the first lease."""
    granted: Callable[[Entry], None] = lambda entry: None
    """Told of every new entry (arrivals.py may hold its group from an earlier incarnation)."""
    unjournaled: list[Record] = field(default_factory=list)
    """Ends to be journaled with the next append."""
    counters: Counter[str] = field(default_factory=Counter)
    notices: deque[str] = field(default_factory=lambda: deque(maxlen=NOTICES_KEPT))
    names: NameOwners = field(default_factory=NameOwners)
    first_lease_s: float | None = None
    quarantined_in_a_row: int = 0
    knob_history: Sequence[KnobRecord] = ()
    """Changes made by earlier learners of this run."""
    step_boundary: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a step is journaled and applied, and while a knob is turned: a change is before a step or after it."""
    knobs: Knobs = field(init=False)
    unplaced: Entry | None = None
    """The oldest group that no server could be leased, as of the last try."""
    swap_awaited: bool = False
    """Whether it could have been queued, but waits for a server with free seats that is about to swap."""
    tokens: TokenLedger = field(default_factory=TokenLedger)
    spans: Spans = field(default_factory=Spans)
    reminders: Reminders = field(default_factory=Reminders)
    idle: IdleWatch = field(init=False)
    progress: Progress = field(init=False)
    weights: WeightsDesk = field(init=False)

    def __post_init__(self) -> None:
        """Expect the reward functions that the user named; set the knobs to what they were."""
        ranges = knob_ranges(
            self.ledger.bounds, num_generations=self.config.num_generations, learning_rate=self.config.learning_rate
        )
        self.knobs = Knobs(ranges, self.knob_history)
        self.ledger.limit_depth(self.knobs.depth)
        self.reward_functions = tuple(self.config.reward_funcs)
        self.progress = Progress(self.clock())
        self.idle = IdleWatch(self)
        self.weights = WeightsDesk(
            fleet=self.fleet, links=Links(local=is_local(self.config.bind)), clock=self.clock, send=self.send,
            notice=self.notice, went_live=self.went_live, key_of=self.channel.key_of,
        )  # fmt: skip
        self.counters.update(dict.fromkeys(COUNTED, 0))
        self.ids = {self.train_id(entry.ordinal): entry.ordinal for entry in self.ledger.entries.values()}

    def notice(self, name: str, text: str, **fields: object) -> None:
        """Log an event and show it on the screen."""
        event(log, name, level=logging.WARNING, text=text, **fields)
        self.notices.append(text)

    def send(self, server: Server, message: AnyMessage) -> bool:
        """Queue a message; a server that is gone loses its leases to others."""
        try:
            self.channel.send(server.peer, message)
        except PeerGone:
            if not server.draining:  # else its Goodbye has arrived and says why, or its silence will tell
                self.drop_server(server, "its connection is gone")
            return False
        return True

    def reply(self, peer: bytes, message: AnyMessage) -> None:
        """Answer a connection that is no server of this run; if it is gone, nobody is waiting."""
        with contextlib.suppress(PeerGone):
            self.channel.send(peer, message)

    def reported(self, server: Server, status: ServerStatus | None) -> None:
        """A server says how it does: it may have places free that nobody knew of."""
        self.fleet.reported(server, status)
        if status is not None:
            self.tokens.reported(server.process, generated=status.tokens_generated, held=status.tokens_held)
        if server.load < server.hello.room:
            self.changed.notify()

    def went_live(self, version: Version) -> None:
        """A server serves that version now: slots may be free."""
        self.ledger.live(version.policy_version)
        self.changed.notify()

    def hello(self, peer: bytes, hello: Hello) -> None:
        """Welcome a server, or refuse it saying why."""
        older = self.fleet.named(hello.server)
        if older is not None and is_overtaken(hello.session, older.hello.session):
            return  # of a connection given up since: nothing orders the messages of different connections
        refusal = self.names.why_refused(hello.server, self.channel.owner_of(peer), self.channel.knows)
        refusal = refusal or why_refused(hello, self.identity, self.reward_functions)
        if refusal is not None:
            code, reason = refusal
            self.counters["servers_refused"] += 1
            self.notice("server_refused", f"refused server {hello.server}: {reason}", server=hello.server, code=code)
            self.reply(peer, Refused(code=code, reason=reason))
            return
        if older is not None:
            if older.peer != peer:
                reason = f"another server named {hello.server} has joined"
                self.reply(older.peer, Refused(code="name_in_use", reason=reason))
            # A process that only lost its connection still has its groups; a new one lost them, perhaps to one of them.
            self.drop_server(older, "it joined anew", fault=hello.run_id != self.identity.run_id)
        self.reward_functions = self.reward_functions or hello.reward_functions
        if hello.run_id != self.identity.run_id or (hello.live is not None and self.is_unborn(hello.live)):
            hello = msgspec.structs.replace(hello, live=None)  # it still serves the weights of another run
        server = self.fleet.join(peer, hello, self.clock())
        if server.live is not None:  # its WeightsLive may have been lost with the connection
            self.ledger.live(server.live.policy_version)
        unacked = tuple(held_id for held_id in hello.unacked if self._wanted(held_id))
        keep = unacked + tuple(held_id for held_id in hello.in_flight if self._adopt(server, held_id))
        self.tokens.joined(server.process, fresh=not hello.run_id, unacked=unacked)
        event(
            log, "server_joined", server=server.name, engine=hello.engine, room=hello.room, live=hello.live,
            session=hello.session, kept=len(keep),
        )  # fmt: skip
        welcome = Welcome(
            session=hello.session, run_id=self.identity.run_id, incarnation=self.identity.incarnation, keep=keep,
            heartbeat_s=self.config.heartbeat_s, liveness_s=self.config.liveness_s,
        )  # fmt: skip
        try:
            self.channel.send(peer, welcome)
        except PeerGone:
            self.drop_server(server, "it was gone before its Welcome", fault=False)
            return
        self.weights.joined(server)
        self.changed.notify()

    def drop_server(self, server: Server, reason: str, *, fault: bool = True) -> None:
        """The server is gone: its leases go to others. Whether that counts against the groups is `fault`."""
        held = self.fleet.leave(server.peer)
        self.tokens.left(server.process)
        self.weights.left(server)
        self.notice("server_left", f"server {server.name} left: {reason}", server=server.name, groups=len(held))
        for held_id in held:
            self.lost(held_id, fault=fault, reason=reason)
        self.changed.notify()

    def lost(self, held_id: str, *, fault: bool, reason: str) -> None:
        """A lease will not be answered: give it out again, or give the group up after max_attempts."""
        self.fleet.release(held_id)
        self.spans.end(held_id, self.clock(), f"lost: {reason}")
        if self.evaluation is not None:
            for row in list(self.evaluation.leased):
                if self.eval_id(row) == held_id:
                    self.evaluation.lost(row, fault=fault)
        entry = self.entry_of(held_id)
        if entry is not None and entry.state is State.LEASED:
            event(log, "lease_lost", group=held_id, ordinal=entry.ordinal, attempt=entry.attempt, reason=reason)
            if self.ledger.lost(entry.sequence, fault=fault) is None:
                self.ended(entry, End.QUARANTINED, reason)
        self.changed.notify()

    def ended(self, entry: Entry, how: End, reason: str) -> None:
        """Note an end that the ledger has already made.

        Raises:
            RunStopped: nothing but quarantined groups: the engine or the task is broken, not a prompt.
        """
        self._forget(entry.ordinal)
        if how is End.QUARANTINED:
            self.notice("quarantined", f"group {entry.ordinal} quarantined: {reason}", ordinal=entry.ordinal)
            self.quarantined_in_a_row += 1
            if self.quarantined_in_a_row >= max(LEAST_QUARANTINED, 2 * self.config.prompts_per_step):
                raise RunStopped(
                    f"{self.quarantined_in_a_row} groups in a row failed {self.config.max_attempts} times each, the"
                    f" last one because: {reason}; see the servers' logs"
                )
        self.unjournaled.append(
            EndRecord(
                incarnation=self.identity.incarnation, ordinal=entry.ordinal, sequence=entry.sequence, end=how.value,
                step=self.ledger.policy_version, reason=reason[:500],
            )
        )  # fmt: skip

    def trained(self, batch: Batch, policy_version: int) -> None:
        """The batch trained into `policy_version`. Its step is journaled already."""
        self.ledger.trained([group.sequence for group in batch.groups], policy_version)
        masked = self.config.mask_truncated_completions
        self.tokens.trained([group.group for group in batch.groups], mask_truncated_completions=masked)
        self.weights.made(policy_version)
        for group in batch.groups:
            self._forget(group.ordinal)
        self.changed.notify()

    def skipped(self, batch: Batch, reason: str) -> None:
        """The batch could not be trained: its groups end, and others are leased in their place."""
        self.notice("step_skipped", f"step {batch.step} skipped: {reason}", step=batch.step)
        entries = [self.ledger.entries[group.sequence] for group in batch.groups]
        self.ledger.skip([entry.sequence for entry in entries])
        for entry, group in zip(entries, batch.groups, strict=True):
            self.tokens.ended(group.group, TokenEnd.SKIPPED)
            self.ended(entry, End.SKIPPED, reason)
        self.changed.notify()

    def drop_expired(self) -> list[int]:
        """End what no step may train any more (staleness_policy drop); return the sequences that had finished."""
        expired = self.ledger.expired()
        for entry in expired:
            self.ledger.end(entry.sequence, End.STALE)
            self.ended(entry, End.STALE, f"its tokens are of version {entry.floor}, too old for the next step")
        for entry in expired:
            held_id = self.train_id(entry.ordinal)
            self.spans.end(held_id, self.clock(), "too old to train")
            if (holder := self.fleet.release(held_id)) is not None:
                self.send(holder, Cancel(group_id=held_id, attempt=entry.attempt, reason="too old to train"))
        return [entry.sequence for entry in expired if entry.state is State.BUFFERED]

    def take_unjournaled(self) -> list[Record]:
        """Hand over the ends that the journal has not got yet."""
        records, self.unjournaled = self.unjournaled, []
        return records

    def tick(self, waits: Sequence[Waiting]) -> None:
        """Declare silent servers dead; move turns on; count and say a stall (I8).

        Raises:
            RunStopped: no server for server_wait_s seconds.
        """
        now_s, fleet = self.clock(), self.fleet
        for server in fleet.silent(now_s):
            self.drop_server(server, f"nothing heard for {fleet.liveness_s:g} s")
        self.weights.tick()
        self.reminders.tell([wait for wait in waits if wait.name not in ORDINARY], now_s)
        alone_s = self.progress.serverless_s(now_s, connected=bool(fleet.servers))
        if 0 < self.config.server_wait_s < alone_s:
            raise RunStopped(f"no rollout server at {self.channel.address} for {alone_s:.0f} s (server_wait_s)")
        healthy = any(fleet.health(server, now_s) is Health.HEALTHY for server in fleet.servers.values())
        steps = self.ledger.policy_version + self.ledger.ends[End.SKIPPED]
        if self.training and self.progress.stalled(steps, now_s, healthy=healthy):
            self.counters["stalls"] += 1
            going_on = "; ".join(wait.describe(now_s) for wait in waits)
            self.notice("stalled", f"no step for {self.progress.limit_s:.0f} s; waits: {going_on}")

    def stop_training(self) -> None:
        """Lease nothing more for training and call back what is out; the ledger keeps it for a continued run."""
        self.training = False
        for server in list(self.fleet.servers.values()):
            for held_id in [g for g in server.outstanding if g not in server.eval_outstanding]:
                self.fleet.release(held_id)
                self.spans.end(held_id, self.clock(), "called back: the training steps are done")
                self.send(server, Cancel(group_id=held_id, attempt=0, reason="the training steps are done"))

    def entry_of(self, held_id: str) -> Entry | None:
        """The ledger's entry of a training group id."""
        ordinal = self.ids.get(held_id)
        return None if ordinal is None else self.ledger.find(ordinal)

    def train_id(self, ordinal: int) -> str:
        """Group id of a training ordinal."""
        return group_id(self.identity.run_id, ordinal)

    def is_unborn(self, version: Version) -> bool:
        """Whether it would belong to this run but has not been trained yet: nobody can honestly have it (I4)."""
        return version in self.lineage and version.policy_version > self.ledger.policy_version

    def evaluates(self, held_id: str) -> bool:
        """Whether that is a lease of the evaluation going on."""
        evaluation = self.evaluation
        return evaluation is not None and any(self.eval_id(row) == held_id for row in evaluation.leased)

    def eval_id(self, row: int) -> str:
        """Group id of an evaluation row of the evaluation going on."""
        assert self.evaluation is not None
        return group_id(f"{self.identity.run_id}/{self.evaluation.policy_version}", row, Purpose.EVAL)

    def _wanted(self, held_id: str) -> bool:
        entry = self.entry_of(held_id)
        return entry is not None and entry.state in (State.PENDING, State.LEASED)

    def _adopt(self, server: Server, held_id: str) -> bool:
        """Let a server that comes back go on with a group nobody else has been given."""
        entry = self.entry_of(held_id)
        if entry is None or entry.state is not State.PENDING or server.live is None or not self.training:
            return False
        oldest = self.ledger.min_policy_version(entry.sequence)
        if server.live.policy_version < oldest:
            return False
        # The samples under way may have begun before the server's version went live: count on no more than needed.
        self.ledger.dispatched(entry.sequence, server.name, oldest)
        self.fleet.assign(server, held_id, self.config.num_generations)
        self.spans.begin(held_id, server.name, "groups", f"group {entry.ordinal}", self.clock())
        return True

    def _forget(self, ordinal: int) -> None:
        self.rows.pop(ordinal, None)
        self.ids.pop(self.train_id(ordinal), None)
