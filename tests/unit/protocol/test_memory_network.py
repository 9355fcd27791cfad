"""The faults of the memory network. That it is a channel like any other: tests/contract/test_channels.py."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from protocol.channel import Dialer, Listener
from protocol.errors import ConfigError, PeerGone, PeerSilent
from protocol.messages import Ping
from protocol.testing import Faults, MemoryNetwork

COUNT = 400


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that never waits: when nothing is ready, its clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__(selectors.DefaultSelector())
        self.now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now_s = max(self.now_s, self._scheduled[0].when())
        super()._run_once()


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(body())


async def numbers_that_arrive(network: MemoryNetwork, count: int = COUNT) -> list[int]:
    """Send `count` numbered messages from a dialer and return those that arrive, in their order."""
    async with network.listener() as listener, network.dialer("a") as dialer:
        for number in range(count):
            dialer.send(Ping(sent_s=float(number)))
        return await drain(listener)


async def drain(channel: Listener | Dialer) -> list[int]:
    numbers: list[int] = []
    try:
        while True:
            async with asyncio.timeout(1000):
                received = await channel.recv()
            message = received[1] if isinstance(received, tuple) else received
            numbers.append(int(message.sent_s))
    except TimeoutError:
        return numbers


def test_without_faults_everything_arrives_once():
    network = MemoryNetwork()
    assert run(lambda: numbers_that_arrive(network)) == list(range(COUNT))
    assert (network.witness.sent, network.witness.delivered) == (COUNT, COUNT)


def test_lost_messages_are_counted():
    network = MemoryNetwork(seed=1, faults=Faults(loss=0.25))
    arrived = run(lambda: numbers_that_arrive(network))
    assert arrived == sorted(arrived)
    assert len(arrived) == COUNT - network.witness.lost
    assert 0.15 * COUNT < network.witness.lost < 0.35 * COUNT


def test_duplicates_follow_their_original():
    network = MemoryNetwork(seed=1, faults=Faults(duplication=0.25))
    arrived = run(lambda: numbers_that_arrive(network))
    assert arrived == sorted(arrived)
    assert set(arrived) == set(range(COUNT))
    assert len(arrived) == COUNT + network.witness.duplicated > COUNT


def test_delays_keep_the_order_and_use_the_loops_clock():
    async def body() -> tuple[list[int], float]:
        loop = asyncio.get_running_loop()
        network = MemoryNetwork(seed=3, faults=Faults(delay_s=10.0, jitter_s=100.0))
        async with network.listener() as listener, network.dialer("a") as dialer:
            for number in range(COUNT):
                dialer.send(Ping(sent_s=float(number)))
            first = await listener.recv()
            at_s = loop.time()
            rest = await drain(listener)
            assert network.witness.delayed == COUNT
            return [int(first[1].sent_s), *rest], at_s

    arrived, first_s = run(body)
    assert arrived == list(range(COUNT))
    assert 10.0 <= first_s <= 110.0


def test_the_same_seed_brings_the_same_faults():
    def outcome(seed: int) -> list[int]:
        faults = Faults(loss=0.2, duplication=0.2, jitter_s=1.0)
        return run(lambda: numbers_that_arrive(MemoryNetwork(seed=seed, faults=faults)))

    assert outcome(5) == outcome(5)
    assert outcome(5) != outcome(6)


def test_a_cut_loses_both_ways_for_that_dialer_alone_until_healed():
    async def body() -> None:
        network = MemoryNetwork()
        async with network.listener() as listener, network.dialer("a") as a, network.dialer("b") as b:
            peers = {}
            for name, dialer in (("a", a), ("b", b)):
                dialer.send(Ping(sent_s=0.0))
                peers[name], _ = await listener.recv()
            network.cut("a")
            a.send(Ping(sent_s=1.0))
            listener.send(peers["a"], Ping(sent_s=2.0))  # the listener is not told
            b.send(Ping(sent_s=3.0))
            assert (await listener.recv())[0] == peers["b"]
            with pytest.raises(PeerSilent, match="for 5 s"):
                await a.recv(5.0)
            assert network.witness.cut == 2
            network.heal("a")
            a.send(Ping(sent_s=4.0))
            assert (await listener.recv())[1].sent_s == 4.0

    run(body)


def test_a_cut_may_be_one_way():
    async def body() -> None:
        network = MemoryNetwork()
        async with network.listener() as listener, network.dialer("a") as dialer:
            network.cut("a", to_listener=False)
            dialer.send(Ping(sent_s=1.0))
            peer, _ = await listener.recv()
            listener.send(peer, Ping(sent_s=2.0))
            with pytest.raises(PeerSilent):
                await dialer.recv(5.0)
            assert network.witness.cut == 1

    run(body)


def test_a_cut_reaches_what_is_under_way():
    async def body() -> None:
        network = MemoryNetwork(faults=Faults(delay_s=10.0))
        async with network.listener() as listener, network.dialer("a") as dialer:
            dialer.send(Ping(sent_s=1.0))
            network.cut("a")
            assert await drain(listener) == []
            assert network.witness.cut == 1

    run(body)


def test_reconnecting_loses_what_is_under_way_and_leaves_the_old_id_gone():
    async def body() -> None:
        network = MemoryNetwork(faults=Faults(delay_s=10.0))
        async with network.listener() as listener, network.dialer("a") as dialer:
            dialer.send(Ping(sent_s=1.0))
            peer, _ = await listener.recv()
            dialer.send(Ping(sent_s=2.0))
            listener.send(peer, Ping(sent_s=3.0))
            dialer.reconnect()
            dialer.send(Ping(sent_s=4.0))
            other, message = await listener.recv()
            assert (other != peer, message.sent_s, network.witness.lost) == (True, 4.0, 2)
            with pytest.raises(PeerGone):
                listener.send(peer, Ping(sent_s=5.0))
            with pytest.raises(PeerSilent):
                await dialer.recv(60.0)

    run(body)


def test_what_a_closed_dialer_sent_before_there_was_a_listener_is_gone():
    async def body() -> None:
        network = MemoryNetwork()
        first, second = network.dialer("a"), network.dialer("b")
        first.send(Ping(sent_s=1.0))
        second.send(Ping(sent_s=2.0))
        await asyncio.sleep(1.0)
        await first.close()
        async with network.listener() as listener:
            assert await drain(listener) == [2]
        await second.close()

    run(body)


def test_there_is_one_listener_at_a_time():
    async def body() -> None:
        network = MemoryNetwork()
        async with network.listener():
            with pytest.raises(ConfigError, match="another listener has it"):
                network.listener()
        async with network.listener():
            pass

    run(body)
