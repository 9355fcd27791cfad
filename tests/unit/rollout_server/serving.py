"""A rollout server's loops on a virtual clock, with a learner that a test plays by hand over a network in memory.

async with serving(tmp_path) as served:
    await served.learner.welcome()
    served.learner.send(make_lease())
    group = await served.learner.hears(Group)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from learner.tuning.virtual_time import run_virtual
from protocol.channel import Listener
from protocol.loop_lag import LoopLag
from protocol.messages import Ack, AckStatus, AnyMessage, Group, Hello, Ping, WeightsStaged, WeightsSwap, Welcome
from protocol.testing import MemoryNetwork
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ScriptedOptions
from rollout_server.engines.base import StagedWeights
from rollout_server.engines.scripted import ScriptedEngine
from rollout_server.loops import Parts, control_loop, heartbeat_loop, report_loop
from rollout_server.scorers import Scorer, ScriptedScorer
from rollout_server.weights import WeightsReceiver
from tests.factories import INITIAL, RUN_ID

M = TypeVar("M")
PATIENCE_S = 120.0
"""Virtual seconds that the learner waits for a message at most."""
GROUP_S = 1.0
"""What a group of default length takes the engine."""
LIVENESS_S, HEARTBEAT_S = 5.0, 1.0
"""Defaults of Welcome."""
LOOPS = (control_loop, report_loop, heartbeat_loop)


class FakeLearner:
    """Hears one server at a time, and gives it every turn at once. `heard` keeps everything, Pings too."""

    def __init__(self, listener: Listener, network: MemoryNetwork | None = None) -> None:
        self.listener = listener
        self.heard: list[AnyMessage] = []
        self.peer = b""
        """Who spoke last: the newest connection."""
        self.turns = True
        self._network = network

    async def hears(self, kind: type[M], where: Callable[[M], bool] = lambda message: True) -> M:
        """Wait for a message of that type (and of that kind), passing over all others."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.peer, message = await self.listener.recv()
                assert not isinstance(message, Exception), message
                self.heard.append(message)
                if self.turns and isinstance(message, WeightsStaged):
                    self.send(WeightsSwap(version=message.version))
                    continue
                if isinstance(message, kind) and where(message):
                    return message

    async def hears_next(self, kind: type[M]) -> M:
        """Wait for the next message but Pings, which must be of that type."""
        message = await self.hears(object, lambda message: not isinstance(message, Ping))
        assert isinstance(message, kind), message
        return message

    async def welcome(self, *, keep: Sequence[str] = (), incarnation: int = 1, run_id: str = RUN_ID) -> Hello:
        """Wait for a Hello, welcome that connection, and return what was said."""
        hello = await self.hears(Hello)
        self.send(Welcome(session=hello.session, run_id=run_id, incarnation=incarnation, keep=tuple(keep)))
        return hello

    async def hears_nothing_for(self, seconds: float) -> None:
        """Nothing but Pings comes in that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                message = await self.hears(object, lambda message: not isinstance(message, Ping))
                raise AssertionError(f"heard {message}")

    def send(self, *messages: AnyMessage) -> None:
        """Send to the connection that spoke last; several messages arrive in one burst."""
        for message in messages:
            self.listener.send(self.peer, message)

    def send_bytes(self, *frames: bytes) -> None:
        """Send what may be no message at all."""
        assert self._network is not None
        dialer = self._network.find_dialer(self.peer)
        assert dialer is not None
        dialer.inbox.put((self.peer, list(frames)))


@dataclass(frozen=True)
class Served:
    """A server under test."""

    parts: Parts
    engine: ScriptedEngine
    network: MemoryNetwork
    learner: FakeLearner


@contextlib.asynccontextmanager
async def serving(
    directory: Path,
    *,
    loops: Sequence[Callable[[Parts], Coroutine[Any, Any, None]]] = LOOPS,
    live: Version | None = INITIAL,
    room: int = 16,
    scorer: Scorer | None = None,
    **script: Any,
) -> AsyncIterator[Served]:
    """Run a server's loops; a group takes GROUP_S unless the script says otherwise."""
    options = {"vocab_size": 32, "mean_length": 8.0, "length_sigma": 0.0, "token_s": GROUP_S / 8, **script}
    network = MemoryNetwork()
    waits = Waits(asyncio.get_running_loop().time)
    async with ScriptedEngine(ScriptedOptions(**options), room) as engine, asyncio.TaskGroup() as tasks:
        if live is not None:
            await engine.load_weights(StagedWeights(version=live, path=directory))
        receiver = WeightsReceiver(engine, waits, learner="ipc:///nowhere", directory=directory / "staging")
        parts = Parts(
            name="server-0",
            address="memory",
            dialer=network.dialer("server-0"),
            engine=engine,
            scorer=scorer or ScriptedScorer(),
            reward_weights=(1.0,),
            decode=lambda tokens: " ".join(map(str, tokens)),
            weights=receiver,
            tasks=tasks,
            waits=waits,
            lag=LoopLag(),
        )
        running = [tasks.create_task(loop(parts)) for loop in loops]
        yield Served(parts, engine, network, FakeLearner(network.listener(), network))
        for task in [*running, *(task for task in asyncio.all_tasks() if task.get_name().startswith("group "))]:
            task.cancel()


def run_served(main: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on a virtual clock; what fails in the server's TaskGroup fails alone, not as a group."""
    try:
        run_virtual(main)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


Scenario = Callable[[Served], Awaitable[None]]


def play(tmp_path: Path, scenario: Scenario, **options: Any) -> None:
    """Run a scenario with a server that is not welcomed yet."""

    async def main() -> None:
        async with serving(tmp_path, **options) as served:
            await scenario(served)

    run_served(main())


def play_welcomed(tmp_path: Path, scenario: Scenario, **options: Any) -> None:
    """Run a scenario with a server that works for the learner."""

    async def welcomed(served: Served) -> None:
        await served.learner.welcome()
        await taken_in(served)
        await scenario(served)

    play(tmp_path, welcomed, **options)


async def taken_in(served: Served) -> None:
    """Wait until the server has read the Welcome; takes no time."""
    while not served.parts.welcome.session:
        await asyncio.sleep(0)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def ack(group: Group, status: AckStatus = AckStatus.OK) -> Ack:
    return Ack(group_id=group.group_id, attempt=group.attempt, status=status)
