"""What a simulation plays instead of the real thing: servers, connections, model, disk, data set, publishing.

Messages are passed as they are, without codec, network or loss. A played group carries one token for each version span,
its real lengths are in the `Book`: scheduling asks for versions alone, and arrays of millions of tokens would be all
that a simulation spends its time on.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np

from learner.batch import Batch, StepResult
from learner.journal_records import Record
from learner.prompts import PromptRow
from learner.tuning.engine_model import EngineModel, Job, Spans
from learner.tuning.trace import group_lengths
from learner.tuning.workload import Costs, Workload
from protocol.errors import PeerGone
from protocol.messages import (
    AnyMessage,
    FinishReason,
    Float32,
    Group,
    Hello,
    Int32,
    Lease,
    Ping,
    RewardStatus,
    ServerStatus,
    WeightsLive,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.versions import Version
from protocol.waits import Waits

P = ParamSpec("P")
T = TypeVar("T")
INCARNATION, VOCAB_SIZE, REWARDS = 1, 2, ("played",)


@dataclass(slots=True)
class Outcome:
    """A finished group as it really is."""

    tokens: int
    by_version: Counter[int]
    """Tokens by the policy_version that drew them."""
    server: str


@dataclass(kw_only=True)
class Book:
    """What the played parts know together, beside the messages."""

    workload: Workload
    costs: Costs
    """Of the present."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By ordinal, until it trains."""
    leased_tokens: int = 0
    leased_groups: int = 0


class PlayedListener:
    """The learner's end of connections in memory."""

    address = "memory"
    sender_host = ""

    def __init__(self) -> None:
        self.servers: dict[bytes, PlayedServer] = {}
        self._inbox: deque[tuple[bytes, AnyMessage]] = deque()
        self._arrived: asyncio.Future[None] | None = None

    async def recv(self) -> tuple[bytes, AnyMessage]:
        """Wait for a message."""
        while not self._inbox:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return self._inbox.popleft()

    def send(self, peer: bytes, message: AnyMessage) -> None:
        """Hand a message to a server."""
        self.servers[peer].handle(message)

    def arrive(self, peer: bytes, message: AnyMessage) -> None:
        """Hand a message of a server to the learner."""
        self._inbox.append((peer, message))
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def key_of(self, peer: bytes) -> str:
        """No keys."""
        return ""

    def owner_of(self, peer: bytes) -> str:
        """No keys."""
        return ""

    def knows(self, owner: str) -> bool:
        """No keys."""
        return False

    async def close(self) -> None:
        """Nothing to close."""
        raise PeerGone("closed")

    async def __aenter__(self) -> Self:
        """Return the listener."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""


class PlayedServer:
    """A rollout server: takes leases in order, answers each with its group, takes every version as it may."""

    def __init__(self, name: str, book: Book, listener: PlayedListener) -> None:
        self.name, self.peer = name, name.encode()
        self._book, self._listener = book, listener
        self._loop = asyncio.get_running_loop()
        self.engine = EngineModel(book.workload.room, book.costs, self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._fetch: asyncio.TimerHandle | None = None
        self._pinged_s = 0.0
        self._groups_in_flight = 0
        listener.servers[self.peer] = self

    def join(self) -> None:
        """Say Hello."""
        self._say(
            Hello(
                session=f"{self.name}-0", server=self.name, engine="scripted", room=self._book.workload.room,
                vocab_size=VOCAB_SIZE, model_digest="", tokenizer_digest="", reward_functions=REWARDS,
            )
        )  # fmt: skip

    def handle(self, message: AnyMessage) -> None:
        """Act on what the learner sends."""
        match message:
            case Lease():
                self._groups_in_flight += 1
                self.advance()
                self.engine.submit(self._job(message))
                self._arm()
            case WeightsReady(version=version):
                if self._fetch is not None:
                    self._fetch.cancel()  # superseded
                self._fetch = self._loop.call_later(self._book.costs.publish_s, self._staged, version)
            case WeightsSwap(version=version):
                self.advance()
                self.engine.swap(version.policy_version)
                self._arm()

    def change_costs(self, costs: Costs) -> None:
        """From now on, things cost that."""
        self.advance()
        self.engine.costs = costs
        self._arm()

    def advance(self) -> None:
        """Bring the engine to the present, and answer what has ended."""
        ended, version = self.engine.advance(self._loop.time())
        for job in ended:
            group = self._answer(job)
            if self._book.costs.reward_s:
                self._loop.call_later(self._book.costs.reward_s, self._deliver, group)
            else:
                self._deliver(group)
        if self._loop.time() >= self._pinged_s + self._book.workload.heartbeat_s:
            self._ping()  # heartbeats in between would say nothing new
        if version is not None:
            self._say(WeightsLive(version=Version(INCARNATION, version), pause_s=self._book.costs.pause_s))

    def _arm(self) -> None:
        """Set the timer to the engine's next event."""
        event_s = self.engine.next_event_s()
        if self._timer is not None:
            if self._timer.when() == event_s and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = None if event_s is None else self._loop.call_at(event_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.advance()
        self._arm()

    def _deliver(self, group: Group) -> None:
        self._groups_in_flight -= 1
        self._say(group)
        self._ping()

    def _ping(self) -> None:
        """Say how many samples are left here."""
        self._pinged_s = self._loop.time()
        running, waiting = self.engine.samples()
        status = ServerStatus(samples_running=running, samples_waiting=waiting, groups_in_flight=self._groups_in_flight)
        self._say(Ping(sent_s=self._pinged_s, status=status))

    def _staged(self, version: Version) -> None:
        self._say(WeightsStaged(version=version))

    def _say(self, message: AnyMessage) -> None:
        self._listener.arrive(self.peer, message)

    def _job(self, lease: Lease) -> Job:
        book = self._book
        lengths_G = group_lengths(book.workload.trace, lease.ordinal, lease.num_generations)
        if book.costs.length_factor != 1.0:
            lengths_G = np.maximum(1, np.rint(lengths_G * book.costs.length_factor)).astype(np.int32)
        tokens = int(lengths_G.sum())
        book.leased_groups += 1
        book.leased_tokens += tokens
        if not book.workload.group_events:
            return Job(lease, lengths_G.tolist())
        longest = max(int(lengths_G.max()), -(-tokens // book.workload.room))  # of more samples than seats, some wait
        return Job(lease, [longest], seats=tokens / longest)

    def _answer(self, job: Job) -> Group:
        """The group with one token for each version span; the rest goes into the book."""
        drawn: Counter[int] = Counter()
        for spans in job.spans:
            for version, tokens in spans:
                drawn[version] += tokens
        if job.seats != 1.0:
            drawn = Counter({version: round(tokens * job.seats) for version, tokens in drawn.items()})
        self._book.outcomes[job.lease.ordinal] = Outcome(drawn.total(), drawn, self.name)
        each = job.spans if len(job.spans) == job.lease.num_generations else job.spans * job.lease.num_generations
        share = self._book.workload.filtered_share
        return make_group(job.lease, each, equal=share > 0 and Random(job.lease.ordinal).random() < share)


def make_group(lease: Lease, spans: list[Spans], *, equal: bool) -> Group:
    """Answer a lease with one token for each version span, [K] in all. `equal`: all its rewards are."""
    if all(each is spans[0] for each in spans):
        arrays = _alike(tuple(version for version, _ in spans[0]), len(spans))
    else:
        counts_G = np.array([len(each) for each in spans], np.int32)
        arrays = _arrays(counts_G, np.array([version for each in spans for version, _ in each], np.int32))
    first_alone = (np.arange(len(spans)) == 0).astype(np.float32)
    return Group(
        group_id=lease.group_id,
        ordinal=lease.ordinal,
        sequence=lease.sequence,
        attempt=lease.attempt,
        purpose=lease.purpose,
        num_generations=len(spans),
        temperature=lease.sampling.temperature,
        reward_names=REWARDS,
        rewards=np.zeros(len(spans), np.float32) if equal else first_alone,
        **arrays,
    )


@functools.lru_cache(maxsize=1024)
def _alike(versions: tuple[int, ...], num_completions: int) -> dict[str, Any]:
    """Arrays of completions that all have these spans: few groups of a step differ in them."""
    counts_G = np.full(num_completions, len(versions), np.int32)
    return _arrays(counts_G, np.tile(np.array(versions, np.int32), num_completions))


def _arrays(counts_G: Int32, versions_K: Int32) -> dict[str, Any]:
    num_completions, num_spans = counts_G.size, versions_K.size
    ones_K, zeros_GF = np.ones(num_spans, np.int32), np.zeros((num_completions, 1), np.float32)
    return {
        "completion_index": np.arange(num_completions, dtype=np.int32),
        "completion_lengths": counts_G,
        "completion_tokens": ones_K,
        "behavior_logprobs": np.zeros(num_spans, np.float32),
        "finish_reasons": np.full(num_completions, FinishReason.STOP, np.uint8),
        "span_counts": counts_G,
        "span_lengths": ones_K,
        "span_versions": np.stack([np.full(num_spans, INCARNATION, np.int32), versions_K], axis=1),
        "scored": np.ones(num_completions, np.uint8),
        "reward_values": zeros_GF,
        "reward_statuses": np.full((num_completions, 1), RewardStatus.OK, np.uint8),
        "reward_seconds": zeros_GF,
    }


class PlayedTrainer:
    """A model that takes time and learns nothing."""

    learning_rate = peak_learning_rate = 0.0
    step_metrics: dict[str, float] = {}  # noqa: RUF012 - never written

    def __init__(self, book: Book) -> None:
        self.policy_version = 0
        self.owed_s = 0.0
        """Of the last call."""
        self._book = book

    def forward_backward(self, batch: Batch) -> StepResult:
        """Take as long as the batch's tokens do."""
        tokens = sum(self._book.outcomes[group.ordinal].tokens for group in batch.groups)
        self.owed_s = self._book.costs.train_step_s + self._book.costs.train_token_s * tokens
        return StepResult(finite=True, loss_tokens=tokens)

    def optimizer_step(self) -> int:
        """Cost nothing: train_step_s has it."""
        self.policy_version += 1
        self.owed_s = 0.0
        return self.policy_version

    def canary_logprobs(self, tokens: Int32) -> Float32:
        """No played engine asks."""
        raise NotImplementedError


class PlayedCompute:
    """Calls that take virtual seconds."""

    busy_with = ""

    def __init__(self, trainer: PlayedTrainer) -> None:
        self._trainer = trainer

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns, when its time is over."""
        result = function(*args, **kwargs)
        if self._trainer.owed_s > 0:
            await asyncio.sleep(self._trainer.owed_s)
        return result


class PlayedPublisher:
    """Announces versions at once: publish_s passes at the servers, until a version lies there."""

    def __init__(self, announce: Callable[[WeightsReady], None]) -> None:
        self._announce = announce
        self._manifest = np.zeros(0, np.uint8)

    def start(self, version: Version, canaries: object = None) -> None:
        """Announce a version."""
        self._announce(WeightsReady(version=version, manifest=self._manifest, addresses=("memory",)))

    async def wait_previous(self) -> None:
        """No snapshot is ever under way."""


class NoJournal:
    """Keeps nothing."""

    async def append(self, *records: Record) -> None:
        """Return at once."""


class EveryRow(dict[int, PromptRow | None]):
    """The coordinator's stock of rows, never empty: every ordinal has the same short prompt."""

    def __contains__(self, ordinal: object) -> bool:
        """Always."""
        return True

    def pop(self, ordinal: int, *_: Any) -> PromptRow:
        """Return the row of an ordinal."""
        return PromptRow(ordinal=ordinal, prompt_tokens=PROMPT, prompt="", columns={})


PROMPT = np.zeros(1, np.int32)


class PatientWaits(Waits):
    """Waits without deadlines: those are for what dies, and nothing dies here. With no timer left, a deadlock shows."""

    async def wait(self, awaitable: Any, *, name: str, owner: str, deadline_s: float | None) -> Any:
        """Await."""
        return await awaitable
