"""Slow links between hosts, in a process of their own: TCP connections that pass through token buckets.

Every host has a link of its own with so many bytes per second out and as many in, whatever its connections: a byte from
host a to host b takes a token of a's outgoing and one of b's incoming bucket. Hosts are numbers; what is here of them
is a port for every (from, to) pair in use. A thread for each direction of a connection: they sleep, or are in a system
call, nearly all the time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

READ_BYTES = 64 << 10
BURST_S = 0.05
"""What a link did not carry in the last moment it may carry faster now: a busy machine wakes its threads late."""
BUFFER_BYTES = 256 << 10
"""Of every socket here: a link holds no more than it would in a router."""

Way = tuple[int, int]
"""(from host, to host): whose bytes are fetched, and who fetches them."""


class Bucket:
    """One direction of a host's link; whoever comes first is served first."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> float:
        """Return when so many bytes will have passed."""
        with self._lock:
            self._free_s = max(time.monotonic() - BURST_S, self._free_s) + nbytes / self._bytes_per_s
            return self._free_s


class Links:
    """All links of one process."""

    def __init__(self, rates: Mapping[int, float]) -> None:
        self._out = {host: Bucket(rate) for host, rate in rates.items()}
        self._in = {host: Bucket(rate) for host, rate in rates.items()}

    def open(self, way: Way, target: str) -> str:
        """Listen for `way[1]`, on behalf of `target`, which runs on `way[0]`; return the address."""
        listening = socket.create_server(("127.0.0.1", 0))
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            listening.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._start(self._accept, listening, way, target)
        return f"tcp://127.0.0.1:{listening.getsockname()[1]}"

    def _accept(self, listening: socket.socket, way: Way, target: str) -> None:
        source, sink = way
        host, port = target.removeprefix("tcp://").split(":")
        while True:
            near, _ = listening.accept()
            far = socket.socket()
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                far.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            try:
                far.connect((host, int(port)))
            except OSError:
                near.close()
                continue
            for end in (near, far):  # a link does not wait for more to send along
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._pump, far, near, source, sink)
            self._start(self._pump, near, far, sink, source)

    def _pump(self, reader: socket.socket, writer: socket.socket, source: int, sink: int) -> None:
        with contextlib.suppress(OSError):
            while data := reader.recv(READ_BYTES):
                passed_s = max(self._out[source].take(len(data)), self._in[sink].take(len(data)))
                time.sleep(max(0.0, passed_s - time.monotonic()))
                writer.sendall(data)
        for sock in (reader, writer):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, function: Callable[..., None], *args: object) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()


@contextlib.contextmanager
def open_links(rates: Mapping[int, float], targets: Mapping[Way, str]) -> Iterator[dict[Way, str]]:
    """Run links of so many bytes per second and host; yield where each way is to be dialed."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(dict(rates), dict(targets), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(rates: dict[int, float], targets: dict[Way, str], pipe: Connection) -> None:
    links = Links(rates)
    pipe.send({way: links.open(way, target) for way, target in targets.items()})
    threading.Event().wait()
