"""Notices that a connection broke, which ZeroMQ keeps to itself.

When TCP breaks (a reset, a lost route, a process that died), ZeroMQ connects again under the same routing id and goes
on: what was under way is lost, and nobody is told. Between learner and server each message counts, so a broken
connection must be a new one: with a fresh id, a Hello, and everything said again that still matters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq


class ConnectionWatch:
    """Calls `on_break` whenever the socket's established connection ends. Owned by the socket's owner, same loop."""

    def __init__(self, socket: zmq.Socket[bytes], on_break: Callable[[], None]) -> None:
        self._socket = socket
        self._on_break = on_break
        self._loop = asyncio.get_running_loop()
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
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
        while int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            self._monitor.recv_multipart(zmq.NOBLOCK)
            self._on_break()
