"""What only the real sockets can show; what every channel must do is in tests/contract/test_channels.py."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from protocol.channel import (
    bound_address,
    bulk_address,
    bulk_client_socket,
    bulk_server_socket,
    dial,
    listen,
    wake_pair,
)
from protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, SMALL_BYTES, encode
from protocol.errors import ConfigError, MalformedMessage, PeerGone, VersionMismatch
from protocol.loop_socket import COPY_BELOW_BYTES
from protocol.messages import Hello, Ping, WeightsChunk
from protocol.security import Security
from protocol.versions import Version

LOOPBACK = "tcp://127.0.0.1:0"
LAB = Security(insecure_plaintext=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def raw_dealer(address: str) -> zmq.Socket[bytes]:
    """Return a peer that sends whatever it likes."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(address)
    return dealer


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\x93\x01\x02\x03"],
        [b"GET / HTTP/1.1"],
        [b"", b"", b""],
        [b"x" * (1 << 20)],
        [encode(Ping(sent_s=1.0))[0]] * (10 * MAX_FRAMES),
    ],
)
def test_garbage_comes_as_a_value_and_the_listener_lives_on(frames):
    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            with raw_dealer(listener.address) as garbler:
                garbler.send_multipart(frames)
                _, refused = await listener.recv()
                assert isinstance(refused, MalformedMessage)
                assert refused.__traceback__ is None
                dialer.send(Ping(sent_s=1.0))
                _, message = await listener.recv()
                assert message.sent_s == 1.0

    run(body())


def test_a_foreign_version_comes_as_a_value_and_can_be_answered():
    async def body() -> None:
        async with listen(LOOPBACK) as listener:
            with raw_dealer(listener.address) as foreign:
                foreign.send(b"\x82\xa4type\xa5hello\xb0protocol_version\x07")
                peer, refused = await listener.recv()
                assert isinstance(refused, VersionMismatch)
                listener.send(peer, Ping(sent_s=2.0))
                assert await asyncio.to_thread(foreign.recv) == encode(Ping(sent_s=2.0))[0]

    run(body())


@pytest.mark.parametrize(("num_bytes", "closed"), [(MAX_FRAME_BYTES, False), (MAX_FRAME_BYTES + 1, True)])
def test_a_frame_above_the_limit_costs_the_sender_its_connection(num_bytes, closed):
    async def body() -> None:
        async with listen(LOOPBACK) as listener:
            host, port = listener.address.removeprefix("tcp://").split(":")
            with socket.create_connection((host, int(port)), timeout=0.3) as attacker:
                shake_hands(attacker)
                attacker.sendall(b"\x02" + struct.pack(">Q", num_bytes))  # a long frame begins
                assert await asyncio.to_thread(is_closed, attacker) == closed

    run(body())


def shake_hands(connection: socket.socket) -> None:
    """Open a ZMTP 3.0 connection as a DEALER (rfc.zeromq.org/spec/23)."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    connection.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
    answered = b""
    while b"READY" not in answered:
        answered += connection.recv(4096)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_large_headers_and_large_arrays_arrive():
    hello = Hello(
        session="s", server="a", engine="e", room=1, vocab_size=2, model_digest="", tokenizer_digest="",
        reward_functions=("f",), unacked=tuple(f"{k:032x}" for k in range(1500)),
    )  # fmt: skip
    data = np.arange(3 << 20, dtype=np.uint32).view(np.uint8)

    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            dialer.send(hello)
            peer, arrived = await listener.recv()
            assert arrived.unacked == hello.unacked
            listener.send(peer, WeightsChunk(version=Version(1, 1), offset=0, data=data))
            chunk = await dialer.recv(10)
            np.testing.assert_array_equal(chunk.data, data)
            assert not chunk.data.flags.writeable

    run(body())


def test_small_arrays_are_aligned():
    """Small frames lie at any offset in the receive buffer; arrays made of them must not, shared frame or not."""

    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            for length in (*range(1, 40), COPY_BELOW_BYTES - 1, COPY_BELOW_BYTES, SMALL_BYTES - 1, SMALL_BYTES + 1):
                dialer.send(WeightsChunk(version=Version(1, 1), offset=0, data=np.zeros(length, np.uint8)))
                _, chunk = await listener.recv()
                assert chunk.data.ctypes.data % 8 == 0

    run(body())


def test_routing_ids_are_fresh_and_random():
    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            peers = set()
            for _ in range(10):
                dialer.send(Ping(sent_s=0.0))
                peer, _ = await listener.recv()
                assert len(peer) == 16
                peers.add(peer)
                dialer.reconnect()
            assert len(peers) == 10

    run(body())


def test_a_second_connection_cannot_take_over_a_live_routing_id():
    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            dialer.send(Ping(sent_s=1.0))
            peer, _ = await listener.recv()
            thief = zmq.Context.instance().socket(zmq.DEALER)
            with thief:
                thief.linger = 0
                thief.routing_id = peer
                thief.connect(listener.address)
                thief.send(encode(Ping(sent_s=66.0))[0])
                for number in range(100):
                    listener.send(peer, Ping(sent_s=float(number)))
                    assert (await dialer.recv(10)).sent_s == number
                assert thief.poll(0) == 0

    run(body())


def test_a_port_in_use_is_one_clear_line():
    async def body() -> None:
        async with listen(LOOPBACK) as listener:
            with pytest.raises(
                ConfigError, match=rf"^cannot listen on {listener.address}: another process has it: stop"
            ):
                listen(listener.address)
            with pytest.raises(ConfigError, match="another process has it"):
                bulk_server_socket(listener.address)

    run(body())


def test_an_ipc_path_in_use_is_not_stolen(tmp_path_factory):
    path = tmp_path_factory.mktemp("s") / "x"

    async def body() -> None:
        async with listen(f"ipc://{path}"):
            with pytest.raises(ConfigError, match=f"^cannot listen on ipc://{path}: another process has it"):
                listen(f"ipc://{path}")

    run(body())


def test_an_ipc_path_left_by_the_dead_is_taken_over_but_a_file_is_not(tmp_path_factory):
    directory = tmp_path_factory.mktemp("s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    (directory / "file").write_text("precious")

    async def body() -> None:
        async with listen(f"ipc://{directory}/dead") as listener, dial(listener.address) as dialer:
            dialer.send(Ping(sent_s=1.0))
            await listener.recv()
        with pytest.raises(ConfigError, match="a file that is no socket lies there"):
            listen(f"ipc://{directory}/file")
        with pytest.raises(ConfigError, match=r"cannot listen on ipc:.*No such file or directory"):
            listen(f"ipc://{directory}/missing/x")

    run(body())
    assert (directory / "file").read_text() == "precious"


@pytest.mark.parametrize("make", [listen, dial, bulk_server_socket, bulk_client_socket])
def test_addresses_off_loopback_are_refused_everywhere(make):
    async def body() -> None:
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is not loopback"):
            make("tcp://0.0.0.0:5555")

    run(body())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://127.0.0.1:0"])
def test_one_can_only_connect_to_a_host_and_a_port(address):
    async def body() -> None:
        with pytest.raises(ConfigError, match="to connect, a host and a port are needed"):
            dial(address, LAB)

    run(body())


def test_an_address_of_another_host_cannot_be_listened_on():
    async def body() -> None:
        with pytest.raises(ConfigError, match=r"^cannot listen on tcp://192\.0\.2\.1:5555: "):
            listen("tcp://192.0.2.1:5555", LAB)

    run(body())


def test_localhost_and_wildcards_are_bound():
    async def body() -> None:
        async with listen("tcp://localhost:0") as listener:
            assert listener.address.startswith("tcp://127.0.0.1:")
        async with listen("tcp://*:0", LAB) as listener:
            port = listener.address.rpartition(":")[2]
            async with dial(f"tcp://127.0.0.1:{port}") as dialer:
                dialer.send(Ping(sent_s=1.0))
                await listener.recv()

    run(body())


def test_a_second_receiver_is_a_bug():
    async def body() -> None:
        async with listen(LOOPBACK) as listener:
            first = asyncio.ensure_future(listener.recv())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="two tasks receive from one channel"):
                await listener.recv()
            await listener.close()
            with pytest.raises(PeerGone):
                await first

    run(body())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors where Linux lists them")
def test_closing_and_reconnecting_leak_no_descriptors():
    async def cycle() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            for _ in range(3):
                dialer.send(WeightsChunk(version=Version(1, 1), offset=0, data=np.zeros(1 << 17, np.uint8)))
                await listener.recv()
                dialer.reconnect()

    async def body() -> None:
        await cycle()  # the first time opens what stays open: the executor's, the zero-copy collector's
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await cycle()
        assert len(os.listdir("/proc/self/fd")) <= before

    run(body())


def test_a_cleanly_closed_process_ends_at_once_even_without_its_peer():
    program = """
import asyncio, time
from protocol.channel import LINGER_MS, dial
from protocol.messages import Goodbye
async def main():
    async with dial("tcp://127.0.0.1:9") as dialer:
        dialer.send(Goodbye(reason="nobody hears this"))
        started_s = time.monotonic()
    assert time.monotonic() - started_s < LINGER_MS / 1000 + 5
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=30)


def test_bulk_sockets_talk_and_are_woken():
    with bulk_server_socket(LOOPBACK) as server, bulk_client_socket(bound_address(server)) as client:
        client.send(b"give")
        peer, request = server.recv_multipart()
        server.send_multipart([peer, b"take"])
        assert (request, client.recv()) == (b"give", b"take")
        with pytest.raises(zmq.ZMQError, match="Host unreachable"):
            server.send_multipart([b"nobody", b"take"], zmq.NOBLOCK)
    polled, waker = wake_pair()
    with polled, waker:
        assert polled.poll(0) == 0
        waker.send(b"")
        assert polled.poll(5000) == zmq.POLLIN


def test_the_bulk_address_of_a_bound_listener_is_the_next_port():
    async def body() -> None:
        async with listen(LOOPBACK) as listener:
            port = int(listener.address.rpartition(":")[2])
            assert bulk_address(listener.address) == f"tcp://127.0.0.1:{port + 1}"

    run(body())
