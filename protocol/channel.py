"""The control plane's two ends on the event loop: one listens, the others dial.

This file knows ZeroMQ and event loops; it must not know what messages mean (codec.py turns them into frames)
nor who sends which. Sockets are made in sockets.py, those of the bulk plane too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

import zmq

from protocol.addresses import bulk_address, check_address, parse_address, resolve_address
from protocol.codec import Buffer, decode, encode
from protocol.connection_watch import ConnectionWatch
from protocol.door import Door
from protocol.errors import ConfigError, PeerGone, PeerSilent, ProtocolError
from protocol.free_address import remove_ipc_socket
from protocol.keys import KEY_CHARACTERS
from protocol.logs import event
from protocol.loop_socket import LoopSocket
from protocol.messages import AnyMessage
from protocol.security import PLAIN, Said, Security, is_mismatch, why_refused, why_turned_away
from protocol.sockets import (
    bind,
    bound_address,
    bulk_client_socket,
    bulk_server_socket,
    connect,
    new_socket,
    wake_pair,
)

__all__ = [
    "Dialer",
    "Listener",
    "bound_address",
    "bulk_address",
    "bulk_client_socket",
    "bulk_server_socket",
    "check_address",
    "dial",
    "listen",
    "resolve_address",
    "wake_pair",
]

log = logging.getLogger(__name__)

LINGER_MS: Final = 1000
"""How long a cleanly closed socket may go on sending what it still has (the Goodbye)."""


class Channel(Protocol):
    """What both ends have in common. Made listening or connecting; `async with` closes it."""

    async def close(self) -> None:
        """Close, giving what was sent a moment to leave. A task waiting in recv gets PeerGone."""

    async def __aenter__(self) -> Self:
        """Return the channel."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""


class Listener(Channel, Protocol):
    """The learner's end: hears every server, each under its peer id. One task receives."""

    @property
    def address(self) -> str:
        """Where it listens, with the port that the system chose."""

    @property
    def sender_host(self) -> str:
        """Host that the message received last came from; empty where that is not known (ipc)."""

    async def recv(self) -> tuple[bytes, AnyMessage | ProtocolError]:
        """Wait for (peer id, message). What is no message comes as a value: one bad peer stops nothing.

        A peer id stands for one connection and, where there are keys, for one key: nobody else's message has it.

        Raises:
            PeerGone: this end was closed.
        """

    def send(self, peer: bytes, message: AnyMessage) -> None:
        """Queue a message for a peer; never blocks, since leases bound what can be queued.

        Raises:
            PeerGone: no such peer is connected, or no longer.
        """

    def key_of(self, peer: bytes) -> str:
        """Public key (Z85) that the peer has proved to have; empty without keys."""

    def owner_of(self, peer: bytes) -> str:
        """Who that peer has proved to be: the name beside its key in the allow-list, or the key. Empty without keys."""

    def knows(self, owner: str) -> bool:
        """Whether the allow-list still has a key of that owner."""


class Dialer(Channel, Protocol):
    """A server's end: one connection to the learner, made anew by `reconnect`. One task receives."""

    def send(self, message: AnyMessage) -> None:
        """Queue a message; never blocks. While the learner is away it waits here, until `reconnect`.

        Raises:
            PeerGone: this end was closed.
        """

    async def recv(self, silence_s: float | None = None) -> AnyMessage | ProtocolError:
        """Wait for a message. What is no message comes as a value.

        Raises:
            PeerSilent: the connection broke, or nothing at all was heard for `silence_s` (None: wait for ever). Some
                messages may be lost, either way: `reconnect`, and settle with the listener what still matters.
            PeerGone: this end was closed.
        """

    def reconnect(self) -> None:
        """Drop the connection and what is queued on it; open another under a fresh routing id."""


def _nobody(text: str) -> None:
    """Show a line to nobody: it is in the log."""


def listen(address: str, security: Security = PLAIN, *, tell: Callable[[str], None] = _nobody) -> Listener:
    """Listen at `address` on the running event loop.

    `tell` is called, on any thread, with each line about a peer that was refused; the log has them, too.

    Raises:
        ConfigError: the address is refused or in use.
    """
    return _ZmqListener(address, security, tell)


def dial(address: str, security: Security = PLAIN) -> Dialer:
    """Connect to `address` on the running event loop; the listener need not be there yet.

    Who is refused says so in the log, and tries again with every `reconnect`.

    Raises:
        ConfigError: the address is refused.
    """
    return _ZmqDialer(address, security)


class _ZmqChannel:
    """A ZeroMQ context (its own I/O thread) with one socket at a time, watched."""

    _socket: LoopSocket
    _watch: ConnectionWatch | None
    _door: Door | None = None

    def __init__(self, address: str, security: Security) -> None:
        self._address = address
        self._security = security
        self._said = Said()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._open()
        except ConfigError:
            self._shut(0)
            self._context.term()
            raise

    def _open(self) -> None:
        raise NotImplementedError

    def _shut(self, linger_ms: int) -> None:
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger_ms)

    async def close(self) -> None:
        self._shut(LINGER_MS)
        await asyncio.to_thread(self._context.term)  # returns when all has left, or after LINGER_MS
        if self._door is not None:
            await asyncio.to_thread(self._door.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _ZmqListener(_ZmqChannel):
    """ROUTER. Handover stays off: nobody takes over the routing id of a live connection.

    With keys a peer id is the sender's key and its routing id, so that a routing id which somebody else comes by later
    stands for nobody.
    """

    def __init__(self, address: str, security: Security, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._key_length = KEY_CHARACTERS if security.pair else 0
        super().__init__(address, security)

    def _open(self) -> None:
        socket = new_socket(self._context, zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket = LoopSocket(socket, with_key=self._security.pair is not None)
        if self._security.pair is not None:
            self._watch = None  # the door watches it
            self._door = Door(self._context)
            self._door.guard(socket, self._security, self._tell)
        else:
            self._watch = ConnectionWatch(socket, on_break=lambda: None, on_failure=self._handshake_failed)
        bind(socket, self._address, self._security)
        self._address = bound_address(socket)

    async def close(self) -> None:
        if not self._context.closed:
            remove_ipc_socket(self._address)
        await super().close()

    @property
    def address(self) -> str:
        return self._address

    @property
    def sender_host(self) -> str:
        frame = self._socket.first_frame
        if frame is None or parse_address(self._address)[0] == "ipc":
            return ""
        return str(frame.get("Peer-Address"))

    async def recv(self) -> tuple[bytes, AnyMessage | ProtocolError]:
        frames = await self._socket.recv()
        assert frames is not None, "there is no limit on silence here"
        if not self._key_length:
            return frames[0], _decode(frames[1:])
        return frames[0] + frames[1], _decode(frames[2:])

    def send(self, peer: bytes, message: AnyMessage) -> None:
        try:
            self._socket.send([peer[self._key_length :], *encode(message)])
        except zmq.ZMQError as error:
            raise PeerGone(f"peer {peer!r} is not connected: {error.strerror}") from None

    def key_of(self, peer: bytes) -> str:
        return peer[: self._key_length].decode("ascii")

    def owner_of(self, peer: bytes) -> str:
        allowed = self._security.allowed
        return allowed.owner(peer[: self._key_length].decode("ascii")) if self._key_length and allowed else ""

    def knows(self, owner: str) -> bool:
        return self._security.allowed is not None and self._security.allowed.knows(owner)

    def _handshake_failed(self, what: int, value: int) -> None:
        if self._said.is_new(f"{what} {value}"):
            text = why_refused(self._security, f"a peer at {self._address}", what, value)
            event(log, "handshake_failed", level=logging.WARNING, text=text)
            self._tell(text)


class _ZmqDialer(_ZmqChannel):
    """DEALER, under a routing id of its own making for every connection it opens."""

    def _open(self) -> None:
        socket = new_socket(self._context, zmq.DEALER)
        socket.set(zmq.ROUTING_ID, secrets.token_hex(8).encode())
        self._socket = LoopSocket(socket)
        self._watch = ConnectionWatch(socket, on_break=self._socket.break_off, on_failure=self._handshake_failed)
        connect(socket, self._address, self._security)

    async def recv(self, silence_s: float | None = None) -> AnyMessage | ProtocolError:
        socket = self._socket
        try:
            frames = await socket.recv(silence_s)
        except PeerGone:
            if socket is self._socket:
                raise
            return await self.recv(silence_s)  # another task reconnected meanwhile
        if frames is None and socket.broken:
            raise PeerSilent(f"the connection to {self._address} broke")
        if frames is None:
            raise PeerSilent(f"heard nothing from {self._address} for {silence_s:g} s")
        return _decode(frames)

    def send(self, message: AnyMessage) -> None:
        try:
            self._socket.send(encode(message))
        except zmq.Again:
            return  # the handshake was refused, and ZeroMQ tries no more: `reconnect` would drop what is queued anyway
        except zmq.ZMQError as error:
            raise PeerGone(f"cannot send to {self._address}: {error.strerror}") from None

    def reconnect(self) -> None:
        self._shut(0)
        self._open()

    def _handshake_failed(self, what: int, value: int) -> None:
        """Say why. A learner whose key is being changed has one of several: the next connection tries the next one."""
        trusted = self._security.trusted
        known = what == zmq.EVENT_HANDSHAKE_FAILED_AUTH or is_mismatch(what, value)
        if trusted is not None and not known and trusted.turn():
            self._socket.give_up()
        elif self._said.is_new(f"{what} {value}"):
            text = why_turned_away(self._security, self._address, what, value)
            event(log, "handshake_failed", level=logging.WARNING, text=text)


def _decode(frames: Sequence[Buffer]) -> AnyMessage | ProtocolError:
    try:
        return decode(frames)
    except ProtocolError as error:
        return error.with_traceback(None)  # which would keep the frames alive
