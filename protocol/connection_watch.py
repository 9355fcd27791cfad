"""Notices that a connection broke, or that none came about, which ZeroMQ keeps to itself.

When TCP breaks (a reset, a lost route, a process that died), ZeroMQ connects again under the same routing id and goes
on: what was under way is lost, and nobody is told. Between learner and server each message counts, so a broken
connection must be a new one: with a fresh id, a Hello, and everything said again that still matters. After a handshake
that the other end refused, ZeroMQ does not even try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from protocol.security import HANDSHAKE_FAILURES


class ConnectionWatch:
    """Calls `on_break` whenever a connection of the socket ends, `on_failure` when a handshake fails.

    Made before the socket connects or binds, so that nothing is missed. Owned by the socket's owner, same loop.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], *, on_break: Callable[[], None], on_failure: Callable[[int, int], None]
    ) -> None:
        """Watch. `on_failure` is called with the monitor's event and value."""
        self._socket = socket
        self._on_break = on_break
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILURES)
        self._fd = int(self._monitor.get(zmq.FD))
        self._loop.add_reader(self._fd, self._on_signal)
        self._on_signal()

    def close(self) -> None:
        """Stop watching; before the socket closes. Again: does nothing."""
        if not self._monitor.closed:
            self._loop.remove_reader(self._fd)
            self._socket.disable_monitor()  # first: it must not write to a monitor that nobody reads
            self._monitor.close(0)

    def _on_signal(self) -> None:
        """Take every event there is, since the descriptor signals only the first of them."""
        while not self._monitor.closed and int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            message = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            if message["event"] == zmq.EVENT_DISCONNECTED:
                self._on_break()
            else:
                self._on_failure(int(message["event"]), int(message["value"]))
