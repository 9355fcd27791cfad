"""All sockets are made here: the control plane's on the event loop, the bulk plane's for one thread each.

This file knows ZeroMQ and event loops; it must not know what messages mean (codec.py turns them into frames)
nor who sends which. Flow control is by leases and requests, never by high-water marks: those drop silently.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import socket as stdlib_socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import zmq

from protocol.addresses import (
    WILDCARD_HOSTS,
    bulk_address,
    check_address,
    parse_address,
    resolve_address,
    tcp_address,
)
from protocol.codec import MAX_FRAME_BYTES, Buffer, decode, encode
from protocol.connection_watch import ConnectionWatch
from protocol.errors import ConfigError, PeerGone, PeerSilent, ProtocolError
from protocol.loop_socket import LoopSocket
from protocol.messages import AnyMessage

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

LINGER_MS: Final = 1000
"""How long a cleanly closed socket may go on sending what it still has (the Goodbye)."""
HANDSHAKE_MS: Final = 3000
"""A connection whose ZMTP handshake takes longer is closed, so that idle ones hold no descriptors."""
RECONNECT_MS, RECONNECT_MAX_MS = 100, 2000
ZMTP_HEARTBEAT_MS, ZMTP_TIMEOUT_MS = 5000, 20000
"""ZeroMQ's own heartbeats only collect dead connections; liveness is decided by Ping and Pong."""

_IN_USE = "another process has it: stop that one or choose another address"
_pair_numbers = itertools.count()


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

        Raises:
            PeerGone: this end was closed.
        """

    def send(self, peer: bytes, message: AnyMessage) -> None:
        """Queue a message for a peer; never blocks, since leases bound what can be queued.

        Raises:
            PeerGone: no such peer is connected, or no longer.
        """


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


def listen(address: str, *, insecure_plaintext: bool = False) -> Listener:
    """Listen at `address` on the running event loop.

    Raises:
        ConfigError: the address is refused or in use.
    """
    return _ZmqListener(address, insecure_plaintext)


def dial(address: str, *, insecure_plaintext: bool = False) -> Dialer:
    """Connect to `address` on the running event loop; the listener need not be there yet.

    Raises:
        ConfigError: the address is refused.
    """
    return _ZmqDialer(address, insecure_plaintext)


class _ZmqChannel:
    """A ZeroMQ context (its own I/O thread) with one socket at a time."""

    def __init__(self, address: str, insecure_plaintext: bool) -> None:
        self._address = address
        self._insecure_plaintext = insecure_plaintext
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket = self._open()
        except ConfigError:
            self._context.term()
            raise

    def _open(self) -> LoopSocket:
        raise NotImplementedError

    async def close(self) -> None:
        self._socket.close(LINGER_MS)
        await asyncio.to_thread(self._context.term)  # returns when all has left, or after LINGER_MS

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _ZmqListener(_ZmqChannel):
    """ROUTER. Handover stays off: nobody takes over the routing id of a live connection."""

    def _open(self) -> LoopSocket:
        socket = _new_socket(self._context, zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        _bind(socket, self._address, self._insecure_plaintext)
        self._address = bound_address(socket)
        return LoopSocket(socket)

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
        return frames[0], _decode(frames[1:])

    def send(self, peer: bytes, message: AnyMessage) -> None:
        try:
            self._socket.send([peer, *encode(message)])
        except zmq.ZMQError as error:
            raise PeerGone(f"peer {peer!r} is not connected: {error.strerror}") from None


class _ZmqDialer(_ZmqChannel):
    """DEALER, under a routing id of its own making for every connection it opens."""

    def _open(self) -> LoopSocket:
        socket = _new_socket(self._context, zmq.DEALER)
        socket.set(zmq.ROUTING_ID, secrets.token_hex(8).encode())
        _connect(socket, self._address, self._insecure_plaintext)
        opened = LoopSocket(socket)
        self._watch = ConnectionWatch(socket, opened.break_off)
        return opened

    async def close(self) -> None:
        self._watch.close()
        await super().close()

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
        except zmq.ZMQError as error:
            raise PeerGone(f"cannot send to {self._address}: {error.strerror}") from None

    def reconnect(self) -> None:
        self._watch.close()
        self._socket.close(0)
        self._socket = self._open()


def _decode(frames: Sequence[Buffer]) -> AnyMessage | ProtocolError:
    try:
        return decode(frames)
    except ProtocolError as error:
        return error.with_traceback(None)  # which would keep the frames alive


def bound_address(socket: zmq.Socket[bytes]) -> str:
    """Return the address a socket is bound to, with the port the system chose."""
    return socket.get_string(zmq.LAST_ENDPOINT)


def bulk_server_socket(address: str, *, insecure_plaintext: bool = False) -> zmq.Socket[bytes]:
    """Return a ROUTER bound to `address` for the one thread that serves weights.

    Sending to a peer that has gone raises zmq.ZMQError (EHOSTUNREACH). Never blocks: the requests not yet
    answered bound what is queued. Close with `socket.close()`; nothing lingers, since transfers resume.

    Raises:
        ConfigError: the address is refused or in use.
    """
    socket = _new_socket(_bulk_context(), zmq.ROUTER)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    _bind(socket, address, insecure_plaintext)
    return socket


def bulk_client_socket(address: str, *, insecure_plaintext: bool = False) -> zmq.Socket[bytes]:
    """Return a DEALER connected to `address` for the one thread that fetches weights.

    Raises:
        ConfigError: the address is refused.
    """
    socket = _new_socket(_bulk_context(), zmq.DEALER)
    _connect(socket, address, insecure_plaintext)
    return socket


def wake_pair() -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Return two connected PAIR sockets: one for a bulk thread to poll, one for its owner to wake it with."""
    endpoint = f"inproc://wake-{next(_pair_numbers)}"
    polled, waker = _new_socket(_bulk_context(), zmq.PAIR), _new_socket(_bulk_context(), zmq.PAIR)
    polled.bind(endpoint)
    waker.connect(endpoint)
    return polled, waker


@functools.cache
def _bulk_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the bulk plane's own I/O thread: gigabytes of weights must not hold up a heartbeat."""
    return zmq.Context()


def _new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.set(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, ZMTP_TIMEOUT_MS)
    return socket


def _bind(socket: zmq.Socket[bytes], address: str, insecure_plaintext: bool) -> None:
    """Bind, or close the socket and say in one line why not."""
    try:
        check_address(address, insecure_plaintext)
        transport, host, port = parse_address(address)
        if transport == "ipc":
            _check_ipc_path_free(host)
            socket.bind(address)
        else:
            socket.set(zmq.IPV6, ":" in host)
            socket.bind(tcp_address("127.0.0.1" if host == "localhost" else host, port))
    except ConfigError:
        socket.close()
        raise
    except zmq.ZMQError as error:
        socket.close()
        why = _IN_USE if error.errno == zmq.EADDRINUSE else error.strerror
        raise ConfigError(f"cannot listen on {address}: {why}") from None


def _connect(socket: zmq.Socket[bytes], address: str, insecure_plaintext: bool) -> None:
    """Connect (which never waits), or close the socket and say in one line why not."""
    try:
        check_address(address, insecure_plaintext)
        transport, host, port = parse_address(address)
        if transport == "tcp" and (host in WILDCARD_HOSTS or port == 0):
            raise ConfigError(f"address {address}: to connect, a host and a port are needed")
        socket.set(zmq.IPV6, transport == "tcp" and ":" in host)
        socket.connect(address)
    except ConfigError:
        socket.close()
        raise
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot connect to {address}: {error.strerror}") from None


def _check_ipc_path_free(path: str) -> None:
    """Refuse a path in use: ZeroMQ would unlink what lies there, a live peer's socket or a user's file."""
    if path.startswith("@") or not Path(path).exists():
        return
    if not Path(path).is_socket():
        raise ConfigError(f"cannot listen on ipc://{path}: a file that is no socket lies there")
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # nobody accepts: left behind by a process that died
    raise ConfigError(f"cannot listen on ipc://{path}: another process has it: stop that one or choose another address")
