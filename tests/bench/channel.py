"""The whole channel path against raw ZeroMQ, between two processes over loopback tcp, the default transport.

`channel_stream`: a server process streams 512 KiB groups; the learner side receives, decodes and reads every byte,
and acknowledges each group; at most WINDOW are unacknowledged, as leases would have it. The control sends the very
same frames, made once, through bare pyzmq: zero-copy, in a blocking loop without an event loop, a codec or types,
with the same reading and one-byte acknowledgements. What is lost is what our layers cost.

Missed so far: 0.82 to 0.88 on two busy cores (2026-11-22), where the ratio is that of CPU seconds, 1.1 to 1.2. Of about
280 us a group in both, ours adds 18 us for the codec with warm caches (some 20 more with cold ones) and 30 for two
event loops. Tried: small arrays in one frame (4 frames instead of 18: 11 % more groups, but the control gains as much),
thresholds from 4 to 31 KiB; waking the receiver without asking the socket for its events (4 % in one series, nothing in
another; not kept); sending below pyzmq's Python layer (kept); no garbage collection (nothing).
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import uvloop
import xxhash
import zmq

from protocol.channel import dial, listen
from protocol.codec import encode
from protocol.messages import Ack, AckStatus, Goodbye, Group
from tests.bench.harness import Row
from tests.factories import make_group

NUM_GROUPS, QUICK_NUM_GROUPS = 4000, 800
WARM_UP = 100
WINDOW = 16


def make_payload() -> Group:
    """Return a group of 64 completions x 1024 tokens."""
    return make_group(rewards=[0.0, 1.0] * 32, lengths=[1024] * 64, vocab_size=151_936)


def in_two_processes(send: Callable[[str, int], None], receive: Callable[[str, int], float], *, quick: bool) -> float:
    """Run `send(address, count)` in a child and return what `receive` measures here."""
    count = QUICK_NUM_GROUPS if quick else NUM_GROUPS
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    child = multiprocessing.get_context("spawn").Process(target=send, args=(address, count))
    child.start()
    figure = receive(address, count)
    child.join()
    assert child.exitcode == 0
    return figure


def channel(quick: bool) -> float:
    """Groups a second through listen, dial, encode and decode."""
    return in_two_processes(channel_send, channel_receive, quick=quick)


def channel_send(address: str, count: int) -> None:
    group = make_payload()

    async def stream() -> None:
        async with dial(address) as server:
            for number in range(count):
                if number >= WINDOW:
                    await server.recv(60)
                server.send(group)
            for _ in range(WINDOW):
                await server.recv(60)
            server.send(Goodbye(reason="done"))

    uvloop.run(stream())


def channel_receive(address: str, count: int) -> float:
    payload = make_payload()
    arrays = [name for name in payload.__struct_fields__ if isinstance(getattr(payload, name), np.ndarray)]

    async def collect() -> float:
        async with listen(address) as learner:
            for number in range(count):
                if number == WARM_UP:
                    started_s = time.perf_counter()
                peer, group = await learner.recv()
                read_every_byte(getattr(group, name) for name in arrays)
                learner.send(peer, Ack(group_id=group.group_id, attempt=group.attempt, status=AckStatus.OK))
            figure = (count - WARM_UP) / (time.perf_counter() - started_s)
            await learner.recv()
            return figure

    return uvloop.run(collect())


def read_every_byte(buffers: Iterable[Any]) -> int:
    """Hash the buffers: at memory speed, with next to no cost for small ones."""
    return sum(xxhash.xxh3_64_intdigest(buffer) for buffer in buffers)


def raw(quick: bool) -> float:
    """Groups a second of bare pyzmq."""
    return in_two_processes(raw_send, raw_receive, quick=quick)


def raw_send(address: str, count: int) -> None:
    frames = encode(make_payload())
    with zmq.Context() as context, context.socket(zmq.DEALER) as server:
        server.set(zmq.SNDHWM, 0)
        server.connect(address)
        for number in range(count):
            if number >= WINDOW:
                server.recv()
            server.send_multipart(frames, copy=False)
        for _ in range(WINDOW):
            server.recv()
        server.send(b"done")


def raw_receive(address: str, count: int) -> float:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as learner:
        learner.set(zmq.RCVHWM, 0)
        learner.bind(address)
        for number in range(count):
            if number == WARM_UP:
                started_s = time.perf_counter()
            peer, *frames = learner.recv_multipart(copy=False)
            read_every_byte(frames)
            learner.send_multipart([peer, b"+"])
        figure = (count - WARM_UP) / (time.perf_counter() - started_s)
        learner.recv_multipart()
        return figure


ROWS = [
    Row(
        name="channel_stream",
        control="raw pyzmq, same frames, zero-copy",
        ours=channel,
        baseline=raw,
        ratio="ours/baseline",
        target=0.9,
        unit="groups/s",
    ),
]
