"""A TCP connection that is reset between the two ends: the dialer is told, and nothing is lost in silence.

Left to itself ZeroMQ connects again under the same routing id: in this very test it then lost messages in both
directions, and both ends went on as if nothing had been.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest

from learner.tuning.virtual_time import run_virtual
from protocol.channel import dial, listen
from protocol.errors import PeerGone, PeerSilent
from protocol.messages import Ping, Pong
from protocol.testing import MemoryNetwork

SOON_S = 10.0


class Relay:
    """Passes bytes on between a dialer and a listener, until it resets every connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.connections = 0

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, onward_writer]
        for source, target in ((reader, onward_writer), (onward_reader, writer)):
            self._tasks.append(asyncio.create_task(self._pass_on(source, target)))

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()

    def reset(self) -> None:
        """Send RST both ways: closing with SO_LINGER 0."""
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.reset()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_a_reset_connection_is_noticed_and_made_anew_under_another_id():
    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as listener:
            relay = Relay(int(listener.address.rsplit(":", 1)[1]))
            async with dial(await relay.open()) as dialer:
                dialer.send(Ping(sent_s=1.0))
                first, _ = await listener.recv()
                listener.send(first, Pong(sent_s=1.0))
                assert (await dialer.recv(SOON_S)).sent_s == 1.0
                relay.reset()
                with pytest.raises(PeerSilent, match=r"the connection to tcp://127\.0\.0\.1:\d+ broke"):
                    await dialer.recv(None)
                dialer.reconnect()
                dialer.send(Ping(sent_s=2.0))
                second, message = await listener.recv()
                while message.sent_s != 2.0:
                    second, message = await listener.recv()
                assert second != first
                listener.send(second, Pong(sent_s=2.0))
                assert (await dialer.recv(SOON_S)).sent_s == 2.0
                assert relay.connections >= 2
            await relay.close()

    asyncio.run(asyncio.wait_for(main(), SOON_S))


def test_a_connection_that_never_said_anything_may_break_unnoticed():
    """A listener that is not up yet, or a port where something else answers: there, silence is what tells."""

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as listener:
            relay = Relay(int(listener.address.rsplit(":", 1)[1]))
            async with dial(await relay.open()) as dialer:
                dialer.send(Ping(sent_s=1.0))
                await listener.recv()
                relay.reset()
                with pytest.raises(PeerSilent, match=r"heard nothing from .* for 0\.3 s"):
                    await dialer.recv(0.3)
            await relay.close()

    asyncio.run(asyncio.wait_for(main(), SOON_S))


def test_the_memory_network_resets_alike():
    async def main() -> None:
        network = MemoryNetwork()
        async with network.listener() as listener, network.dialer("server") as dialer:
            dialer.send(Ping(sent_s=1.0))
            first, _ = await listener.recv()
            listener.send(first, Pong(sent_s=1.0))
            await dialer.recv(SOON_S)
            listener.send(first, Pong(sent_s=2.0))
            dialer.send(Ping(sent_s=2.0))
            network.reset("server")
            assert network.witness.lost == 2
            with pytest.raises(PeerSilent, match="the connection to memory broke"):
                await dialer.recv(None)
            dialer.reconnect()
            with pytest.raises(PeerGone):
                listener.send(first, Pong(sent_s=3.0))
            dialer.send(Ping(sent_s=3.0))
            _, message = await listener.recv()
            assert message.sent_s == 3.0

    run_virtual(main())
