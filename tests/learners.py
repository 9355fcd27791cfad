"""A learner's pieces without sockets, disks, threads or models: what a test drives by hand.

`Desk` is the coordinator with its ledger, fleet, buffer and arrivals on fakes that record what they were given;
`FakeTrainer` and the fakes after it are what the loops need beside it, all writing into one `story`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from learner.arrivals import Arrivals
from learner.batch import Batch, StepResult
from learner.buffer import Buffer
from learner.canaries import Canaries
from learner.config import LearnerConfig
from learner.coordinator import Coordinator
from learner.evaluation import Evaluation
from learner.fleet import Fleet, Server
from learner.journal_records import EndRecord, GroupRecord, Record, StepRecord
from learner.leases import RunIdentity
from learner.leasing import missing_rows, pump
from learner.ledger import Ledger
from learner.loops import make_rows
from learner.prompts import PromptRow
from learner.recorder import StepTimer
from protocol.errors import PeerGone, ProtocolError
from protocol.messages import Ack, AnyMessage, Float32, Group, Hello, Int32, Lease
from protocol.tasks import finish
from protocol.versions import Lineage, Version
from tests.factories import RUN_ID, STOP_TOKEN, VOCAB_SIZE, make_group

T = TypeVar("T")
NUM_GENERATIONS = 4
REWARD_FUNCTIONS = ("exact_match",)


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeListener:
    """A `Listener` that keeps what is sent and hands over what `inbox` is given."""

    address = "tcp://127.0.0.1:5555"
    sender_host = "127.0.0.1"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, AnyMessage]] = []
        self.gone: set[bytes] = set()
        self.owners: dict[bytes, str] = {}
        self.inbox: asyncio.Queue[tuple[bytes, AnyMessage | ProtocolError]] = asyncio.Queue()

    def send(self, peer: bytes, message: AnyMessage) -> None:
        if peer in self.gone:
            raise PeerGone(f"peer {peer!r} is not connected")
        self.sent.append((peer, message))

    async def recv(self) -> tuple[bytes, AnyMessage | ProtocolError]:
        return await self.inbox.get()

    def key_of(self, peer: bytes) -> str:
        return ""

    def owner_of(self, peer: bytes) -> str:
        return self.owners.get(peer, "")

    def knows(self, owner: str) -> bool:
        return owner in self.owners.values()

    def to(self, peer: bytes, kind: type[T]) -> list[T]:
        """Messages of a kind that were sent to a peer, in order."""
        return [message for to, message in self.sent if to == peer and isinstance(message, kind)]


class FakePrompts:
    """Rows whose prompt is their ordinal; some of them are too long."""

    def __init__(self, too_long: Iterable[int] = ()) -> None:
        self.too_long = set(too_long)

    def __len__(self) -> int:
        return 1000

    def row(self, ordinal: int) -> PromptRow | None:
        if ordinal in self.too_long:
            return None
        tokens = np.array([2 + ordinal % (VOCAB_SIZE - 2), 3], np.int32)
        return PromptRow(ordinal=ordinal, prompt_tokens=tokens, prompt=f"{ordinal} =", columns={"answer": ordinal})


class FakeJournal:
    """Keeps records in memory. With `gate` closed an append waits, as for a slow disk."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.appends: list[tuple[Record, ...]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.append_s = 0.0
        self.error: Exception | None = None
        self.story: list[str] = []

    async def append(self, *records: Record) -> None:
        self.story += [f"journal step {record.step}" for record in records if isinstance(record, StepRecord)]
        await asyncio.sleep(self.append_s)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.records.extend(records)
        self.appends.append(records)

    def ordinals(self) -> list[int]:
        """Of the groups journaled."""
        return [record.group.ordinal for record in self.records if isinstance(record, GroupRecord)]

    def ends(self) -> list[tuple[int, str]]:
        """(ordinal, how) of the ends journaled."""
        return [(record.ordinal, record.end) for record in self.records if isinstance(record, EndRecord)]


class FakeStats:
    """Keeps the groups that were filtered."""

    def __init__(self) -> None:
        self.filtered: list[Group] = []

    def record_filtered(self, group: Group) -> None:
        self.filtered.append(group)


def make_config(**options: Any) -> LearnerConfig:
    """Two prompts a step, two steps ahead, groups of four."""
    defaults: dict[str, Any] = {
        "model": "model", "dataset": "data.jsonl", "num_generations": NUM_GENERATIONS, "max_completion_length": 8,
        "prompts_per_step": 2, "max_staleness": 2, "liveness_s": 4.0, "eval_dataset": "eval.jsonl",
    }  # fmt: skip
    return LearnerConfig(**{**defaults, **options})


def make_identity(incarnation: int = 1) -> RunIdentity:
    return RunIdentity(
        run_id=RUN_ID, incarnation=incarnation, vocab_size=VOCAB_SIZE, model_digest="weights-digest",
        tokenizer_digest="tokens-digest", stop_token_ids=(STOP_TOKEN,),
    )  # fmt: skip


def make_hello(name: str = "north", **fields: Any) -> Hello:
    """Introduce a server that fits `make_identity`."""
    defaults: dict[str, Any] = {
        "session": f"{name}-session", "server": name, "engine": "transformers", "room": 6, "vocab_size": VOCAB_SIZE,
        "model_digest": "weights-digest", "tokenizer_digest": "tokens-digest", "reward_functions": REWARD_FUNCTIONS,
    }  # fmt: skip
    return Hello(**{**defaults, **fields})


@dataclass
class Desk:
    """See the module's text."""

    coordinator: Coordinator
    arrivals: Arrivals
    buffer: Buffer
    channel: FakeListener
    journal: FakeJournal
    stats: FakeStats
    clock: Clock
    _read: dict[bytes, int] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger:
        return self.coordinator.ledger

    @property
    def fleet(self) -> Fleet:
        return self.coordinator.fleet

    def join(self, name: str = "north", *, live: int | Version | None = 0, peer: bytes = b"", **fields: Any) -> Server:
        """Let a server of this run say Hello, live at a version (an int is one of incarnation 1)."""
        version = Version(1, live) if isinstance(live, int) else live
        fields = {"live": version, "run_id": RUN_ID, "incarnation": 1, **fields}
        self.coordinator.hello(peer or name.encode(), make_hello(name, **fields))
        return self.fleet.servers[peer or name.encode()]

    def pump(self) -> None:
        """Grant and lease all that is possible, as stock_loop and lease_loop do."""
        coordinator = self.coordinator
        pump(coordinator)
        while coordinator.training and coordinator.ledger.can_grant():
            coordinator.stock |= make_rows(coordinator.prompts, missing_rows(coordinator))
            pump(coordinator)

    def leases(self, name: str = "north") -> list[Lease]:
        """Leases sent to that peer since the last call."""
        leases = self.channel.to(name.encode(), Lease)
        first, self._read[name.encode()] = self._read.get(name.encode(), 0), len(leases)
        return leases[first:]

    def acks(self, name: str = "north") -> list[tuple[int, str, str]]:
        """(attempt, status, reason) of the Acks sent to that peer."""
        return [(ack.attempt, ack.status.value, ack.reason) for ack in self.channel.to(name.encode(), Ack)]

    def receive(self, group: Group, name: str = "north") -> None:
        """Let a group, or a part of one, arrive."""
        self.arrivals.receive(name.encode(), group)

    def accept(self) -> None:
        """Deal with all that has arrived."""

        async def all_of_it() -> None:
            while not self.arrivals.queue.empty():
                await self.arrivals.accept_next()

        run(all_of_it())


def make_desk(
    *,
    too_long: Iterable[int] = (),
    eval_rows: int = 0,
    lineage: Lineage | None = None,
    incarnation: int = 1,
    policy_version: int = 0,
    journal: FakeJournal | None = None,
    **options: Any,
) -> Desk:
    """Make a desk; `options` are those of the configuration."""
    config, clock, channel = make_config(**options), Clock(), FakeListener()
    lineage = lineage or Lineage([(1, 0)])
    prompts = FakePrompts(too_long)
    coordinator = Coordinator(
        config=config,
        identity=make_identity(incarnation),
        lineage=lineage,
        channel=channel,  # type: ignore[arg-type]  # it is never closed
        ledger=Ledger(
            config.granted_bounds,
            max_attempts=config.max_attempts,
            max_refill_ratio=config.max_refill_ratio,
            policy_version=policy_version,
        ),
        fleet=Fleet(lineage, liveness_s=config.liveness_s),
        prompts=prompts,  # type: ignore[arg-type]
        eval_rows=[prompts.row(ordinal) for ordinal in range(eval_rows)],
        clock=clock,
    )
    buffer, journal, stats = Buffer(), journal or FakeJournal(), FakeStats()
    arrivals = Arrivals(coordinator, buffer, journal, stats)
    return Desk(coordinator, arrivals, buffer, channel, journal, stats, clock)


def answer(lease: Lease, **fields: Any) -> Group:
    """Answer a lease as an honest server would, sampled by its min_version unless told otherwise."""
    defaults: dict[str, Any] = {
        "ordinal": lease.ordinal, "sequence": lease.sequence, "attempt": lease.attempt, "purpose": lease.purpose,
        "group_id": lease.group_id, "version": lease.min_version, "temperature": lease.sampling.temperature or 1.0,
        "rewards": [float(i % 2) for i in range(lease.num_generations)],
    }  # fmt: skip
    return make_group(**{**defaults, **fields})


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


class FakeTrainer:
    """Trains at once. `results` are what the next forward_backwards find; without one, all is well."""

    learning_rate = 1e-3
    peak_learning_rate = 1e-3

    def __init__(self, story: list[str], policy_version: int = 0) -> None:
        self.policy_version = policy_version
        self.batches: list[Batch] = []
        """Those whose gradients were applied."""
        self.results: list[StepResult] = []
        self.story = story
        self._batch: Batch | None = None

    def forward_backward(self, batch: Batch) -> StepResult:
        self.story.append(f"forward_backward {batch.step}")
        self._batch = batch
        return self.results.pop(0) if self.results else StepResult(finite=True, loss_tokens=1, metrics={"loss": 0.5})

    def optimizer_step(self) -> int:
        assert self._batch is not None, "no gradients"
        self.batches.append(self._batch)
        self._batch = None
        self.policy_version += 1
        self.story.append(f"optimizer_step {self.policy_version}")
        return self.policy_version

    @property
    def step_metrics(self) -> dict[str, float]:
        return {"loss": 0.5}

    def canary_logprobs(self, tokens: Int32) -> Float32:
        self.story.append(f"canaries {self.policy_version}")
        return np.full((len(tokens), tokens.shape[1] - 1), -float(self.policy_version), np.float32)


class FakeCompute:
    """Calls at once, then takes `seconds[name]` of the loop's time. Cancelled, it ends the call first, as Compute."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.begun = asyncio.Event()
        """Set while a call is under way."""

    async def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        async def call() -> T:
            self.begun.set()
            result = function(*args, **kwargs)
            await asyncio.sleep(self.seconds.get(function.__name__, 0.0))
            self.begun.clear()
            return result

        return await finish(asyncio.ensure_future(call()))


class FakePublisher:
    """Publishes nothing, and says when it was asked to."""

    def __init__(self, story: list[str]) -> None:
        self.story = story
        self.canaries: list[Canaries | None] = []
        """Of each version."""
        self.gate = asyncio.Event()
        self.gate.set()

    def start(self, version: Version, canaries: Canaries | None = None) -> None:
        self.story.append(f"publish {version}")
        self.canaries.append(canaries)

    async def wait_previous(self) -> None:
        self.story.append("wait_previous")
        await self.gate.wait()

    def hold(self, policy_version: int) -> None:
        self.story.append(f"hold {policy_version}")

    def release(self) -> None:
        self.story.append("release")


class FakeRecorder:
    """Keeps what it is told."""

    def __init__(self, story: list[str], checkpoint: str | None = None) -> None:
        self.story = story
        self.checkpoint = checkpoint
        self.save_s = 0.0
        self.steps: list[tuple[Batch, StepResult]] = []
        self.evaluations: list[Evaluation] = []

    def step(self, batch: Batch, result: StepResult, timer: StepTimer, *, learning_rate: float) -> None:
        self.story.append(f"record {'step' if result.finite else 'skipped'} {batch.step}")
        self.steps.append((batch, result))

    async def save(self, compute: object) -> None:
        self.story.append("save")
        await asyncio.sleep(self.save_s)
        self.story.append("saved")

    def request_evaluation(self, policy_version: int) -> None:
        self.story.append(f"evaluation due {policy_version}?")

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
