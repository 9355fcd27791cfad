"""All ZeroMQ sockets are made here, with their limits and their keys; the bulk plane's are handed to one thread each.

The control plane's are driven by channel.py. Flow control is by leases and requests, never by high-water marks: those
drop silently.
"""

from __future__ import annotations

import functools
import itertools
from typing import Final

import zmq

from protocol.addresses import WILDCARD_HOSTS, check_address, parse_address, tcp_address
from protocol.codec import MAX_FRAME_BYTES
from protocol.door import Door
from protocol.errors import ConfigError
from protocol.free_address import IN_USE, check_ipc_path_free
from protocol.security import PLAIN, Security

HANDSHAKE_MS: Final = 3000
"""A connection whose ZMTP handshake takes longer is closed, so that idle ones hold no descriptors."""
RECONNECT_MS, RECONNECT_MAX_MS = 100, 2000
ZMTP_HEARTBEAT_MS, ZMTP_TIMEOUT_MS = 5000, 20000
"""ZeroMQ's own heartbeats only collect dead connections; liveness is decided by Ping and Pong."""

_pair_numbers = itertools.count()


def bound_address(socket: zmq.Socket[bytes]) -> str:
    """Return the address a socket is bound to, with the port the system chose."""
    return socket.get_string(zmq.LAST_ENDPOINT)


def bulk_server_socket(address: str, security: Security = PLAIN) -> zmq.Socket[bytes]:
    """Return a ROUTER bound to `address` for the one thread that serves weights.

    Sending to a peer that has gone raises zmq.ZMQError (EHOSTUNREACH). Never blocks: the requests not yet
    answered bound what is queued. Close with `socket.close()`; nothing lingers, since transfers resume.

    Raises:
        ConfigError: the address is refused or in use.
    """
    socket = new_socket(_bulk_context(), zmq.ROUTER)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    if security.pair is not None:
        _bulk_door().guard(socket, security)
    try:
        bind(socket, address, security)
    except ConfigError:
        socket.close()
        raise
    return socket


def bulk_client_socket(
    address: str, security: Security = PLAIN, *, server_public_key: str | None = None
) -> zmq.Socket[bytes]:
    """Return a DEALER connected to `address` for the one thread that fetches weights.

    Args:
        address: who serves them.
        security: this process's keys.
        server_public_key: who that must be, where it is not the learner.

    Raises:
        ConfigError: the address is refused.
    """
    socket = new_socket(_bulk_context(), zmq.DEALER)
    try:
        connect(socket, address, security, server_public_key)
    except ConfigError:
        socket.close()
        raise
    return socket


def wake_pair() -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Return two connected PAIR sockets: one for a bulk thread to poll, one for its owner to wake it with."""
    endpoint = f"inproc://wake-{next(_pair_numbers)}"
    polled, waker = new_socket(_bulk_context(), zmq.PAIR), new_socket(_bulk_context(), zmq.PAIR)
    polled.bind(endpoint)
    waker.connect(endpoint)
    return polled, waker


@functools.cache
def _bulk_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the bulk plane's own I/O thread: gigabytes of weights must not hold up a heartbeat."""
    return zmq.Context()


@functools.cache
def _bulk_door() -> Door:
    """Return the bulk context's door: its sockets may have different keys and lists."""
    return Door(_bulk_context())


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """Return a socket with the limits that all have, neither bound nor connected."""
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


def bind(socket: zmq.Socket[bytes], address: str, security: Security) -> None:
    """Bind, or say in one line why not."""
    check_address(address, off_host=security.off_host)
    transport, host, port = parse_address(address)
    try:
        if transport == "ipc":
            check_ipc_path_free(host)
            socket.bind(address)
        else:
            socket.set(zmq.IPV6, ":" in host)
            socket.bind(tcp_address("127.0.0.1" if host == "localhost" else host, port))
    except zmq.ZMQError as error:
        why = IN_USE if error.errno == zmq.EADDRINUSE else error.strerror
        raise ConfigError(f"cannot listen on {address}: {why}") from None


def connect(socket: zmq.Socket[bytes], address: str, security: Security, server_public_key: str | None = None) -> None:
    """Connect (which never waits), or say in one line why not."""
    check_address(address, off_host=security.off_host)
    transport, host, port = parse_address(address)
    if transport == "tcp" and (host in WILDCARD_HOSTS or port == 0):
        raise ConfigError(f"address {address}: to connect, a host and a port are needed")
    security.protect_client(socket, server_public_key)
    socket.set(zmq.IPV6, transport == "tcp" and ":" in host)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot connect to {address}: {error.strerror}") from None
