"""Between the command and the learner: a Unix socket in the run directory, one JSON request and one JSON answer.

Only the user who runs the learner may connect (0600). The socket is there while the run goes on; of a learner that was
killed a dead one stays, which the next learner of the run, who has the lock, replaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from learner.journal_records import KnobRecord

SOCKET_FILE = "knobs.sock"
MAX_REQUEST_BYTES = 64 << 10
_READ_BYTES = 64 << 10


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Turn a knob; without a name, only show them."""

    name: str = ""
    value: float = 0.0
    reason: str = ""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A knob as it is now."""

    name: str
    value: float
    configured: float
    allowed: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request, and where the run is."""

    refused: str
    """Why nothing has changed; empty where nothing was asked for, or it was done."""
    changed: KnobRecord | None
    step: int
    slots_in_use: int
    slots_allowed: int
    knobs: list[Shown]
    history: list[KnobRecord]


@contextlib.contextmanager
def knob_socket(run_dir: Path) -> Iterator[socket.socket]:
    """Open the learner's end.

    Raises:
        OSError: the file system of the run directory has no sockets.
    """
    path = run_dir / SOCKET_FILE
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        with _short(path) as address:
            listener.bind(address)
        try:
            path.chmod(0o600)  # nobody can connect before it listens
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def receive(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> Request:
    """Read a request: everything until the other end has said all.

    Raises:
        msgspec.DecodeError: it is none.
    """
    data = bytearray()
    while len(data) <= MAX_REQUEST_BYTES and (piece := await loop.sock_recv(connection, _READ_BYTES)):
        data += piece
    return msgspec.json.decode(data, type=Request)


async def send(loop: asyncio.AbstractEventLoop, connection: socket.socket, answer: Answer) -> None:
    """Give the answer."""
    await loop.sock_sendall(connection, msgspec.json.encode(answer))


def ask(run_dir: Path, request: Request, *, timeout_s: float) -> Answer:
    """Ask the learner of a run, and wait for its answer. Blocks: for a command.

    Raises:
        ConnectionError, FileNotFoundError: no learner listens there.
        TimeoutError: no answer yet.
        msgspec.DecodeError: it ended instead of answering.
    """
    with socket.socket(socket.AF_UNIX) as connection, _short(run_dir / SOCKET_FILE) as address:
        connection.settimeout(timeout_s)
        connection.connect(address)
        connection.sendall(msgspec.json.encode(request))
        connection.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: connection.recv(_READ_BYTES), b""))
    return msgspec.json.decode(data, type=Answer)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a name of `path` that fits into a socket's address, which holds 107 bytes."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
