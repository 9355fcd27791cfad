"""Small messages through the channel against zmq.asyncio, between two processes over loopback tcp.

A server process sends heartbeats (Ping with its status) and the learner answers each with an Ack, as it does groups; at
most WINDOW are unanswered. Ours encodes and decodes every message; the control sends the very same frames, made once,
through zmq.asyncio's sockets, and looks at none. Ours runs on uvloop, as shipped, the control on asyncio's own
loop (`control_messages`) and on uvloop (`control_messages_uvloop`). Counted are messages of both ways, and the CPU
seconds of both processes.

Missed so far: 2.9 to 4.4 times the messages, 2.4 to 3.2 times less CPU, on a machine with other work (2026-11-30, three
short rounds and one). In the one, a message took 20 us of CPU in ours, 64 in zmq.asyncio, and 15 in bare blocking
sockets without a codec or a loop: 4.4 times less CPU than zmq.asyncio is all that pyzmq itself would give here.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import uvloop
import zmq
import zmq.asyncio

from protocol.channel import dial, listen
from protocol.codec import encode
from protocol.messages import Ack, AckStatus, Ping, ServerStatus
from tests.bench.harness import Figures, Row

T = TypeVar("T")
Runner = Callable[[Coroutine[Any, Any, T]], T]
NUM_MESSAGES, QUICK_NUM_MESSAGES = 40_000, 8_000
WARM_UP = 500
WINDOW = 64
PING = Ping(
    sent_s=1.5, status=ServerStatus(samples_running=85, samples_waiting=31, tokens_generated=123456, wall_s=9.5)
)
ACK = Ack(group_id="5f1c" * 8, attempt=1, status=AckStatus.OK)


class Stopwatch:
    """Wall and CPU seconds of this process from the warm-up on."""

    def start(self) -> None:
        """Begin."""
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds since then: (wall, CPU)."""
        return time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s


def in_two_processes(serve: Callable[..., Any], learn: Callable[..., Any], runner: Runner[Any], quick: bool) -> Figures:
    """Run `serve(address, count)` in a child and `learn(address, count)` here; return both figures."""
    count = QUICK_NUM_MESSAGES if quick else NUM_MESSAGES
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=run_server, args=(serve, runner, address, count, there))
    child.start()
    wall_s, cpu_s = runner(learn(address, count))
    cpu_s += here.recv()
    child.join()
    messages = 2 * (count - WARM_UP)
    return {"figure": messages / wall_s, "cpu_us": 1e6 * cpu_s / messages, "cpu_s": cpu_s}


def run_server(serve: Callable[..., Any], runner: Runner[Any], address: str, count: int, learner: Connection) -> None:
    _, cpu_s = runner(serve(address, count))
    learner.send(cpu_s)


def channel(quick: bool) -> Figures:
    return in_two_processes(channel_serve, channel_learn, uvloop.run, quick)


def zmq_asyncio(quick: bool) -> Figures:
    return in_two_processes(zmq_serve, zmq_learn, asyncio.run, quick)


def zmq_asyncio_on_uvloop(quick: bool) -> Figures:
    return in_two_processes(zmq_serve, zmq_learn, uvloop.run, quick)


async def channel_serve(address: str, count: int) -> tuple[float, float]:
    watch = Stopwatch()
    async with dial(address) as learner:
        for _ in range(WINDOW):
            learner.send(PING)
        for number in range(count):
            if number == WARM_UP:
                watch.start()
            assert isinstance(await learner.recv(60), Ack)
            if number + WINDOW < count:
                learner.send(PING)
        return watch.read()


async def channel_learn(address: str, count: int) -> tuple[float, float]:
    watch = Stopwatch()
    async with listen(address) as servers:
        for number in range(count):
            if number == WARM_UP:
                watch.start()
            peer, message = await servers.recv()
            assert isinstance(message, Ping)
            servers.send(peer, ACK)
        return watch.read()


async def zmq_serve(address: str, count: int) -> tuple[float, float]:
    watch, frames = Stopwatch(), encode(PING)
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as learner:
        learner.connect(address)
        for _ in range(WINDOW):
            await learner.send_multipart(frames)
        for number in range(count):
            if number == WARM_UP:
                watch.start()
            await learner.recv_multipart()
            if number + WINDOW < count:
                await learner.send_multipart(frames)
        return watch.read()


async def zmq_learn(address: str, count: int) -> tuple[float, float]:
    watch, frames = Stopwatch(), encode(ACK)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as servers:
        servers.bind(address)
        for number in range(count):
            if number == WARM_UP:
                watch.start()
            peer, *_ = await servers.recv_multipart()
            await servers.send_multipart([peer, *frames])
        return watch.read()


def rows(name: str, control: str, baseline: Callable[[bool], Figures]) -> list[Row]:
    """Compare the rate, and the CPU time of a message."""
    return [
        Row(
            name=name, control=control, ours=channel, baseline=baseline, ratio="ours/baseline", target=5.0,
            unit="messages/s", contest="control_messages",
        ),
        Row(
            name=f"{name}_cpu", control=control, ours=channel, baseline=baseline, ratio="baseline/ours", target=5.0,
            unit="CPU us a message", figure="cpu_us", contest="control_messages",
        ),
    ]  # fmt: skip


ROWS = [
    *rows("control_messages", "zmq.asyncio, same frames", zmq_asyncio),
    *rows("control_messages_uvloop", "zmq.asyncio on uvloop, same frames", zmq_asyncio_on_uvloop),
]
