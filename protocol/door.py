"""The door of a ZeroMQ context: admits to its listening sockets whose key is on their list, and nobody else.

libzmq asks over an inproc socket (ZAP, rfc.zeromq.org/spec/27) whether a key may come in; a context has one place for
the answer, so it has one Door, a thread. It also watches who knocks, to say so, and the lists: when a key is removed
that has come in, every connection of the socket is closed, for nothing tells which one is whose before a whole message
has come. Those still allowed are back within a second, and lose nothing: both planes connect anew all the time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket as stdlib_socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from protocol.keys import PublicKeys
from protocol.logs import event
from protocol.security import HANDSHAKE_FAILURES, Said, Security, why_refused

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5
"""How often the lists are looked at; every handshake looks, too."""
_ENDPOINT: Final = "inproc://zeromq.zap.01"
_WATCHED: Final = HANDSHAKE_FAILURES | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_numbers = itertools.count()


@dataclass(slots=True)
class Entrance:
    """One listening socket, as its door sees it."""

    security: Security
    allowed: PublicKeys
    domain: bytes
    monitor: zmq.Socket[bytes]
    tell: Callable[[str], None]
    """Called on the door's thread with each line worth a user's while."""
    known: Mapping[str, str]
    """The list at the last look."""
    admitted: set[str] = field(default_factory=set)
    """Keys that have come in, of those on the list."""
    connections: dict[int, str] = field(default_factory=dict)
    """Descriptor of each accepted connection to its peer's address."""
    failed: tuple[int, int] | None = None
    """Event and value of a failed handshake; which connection it was follows with its end."""
    said: Said = field(default_factory=Said)

    def say(self, name: str, what: str, text: str) -> None:
        """Log a line, and show it, unless `what` was said within a minute."""
        if self.said.is_new(what):
            event(log, name, level=logging.WARNING, text=text)
            self.tell(text)

    def admit(self, key: str, address: str) -> bool:
        """Decide on a key that has been proved."""
        self.allowed.refresh()
        if key in self.allowed.names:
            self.admitted.add(key)
            return True
        self.say(
            "key_refused", key,
            f"refused key {key} from {address}: to let that server in, add the key to {self.allowed.path}",
        )  # fmt: skip
        return False

    def note_events(self) -> bool:
        """Take note of what became of connections; False when the socket was closed."""
        while True:
            try:
                message = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return True
            what, value = int(message["event"]), int(message["value"])
            if what == zmq.EVENT_MONITOR_STOPPED:
                return False
            if what == zmq.EVENT_ACCEPTED:
                self.connections[value] = _peer_of(value)
            elif what == zmq.EVENT_DISCONNECTED:
                self._ended(self.connections.pop(value, "a peer"))
            elif what != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # of which `admit` has told
                self.failed = (what, value)

    def look(self) -> None:
        """Look whether a key that has come in was removed from the list; close the connections if so."""
        self.allowed.refresh()
        names, known = self.allowed.names, self.known
        self.known = names
        removed = [key for key in known if key not in names and key in self.admitted]
        if not removed:
            return
        self.admitted.difference_update(removed)
        self.note_events()  # whoever was admitted has been accepted before: all connections are known now
        for descriptor, peer in self.connections.items():
            _shut(descriptor, peer)
        for key in removed:
            self.say(
                "key_removed", f"removed {key}",
                f"key {key}{f' of {known[key]}' if known[key] else ''} is no longer in {self.allowed.path}: its"
                " connections are closed, and everybody else's, who come back by themselves",
            )  # fmt: skip

    def _ended(self, peer: str) -> None:
        if self.failed is not None:
            text = why_refused(self.security, peer, *self.failed)
            self.say("handshake_failed", f"{self.failed} {peer.rpartition(':')[0]}", text)
            self.failed = None


class Door:
    """See the module's text. Lives as long as its context: it ends when that is terminated."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._zap = context.socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        self._zap.bind(_ENDPOINT)
        self._coming: deque[Entrance] = deque()
        self._entrances: dict[zmq.Socket[bytes], Entrance] = {}
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    def guard(
        self, socket: zmq.Socket[bytes], security: Security, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Protect a socket that is to listen; before it is bound. `tell` is called on the door's thread."""
        assert security.allowed is not None, "keys without an allow-list: load_security was not asked for one"
        number = next(_numbers)
        domain, endpoint = f"headway-{number}".encode(), f"inproc://door-{number}"
        security.protect_server(socket, domain)
        socket.monitor(endpoint, _WATCHED)
        monitor = self._context.socket(zmq.PAIR)  # there before the first event: one that nobody takes blocks libzmq
        monitor.set(zmq.LINGER, 0)
        monitor.connect(endpoint)
        self._coming.append(Entrance(security, security.allowed, domain, monitor, tell, security.allowed.names))

    def join(self) -> None:
        """Wait for its end, which follows the context's."""
        self._thread.join()

    def _run(self) -> None:
        self._poller.register(self._zap, zmq.POLLIN)
        look_s = time.monotonic()
        with contextlib.suppress(zmq.ContextTerminated):
            while True:
                ready = dict(self._poller.poll(int(1000 * LOOK_S)))
                self._take_coming()
                if self._zap in ready:
                    self._answer()
                for monitor in [monitor for monitor in self._entrances if monitor in ready]:
                    if not self._entrances[monitor].note_events():
                        self._forget(monitor)
                if time.monotonic() - look_s >= LOOK_S:
                    look_s = time.monotonic()
                    for entrance in self._entrances.values():
                        entrance.look()
        for monitor in self._entrances:
            monitor.close(0)
        for entrance in self._coming:
            entrance.monitor.close(0)
        self._zap.close(0)

    def _take_coming(self) -> None:
        while self._coming:
            entrance = self._coming.popleft()
            self._entrances[entrance.monitor] = entrance
            self._poller.register(entrance.monitor, zmq.POLLIN)

    def _forget(self, monitor: zmq.Socket[bytes]) -> None:
        del self._entrances[monitor]
        self._poller.unregister(monitor)
        monitor.close(0)

    def _answer(self) -> None:
        """Answer one ZAP request: libzmq has checked that the peer has the secret key."""
        version, request, domain, address, _, mechanism, *credentials = self._zap.recv_multipart()
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        entrance = next((entrance for entrance in self._entrances.values() if entrance.domain == domain), None)
        admitted = bool(key) and entrance is not None and entrance.admit(key, address.decode("ascii", "replace"))
        verdict = [b"200", b"OK", key.encode()] if admitted else [b"400", b"unknown key", b""]
        self._zap.send_multipart([version, request, *verdict, b""])


def _peer_of(descriptor: int) -> str:
    """Return HOST:PORT of an accepted connection, or what can be said of one that has gone again."""
    try:
        with stdlib_socket.socket(fileno=os.dup(descriptor)) as connection:
            return _name_peer(connection)
    except OSError:
        return "a peer"


def _name_peer(connection: stdlib_socket.socket) -> str:
    name = connection.getpeername()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a peer of this host"


def _shut(descriptor: int, peer: str) -> None:
    """End a connection under libzmq, which then notices. If it has ended already, its number may be another's now."""
    with contextlib.suppress(OSError), stdlib_socket.socket(fileno=os.dup(descriptor)) as connection:
        if _name_peer(connection) == peer:
            connection.shutdown(stdlib_socket.SHUT_RDWR)
