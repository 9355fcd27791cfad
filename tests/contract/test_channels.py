"""One suite for every channel: ZeroMQ over tcp and ipc, and the memory network that stands in for it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from protocol.channel import Dialer, Listener, dial, listen
from protocol.errors import PeerGone, PeerSilent
from protocol.loop_socket import RECV_BURST
from protocol.messages import Ack, AckStatus, Goodbye, Ping, WeightsChunk
from protocol.testing import MemoryNetwork
from protocol.versions import Version
from tests.factories import make_group, make_lease

SOON_S = 10.0
"""Far more than anything here takes: a test that waits so long has failed."""


class Transport:
    """Makes channels of one kind that can reach each other."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.address = f"ipc://{directory}/s" if kind == "ipc" else "tcp://127.0.0.1:0"
        self._network: MemoryNetwork | None = None

    @property
    def network(self) -> MemoryNetwork:
        if self._network is None:
            self._network = MemoryNetwork()
        return self._network

    def listen(self) -> Listener:
        listener = self.network.listener() if self.kind == "memory" else listen(self.address)
        self.address = listener.address
        return listener

    def dial(self) -> Dialer:
        return self.network.dialer(uuid.uuid4().hex) if self.kind == "memory" else dial(self.address)


@pytest.fixture(params=["tcp", "ipc", "memory"])
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transport:
    return Transport(request.param, tmp_path_factory.mktemp("c"))


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run_soon(work: Awaitable[Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(work, SOON_S))

    return run_soon


async def connected(
    transport: Transport, stack: list[AbstractAsyncContextManager[Any]]
) -> tuple[Listener, Dialer, bytes]:
    """Return a listener, a dialer and the dialer's peer id."""
    listener, dialer = transport.listen(), transport.dial()
    stack += [listener, dialer]
    dialer.send(ping(0))
    peer, message = await listener.recv()
    assert message.sent_s == 0
    return listener, dialer, peer


def on_pair(
    transport: Transport,
    run: Callable[[Awaitable[Any]], Any],
    body: Callable[[Listener, Dialer, bytes], Awaitable[None]],
) -> None:
    """Run `body` on a connected pair and close it, whatever happens."""

    async def whole() -> None:
        stack: list[AbstractAsyncContextManager[Any]] = []
        try:
            await body(*await connected(transport, stack))
        finally:
            for channel in stack:
                await channel.close()

    run(whole())


def ping(number: float) -> Ping:
    return Ping(sent_s=float(number))


def test_messages_arrive_whole_and_in_order_both_ways(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        group, lease = make_group(), make_lease()
        for number in range(200):
            dialer.send(ping(number))
            listener.send(peer, ping(-number))
        dialer.send(group)
        listener.send(peer, lease)
        for number in range(200):
            assert await listener.recv() == (peer, Like(sent_s=number))
            assert (await dialer.recv(SOON_S)).sent_s == -number
        sender, arrived = await listener.recv()
        assert sender == peer
        assert arrived.group_id == group.group_id
        np.testing.assert_array_equal(arrived.behavior_logprobs, group.behavior_logprobs)
        assert not arrived.completion_tokens.flags.writeable
        np.testing.assert_array_equal((await dialer.recv(SOON_S)).prompt_tokens, lease.prompt_tokens)

    on_pair(transport, run, body)


class Like:
    """Equal to any message that has these fields."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __eq__(self, other: object) -> bool:
        return all(getattr(other, name) == value for name, value in self.fields.items())


def test_a_message_of_megabytes_arrives(transport, run):
    data = np.random.default_rng(0).integers(0, 256, 5 << 20).astype(np.uint8)

    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        listener.send(peer, WeightsChunk(version=Version(1, 1), offset=3, data=data))
        chunk = await dialer.recv(SOON_S)
        np.testing.assert_array_equal(chunk.data, data)

    on_pair(transport, run, body)


def test_either_side_may_start_first(transport, run):
    if transport.kind == "tcp":
        pytest.skip("the port is only known once somebody listens")

    async def body() -> None:
        async with transport.dial() as dialer:
            dialer.send(ping(1))
            async with transport.listen() as listener:
                _, message = await listener.recv()
                assert message.sent_s == 1

    run(body())


def test_every_dialer_has_its_own_peer_id(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        async with transport.dial() as second:
            second.send(ping(2))
            other, _ = await listener.recv()
            assert other != peer
            listener.send(other, ping(20))
            listener.send(peer, ping(10))
            assert (await second.recv(SOON_S)).sent_s == 20
            assert (await dialer.recv(SOON_S)).sent_s == 10

    on_pair(transport, run, body)


def test_sending_to_nobody_is_peer_gone(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        with pytest.raises(PeerGone, match=r"peer b'nobody' is not connected"):
            listener.send(b"nobody", ping(1))
        listener.send(peer, ping(2))  # a refused send leaves nothing half sent behind
        assert (await dialer.recv(SOON_S)).sent_s == 2

    on_pair(transport, run, body)


def test_a_closed_dialer_is_gone_for_the_listener(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        await dialer.close()
        with pytest.raises(PeerGone, match="is not connected"):
            await send_for_ever(listener, peer)  # it learns of it when its end of the connection closes

    on_pair(transport, run, body)


async def send_for_ever(listener: Listener, peer: bytes) -> None:
    while True:
        listener.send(peer, ping(1))
        await asyncio.sleep(0)


def test_goodbye_leaves_although_the_channel_closes_at_once(transport, run):
    data = np.zeros(4 << 20, np.uint8)

    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        for offset in range(3):  # much to send before it
            dialer.send(WeightsChunk(version=Version(1, 1), offset=offset, data=data))
        dialer.send(Goodbye(reason="done"))
        await dialer.close()
        for offset in range(3):
            assert await listener.recv() == (peer, Like(offset=offset))
        assert await listener.recv() == (peer, Like(reason="done"))

    on_pair(transport, run, body)


def test_reconnecting_takes_a_fresh_peer_id_and_drops_what_was_queued(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        dialer.reconnect()
        dialer.send(ping(5))
        other, message = await listener.recv()
        assert (other != peer, message.sent_s) == (True, 5)
        listener.send(other, ping(6))
        assert (await dialer.recv(SOON_S)).sent_s == 6

    on_pair(transport, run, body)


def test_a_receiver_survives_a_reconnect_by_another_task(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        received = asyncio.ensure_future(dialer.recv(SOON_S))
        await asyncio.sleep(0)
        dialer.reconnect()
        dialer.send(ping(1))
        other, _ = await listener.recv()
        listener.send(other, ping(2))
        assert (await received).sent_s == 2

    on_pair(transport, run, body)


def test_silence_is_noticed_and_any_message_ends_it(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        loop = asyncio.get_running_loop()
        listener.send(peer, ping(1))
        assert (await dialer.recv(SOON_S)).sent_s == 1
        heard_s = loop.time()
        with pytest.raises(PeerSilent, match=r"heard nothing from .* for 0\.05 s"):
            await dialer.recv(0.05)
        assert 0.045 <= loop.time() - heard_s < 1.0
        listener.send(peer, ping(2))
        assert (await dialer.recv(SOON_S)).sent_s == 2

    on_pair(transport, run, body)


def test_what_has_arrived_is_not_silence_however_late_it_is_received(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        listener.send(peer, ping(1))
        message = None
        while message is None:
            with contextlib.suppress(PeerSilent):
                message = await dialer.recv(1e-9)  # a limit that has always passed
        assert message.sent_s == 1

    on_pair(transport, run, body)


def test_cancelling_a_receive_loses_nothing(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        for number in range(20):
            waiting = asyncio.ensure_future(dialer.recv(SOON_S))
            await asyncio.sleep(0)
            listener.send(peer, ping(number))
            await asyncio.sleep(0)
            waiting.cancel()
            try:
                message = await waiting
            except asyncio.CancelledError:
                message = await dialer.recv(SOON_S)
            assert message.sent_s == number

    on_pair(transport, run, body)


def test_a_flood_leaves_other_tasks_their_turn(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        count = 20 * RECV_BURST
        for number in range(count):
            dialer.send(ping(number))
        await asyncio.sleep(0.1)  # nearly all of it lies ready then: the sharper test, though none depends on it
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        watcher = asyncio.ensure_future(other())
        for _ in range(count):
            await listener.recv()
        watcher.cancel()
        assert turns >= count // RECV_BURST - 1

    on_pair(transport, run, body)


def test_sends_from_a_callback_do_not_deafen_the_receiver(transport, run):
    """The descriptor is edge-triggered: a send may swallow the signal of a message that is just arriving."""

    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        rounds = 300

        async def chatter() -> None:
            for _ in range(rounds * 20):
                dialer.send(ping(-1))
                await asyncio.sleep(0)

        async def answer() -> None:
            while True:
                sender, message = await listener.recv()
                if message.sent_s >= 0:
                    listener.send(sender, message)

        tasks = [asyncio.ensure_future(chatter()), asyncio.ensure_future(answer())]
        for number in range(rounds):
            dialer.send(ping(number))
            assert (await dialer.recv(SOON_S)).sent_s == number
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    on_pair(transport, run, body)


def test_closed_channels_say_so(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        waiting = asyncio.ensure_future(dialer.recv())
        await asyncio.sleep(0)
        await dialer.close()
        await dialer.close()
        with pytest.raises(PeerGone, match="closed"):
            await waiting
        with pytest.raises(PeerGone):
            dialer.send(ping(1))
        await listener.close()
        with pytest.raises(PeerGone, match="closed"):
            await listener.recv()
        with pytest.raises(PeerGone):
            listener.send(peer, ping(1))

    on_pair(transport, run, body)


def test_a_new_listener_hears_a_dialer_that_stayed(transport, run):
    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        await listener.close()
        async with transport.listen() as second:
            dialer.send(Ack(group_id="0" * 32, attempt=1, status=AckStatus.OK))
            _, message = await second.recv()
            assert message.status is AckStatus.OK

    on_pair(transport, run, body)


def test_a_dialer_hears_that_its_listener_is_gone_after_all_that_it_said(transport, run):
    """ZeroMQ would connect again under the same id, and nobody would know that messages are missing."""

    async def body(listener: Listener, dialer: Dialer, peer: bytes) -> None:
        listener.send(peer, ping(1))
        assert (await dialer.recv(SOON_S)).sent_s == 1
        listener.send(peer, Goodbye(reason="done"))
        await listener.close()
        assert (await dialer.recv(SOON_S)).reason == "done"
        for _ in range(2):
            with pytest.raises(PeerSilent, match=r"the connection to .* broke"):
                await dialer.recv(None)
        async with transport.listen() as second:
            dialer.reconnect()
            dialer.send(ping(2))
            peer, message = await second.recv()
            assert message.sent_s == 2
            second.send(peer, ping(3))
            assert (await dialer.recv(SOON_S)).sent_s == 3

    on_pair(transport, run, body)
