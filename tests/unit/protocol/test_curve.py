"""Real sockets with keys: who gets in, who does not, what each side is told, and what an attacker can do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq

from protocol.channel import Dialer, Listener, bound_address, bulk_client_socket, bulk_server_socket, dial, listen
from protocol.errors import PeerGone, PeerSilent
from protocol.messages import Ping, Pong
from protocol.security import PLAIN
from tests.keyrings import Keyring

LOOPBACK = "tcp://127.0.0.1:0"
SOON_S = 12.0
TOLD_S = 5.0
"""Within which both sides are told of a refusal."""
ATTACK_BYTES = 64 << 20


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    ring = Keyring(tmp_path)
    ring.make("a")
    ring.allow("a")
    return ring


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, SOON_S))


def ping(number: float = 1.0) -> Ping:
    return Ping(sent_s=number)


async def hear(listener: Listener, dialer: Dialer, number: float = 1.0) -> bytes:
    """Let the dialer be heard and answered; return its peer id."""
    dialer.send(ping(number))
    while True:
        peer, message = await listener.recv()
        if isinstance(message, Ping) and message.sent_s == number:
            break
    listener.send(peer, Pong(sent_s=number))
    while getattr(await dialer.recv(SOON_S), "sent_s", None) != number:
        pass
    return peer


async def answer(listener: Listener) -> None:
    """Answer whoever is heard."""
    while True:
        peer, _ = await listener.recv()
        listener.send(peer, Pong(sent_s=0.0))


async def said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until the log has it."""
    async with asyncio.timeout(TOLD_S):
        while text not in caplog.text.replace('\\"', '"'):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_who_is_listed_is_heard_under_its_key(ring: Keyring, tmp_path_factory: Any, transport: str) -> None:
    address = LOOPBACK if transport == "tcp" else f"ipc://{tmp_path_factory.mktemp('s')}/x"

    async def body() -> None:
        async with listen(address, ring.listening()) as listener:
            async with dial(listener.address, ring.dialing("a")) as dialer:
                peer = await hear(listener, dialer)
                assert listener.owner_of(peer) == "a"
                assert peer.startswith(ring.public["a"].encode())
                assert (listener.knows("a"), listener.knows("b")) == (True, False)
                dialer.reconnect()
                again = await hear(listener, dialer, 2.0)
                assert again != peer
                assert listener.owner_of(again) == "a"

    run(body())


def test_without_keys_nobody_has_an_owner() -> None:
    async def body() -> None:
        async with listen(LOOPBACK) as listener, dial(listener.address) as dialer:
            assert listener.owner_of(await hear(listener, dialer)) == ""
            assert not listener.knows("")

    run(body())


def test_an_unknown_key_is_told_of_on_both_sides_and_joins_when_it_is_added(
    ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    ring.allow()
    shown: list[str] = []

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening(), tell=shown.append) as listener:
            async with dial(listener.address, ring.dialing("a")) as dialer:
                dialer.send(ping())
                key = ring.public["a"]
                await said(
                    caplog, f"the learner at {listener.address} does not know this server's key {key}: add it to"
                )
                await said(
                    caplog, f"refused key {key} from 127.0.0.1: to let that server in, add the key to {ring.allowed}"
                )
                assert [line for line in shown if key in line] == shown[:1]
                dialer.send(ping())  # ZeroMQ tries no more: nothing is queued, and nothing breaks
                dialer.reconnect()
                with pytest.raises(PeerSilent):
                    await dialer.recv(0.3)
                assert caplog.text.count("does not know this server's key") == 1, "once a minute"
                ring.allow("a")
                dialer.reconnect()
                await hear(listener, dialer, 3.0)

    run(body())


def test_a_wrong_learner_key_is_told_of_on_both_sides(ring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    ring.make("other")
    shown: list[str] = []

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening(), tell=shown.append) as listener:
            async with dial(listener.address, ring.dialing("a", learner="other")) as dialer:
                dialer.send(ping())
                await said(
                    caplog, f"the learner at {listener.address} broke off the handshake: its key is none of the 1 in"
                )
                await said(caplog, f"Its learner_key must be this process's public key, {ring.public['learner']}")
                assert shown

    run(body())


def test_a_server_without_keys_is_told_of_on_both_sides(ring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            async with dial(listener.address) as dialer:
                dialer.send(ping())
                await said(caplog, "wants keys, and this server has none")
                await said(caplog, "refused ")
                assert "--learner-key" in caplog.text

    run(body())


def test_a_learner_without_keys_is_told_of_on_both_sides(ring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []

    async def body() -> None:
        async with listen(LOOPBACK, tell=shown.append) as listener:
            async with dial(listener.address, ring.dialing("a")) as dialer:
                dialer.send(ping())
                await said(caplog, f"the learner at {listener.address} uses no keys, and this server does")
                await said(caplog, "it uses keys, and this process has none (--key")
                assert shown

    run(body())


def test_a_key_that_is_removed_loses_its_connection_and_others_come_back(
    ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    ring.make("b")
    ring.allow("a", "b")

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            async with (
                dial(listener.address, ring.dialing("a")) as out,
                dial(listener.address, ring.dialing("b")) as kept,
            ):
                gone = await hear(listener, out)
                await hear(listener, kept)
                ring.allow("b")
                for dialer in (out, kept):
                    with pytest.raises(PeerSilent, match="broke"):
                        await dialer.recv(None)
                    dialer.reconnect()
                await said(
                    caplog, f"key {ring.public['a']} of a is no longer in {ring.allowed}: its connections are closed"
                )
                await hear(listener, kept, 2.0)
                await said(caplog, "does not know this server's key")
                with pytest.raises(PeerGone):
                    listener.send(gone, ping())
                out.send(ping(66.0))
                await hear(listener, kept, 3.0)

    run(body())


def test_a_removed_key_that_never_came_disturbs_nobody(ring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    ring.make("b")
    ring.allow("a", "b")

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            async with dial(listener.address, ring.dialing("a")) as dialer:
                await hear(listener, dialer)
                ring.allow("a")
                await said(caplog, "event=keys_read")
                with pytest.raises(PeerSilent, match="heard nothing"):
                    await dialer.recv(1.0)
                await hear(listener, dialer, 2.0)

    caplog.set_level(logging.INFO)
    run(body())


def test_a_learner_whose_key_has_changed_is_found_again(ring: Keyring) -> None:
    ring.make("next")
    security = ring.dialing("a")

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            address = listener.address
            dialer = dial(address, security)
            await hear(listener, dialer)
        with (ring.directory / "learner.pub").open("a") as file:  # the server's list, while it runs
            file.write((ring.directory / "next.pub").read_text())
        async with listen(address, ring.listening("next")) as listener, dialer:
            answering = asyncio.ensure_future(answer(listener))
            for _ in range(10):  # as the server's loops do
                dialer.reconnect()
                dialer.send(ping(2.0))
                with contextlib.suppress(PeerSilent):
                    await dialer.recv(1.0)
                    break
            answering.cancel()
            assert security.trusted is not None
            assert security.trusted.current == ring.public["next"]

    run(body())


def test_a_routing_id_that_another_key_takes_over_is_another_peer(ring: Keyring) -> None:
    """The id is the sender's choice; the key is not."""
    ring.make("b")
    ring.allow("a", "b")

    def raw(name: str, address: str) -> zmq.Socket[bytes]:
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.linger = 0
        ring.dialing(name).protect_client(dealer)
        dealer.routing_id = b"the same"
        dealer.connect(address)
        return dealer

    async def body() -> None:
        from protocol.codec import encode

        async with listen(LOOPBACK, ring.listening()) as listener:
            with raw("a", listener.address) as honest:
                honest.send_multipart(encode(ping()))
                first, _ = await listener.recv()
            while True:  # until its end of the connection is closed
                with raw("b", listener.address) as thief:
                    thief.send_multipart(encode(ping()))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            second, _ = await listener.recv()
                            break
            assert first != second
            assert first[40:] == second[40:] == b"the same"
            assert (listener.owner_of(first), listener.owner_of(second)) == ("a", "b")

    run(body())


# --- the bulk plane, where each socket may have another key and list


def exchange(server: zmq.Socket[bytes], client: zmq.Socket[bytes]) -> bool:
    """Whether a request arrives and is answered."""
    client.send(b"give", zmq.NOBLOCK)
    if not server.poll(1000):
        return False
    peer, request = server.recv_multipart()
    server.send_multipart([peer, request])
    return bool(client.recv() == b"give")


def test_weights_are_served_to_listed_keys_by_whoever_has_the_expected_key(ring: Keyring) -> None:
    """A rollout server that passes weights on has its own pair and list; the learner names its key."""
    ring.make("relay")
    learner, relay = ring.listening(), ring.listening("relay")
    with bulk_server_socket(LOOPBACK, learner) as first, bulk_server_socket(LOOPBACK, relay) as second:
        addresses = [bound_address(socket) for socket in (first, second)]
        client = ring.dialing("a")
        with bulk_client_socket(addresses[0], client) as socket:
            assert exchange(first, socket)
        with bulk_client_socket(addresses[1], client, server_public_key=ring.public["relay"]) as socket:
            assert exchange(second, socket)
        with bulk_client_socket(addresses[1], client) as socket:
            assert not exchange(second, socket), "it is not the learner"
        with bulk_client_socket(addresses[0], ring.dialing("stranger")) as socket:
            assert not exchange(first, socket)
        with bulk_client_socket(addresses[0]) as socket:
            assert not exchange(first, socket), "it has no keys"


def test_a_removed_key_gets_no_more_weights(ring: Keyring) -> None:
    with bulk_server_socket(LOOPBACK, ring.listening()) as server:
        with bulk_client_socket(bound_address(server), ring.dialing("a")) as client:
            assert exchange(server, client)
            monitor = client.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            ring.allow()
            assert monitor.poll(5000)
            assert not exchange(server, client)
            client.disable_monitor()
            monitor.close()


def test_a_process_with_guarded_bulk_sockets_ends_at_once(ring: Keyring) -> None:
    program = f"""
from pathlib import Path
from protocol.channel import bulk_server_socket
from protocol.security import load_security
ring = Path({str(ring.directory)!r})
with bulk_server_socket({LOOPBACK!r}, load_security(key=ring / "learner.key", allowed_keys=ring / "allowed_keys")):
    print("guarded")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert (done.stdout, done.stderr) == ("guarded\n", "")


def doors() -> int:
    return sum(thread.name == "door" for thread in threading.enumerate())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors where Linux lists them")
def test_listening_with_keys_leaks_no_descriptors_and_no_threads(ring: Keyring) -> None:
    async def cycle() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            async with dial(listener.address, ring.dialing("a")) as dialer:
                await hear(listener, dialer)

    async def body() -> None:
        await cycle()
        before = len(os.listdir("/proc/self/fd")), doors()
        for _ in range(5):
            await cycle()
        assert (len(os.listdir("/proc/self/fd")), doors()) <= before

    run(body())


# --- a peer without keys


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def attack(address: str) -> int:
    """Open a ZMTP connection with the NULL mechanism, send a multipart message without end; return the bytes sent."""
    host, port = address.removeprefix("tcp://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
        part = b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20)  # a long frame, and more will follow
        with contextlib.suppress(OSError):
            connection.sendall(b"\x04" + bytes([len(ready)]) + ready)
            while sent < ATTACK_BYTES:
                connection.sendall(part)
                sent += len(part)
    return sent


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own memory where Linux tells it")
@pytest.mark.parametrize("keys", [True, False])
def test_a_peer_without_keys_is_not_received_and_fills_no_memory(ring: Keyring, keys: bool) -> None:
    """Without keys the same attack fills memory, so it does happen; with them the connection ends at its greeting."""

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening() if keys else PLAIN) as listener:
            heard: list[bytes] = []

            async def receive() -> None:
                while True:
                    heard.append((await listener.recv())[0])

            receiving = asyncio.ensure_future(receive())
            before = rss_bytes()
            peak = 0

            def watch(done: threading.Event) -> None:
                nonlocal peak
                while not done.wait(0.002):
                    peak = max(peak, rss_bytes() - before)

            done = threading.Event()
            watcher = threading.Thread(target=watch, args=(done,))
            watcher.start()
            sent = sum([await asyncio.to_thread(attack, listener.address) for _ in range(3)])
            done.set()
            watcher.join()
            assert heard == []
            if keys:
                assert (sent < ATTACK_BYTES, peak < ATTACK_BYTES // 4) == (True, True), (sent, peak)
                async with dial(listener.address, ring.dialing("a")) as dialer:
                    dialer.send(ping())
                    while not heard:
                        await asyncio.sleep(0.01)
                assert listener.owner_of(heard[0]) == "a"
            else:
                assert (sent >= 3 * ATTACK_BYTES, peak > ATTACK_BYTES // 2) == (True, True), (sent, peak)
            receiving.cancel()

    run(body())


def test_idle_connections_are_closed(ring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.sockets.HANDSHAKE_MS", 200)

    async def body() -> None:
        async with listen(LOOPBACK, ring.listening()) as listener:
            host, port = listener.address.removeprefix("tcp://").split(":")
            with contextlib.ExitStack() as stack:
                idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
                begun_s = time.monotonic()
                for connection in idle:
                    connection.settimeout(5)
                    while await asyncio.to_thread(connection.recv, 4096):
                        pass
                assert time.monotonic() - begun_s < 5

    run(body())
