"""All sockets are made here: the control plane's on the event loop, the bulk plane's for one thread each.

This file knows ZeroMQ and event loops; it must not know what messages mean (codec.py turns them into frames)
nor who sends which. Flow control is by leases and requests, never by high-water marks: those drop silently.
"""

from __future__ import annotations

import functools
import itertools
import socket as stdlib_socket
from pathlib import Path

import zmq

from protocol.addresses import (
    WILDCARD_HOSTS,
    bulk_address,
    check_address,
    parse_address,
    resolve_address,
    tcp_address,
)
from protocol.codec import MAX_FRAME_BYTES
from protocol.errors import ConfigError

__all__ = [
    "bound_address",
    "bulk_address",
    "bulk_client_socket",
    "bulk_server_socket",
    "check_address",
    "resolve_address",
    "wake_pair",
]

LINGER_MS = 1000
"""How long a cleanly closed socket may go on sending what it still has (the Goodbye)."""
HANDSHAKE_MS = 3000
"""A connection whose ZMTP handshake takes longer is closed, so that idle ones hold no descriptors."""
RECONNECT_MS, RECONNECT_MAX_MS = 100, 2000
ZMTP_HEARTBEAT_MS, ZMTP_TIMEOUT_MS = 5000, 20000
"""ZeroMQ's own heartbeats only collect dead connections; liveness is decided by Ping and Pong."""

_IN_USE = "another process has it: stop that one or choose another address"
_pair_numbers = itertools.count()


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
