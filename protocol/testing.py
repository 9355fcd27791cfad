"""A network in memory, with faults: the same Listener and Dialer as channel.py's, for tests without sockets.

    network = MemoryNetwork(seed=7, faults=Faults(delay_s=0.02, loss=0.1))
    listener, server = network.listener(), network.dialer("server-0")
    network.cut("server-0")

Messages pass through the codec as on the wire. What happens is drawn from `seed`; time is the running loop's, so
that a virtual clock works. Messages are lost, doubled, delayed or cut off, but never overtake one another: TCP does
not reorder. `network.witness` counts the faults that really happened: a fault test asserts that its fault did.
Passes the same contract suite as the real channel.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from protocol.channel import Dialer, Listener
from protocol.codec import Buffer, decode, encode
from protocol.errors import ConfigError, PeerGone, PeerSilent, ProtocolError
from protocol.loop_socket import RECV_BURST
from protocol.messages import AnyMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What the network does to each message, each way."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Uniform, on top of delay_s."""
    loss: float = 0.0
    """Probability."""
    duplication: float = 0.0
    """Probability."""


@dataclass(slots=True)
class Witness:
    """What really happened, in messages."""

    sent: int = 0
    delivered: int = 0
    lost: int = 0
    duplicated: int = 0
    delayed: int = 0
    cut: int = 0
    """Lost because the peer was cut off."""


class MemoryNetwork:
    """One listener and any number of dialers, each known by a name of the test's choice."""

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        """May be replaced at any time; holds for what is sent from then on."""
        self.witness = Witness()
        self.random = random.Random(seed)
        self._listener: _MemoryListener | None = None
        self._dialers: dict[str, _MemoryDialer] = {}
        self._connections = 0
        self._no_listener: deque[tuple[bytes, list[Buffer]]] = deque()

    def listener(self) -> Listener:
        """Return the listener. Another one may be made when it is closed: dialers reach that one then.

        Raises:
            ConfigError: there is one, and it is open.
        """
        if self._listener is not None and not self._listener.inbox.closed:
            raise ConfigError("cannot listen on memory: another listener has it")
        self._listener = _MemoryListener(self)
        while self._no_listener:
            peer, frames = self._no_listener.popleft()
            if self.find_dialer(peer) is not None:
                self._listener.inbox.put((peer, frames))
        return self._listener

    def dialer(self, name: str) -> Dialer:
        """Return a connection of that name; what it sends before there is a listener waits for one."""
        self._dialers[name] = _MemoryDialer(self)
        return self._dialers[name]

    def cut(self, name: str, *, to_listener: bool = True, to_dialer: bool = True) -> None:
        """Lose everything from (`to_listener`) and to (`to_dialer`) that dialer until `heal`. Neither end is told."""
        self._dialers[name].cut = (to_listener, to_dialer)

    def reset(self, name: str) -> None:
        """Break that dialer's connection, as a TCP reset does: what is under way is lost, and the dialer is told."""
        self._dialers[name].break_off()

    def heal(self, name: str) -> None:
        """End a cut. What was lost stays lost."""
        self._dialers[name].cut = (False, False)

    def next_peer(self) -> bytes:
        """Return a peer id never used before."""
        self._connections += 1
        return f"memory-{self._connections}".encode()

    def find_dialer(self, peer: bytes) -> _MemoryDialer | None:
        """Return the open connection of that id."""
        for dialer in self._dialers.values():
            if dialer.peer == peer and not dialer.inbox.closed:
                return dialer
        return None

    def lose_listener(self) -> None:
        """The listener has closed: every connection to it is broken."""
        for dialer in self._dialers.values():
            dialer.from_listener.end(dialer.inbox.break_off)

    def deliver_to_listener(self, peer: bytes, frames: list[Buffer]) -> None:
        """Hand a message that has arrived to whoever listens, now or later."""
        if self._listener is not None and not self._listener.inbox.closed:
            self._listener.inbox.put((peer, frames))
        else:
            self._no_listener.append((peer, frames))


class _Inbox:
    """What has arrived and was not received yet."""

    def __init__(self) -> None:
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[bytes, list[Buffer]] | None] = asyncio.Queue()
        self._heard_s = self._loop.time()
        self._heard = False
        self.broken = False
        self._burst = 0

    def break_off(self) -> None:
        """The connection is gone; what has arrived can still be received. Before anything was heard, none was made."""
        if self._heard and not self.broken:
            self.broken = True
            self._arrived.put_nowait(None)

    def put(self, item: tuple[bytes, list[Buffer]]) -> None:
        self._arrived.put_nowait(item)

    def close(self) -> None:
        self.closed = True
        self._arrived.put_nowait(None)

    async def get(self, silence_s: float | None) -> tuple[bytes, AnyMessage | ProtocolError] | None:
        """Like LoopSocket.recv: None after `silence_s` without a message, or when the connection is broken."""
        self._burst = 0 if self._arrived.empty() else self._burst + 1
        if self._burst >= RECV_BURST:
            self._burst = 0
            await asyncio.sleep(0)
        if self.broken and self._arrived.empty():
            return None
        deadline_s = None if silence_s is None or not self._arrived.empty() else self._heard_s + silence_s
        try:
            async with asyncio.timeout_at(deadline_s):
                item = await self._arrived.get()
        except TimeoutError:
            return None
        if self.closed:
            raise PeerGone("this end of the channel is closed")
        if item is None:
            return None  # broken
        self._heard_s = self._loop.time()
        self._heard = True
        try:
            return item[0], decode(item[1])
        except ProtocolError as error:
            return item[0], error.with_traceback(None)


class _Link:
    """One direction of one connection: a queue that only its front leaves, so that nothing overtakes."""

    def __init__(
        self, network: MemoryNetwork, is_cut: Callable[[], bool], arrive: Callable[[list[Buffer]], None]
    ) -> None:
        self._network = network
        self._is_cut = is_cut
        self._arrive = arrive
        self._under_way: deque[list[Buffer]] = deque()
        self._last_due_s = 0.0

    def send(self, message: AnyMessage) -> None:
        frames: list[Buffer] = [bytes(frame) for frame in encode(message)]
        network, faults, witness = self._network, self._network.faults, self._network.witness
        witness.sent += 1
        lost = network.random.random() < faults.loss
        doubled = network.random.random() < faults.duplication
        delay_s = faults.delay_s + faults.jitter_s * network.random.random()
        if self._is_cut():
            witness.cut += 1
        elif lost:
            witness.lost += 1
        else:
            witness.duplicated += doubled
            witness.delayed += delay_s > 0
            for _ in range(1 + doubled):
                self._schedule(frames, delay_s)

    def drop(self) -> None:
        """Lose what is under way: the connection is gone."""
        self._network.witness.lost += len(self._under_way)
        self._under_way.clear()

    def end(self, ended: Callable[[], None]) -> None:
        """Call `ended` when all that is under way has arrived."""
        loop = asyncio.get_running_loop()
        loop.call_at(max(self._last_due_s, loop.time()), lambda: loop.call_soon(ended))

    def _schedule(self, frames: list[Buffer], delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._under_way.append(frames)
        self._last_due_s = max(self._last_due_s, loop.time() + delay_s)
        loop.call_at(self._last_due_s, self._front_arrives)

    def _front_arrives(self) -> None:
        if not self._under_way:
            return  # dropped
        frames = self._under_way.popleft()
        if self._is_cut():
            self._network.witness.cut += 1
        else:
            self._network.witness.delivered += 1
            self._arrive(frames)


class _MemoryChannel:
    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self.inbox = _Inbox()

    async def close(self) -> None:
        if not self.inbox.closed:
            self.inbox.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _MemoryListener(_MemoryChannel):
    async def close(self) -> None:
        if not self.inbox.closed:
            self._network.lose_listener()
        await super().close()

    @property
    def address(self) -> str:
        return "memory"

    @property
    def sender_host(self) -> str:
        return ""

    async def recv(self) -> tuple[bytes, AnyMessage | ProtocolError]:
        item = await self.inbox.get(None)
        assert item is not None, "there is no limit on silence here"
        return item

    def key_of(self, peer: bytes) -> str:
        return ""

    def owner_of(self, peer: bytes) -> str:
        return ""  # there are no keys in memory

    def knows(self, owner: str) -> bool:
        return False

    def send(self, peer: bytes, message: AnyMessage) -> None:
        dialer = None if self.inbox.closed else self._network.find_dialer(peer)
        if dialer is None:
            raise PeerGone(f"peer {peer!r} is not connected")
        dialer.from_listener.send(message)


class _MemoryDialer(_MemoryChannel):
    def __init__(self, network: MemoryNetwork) -> None:
        super().__init__(network)
        self.cut = (False, False)
        self._open()

    def _open(self) -> None:
        peer = self.peer = self._network.next_peer()
        inbox = self.inbox
        self.from_listener = _Link(self._network, lambda: self.cut[1], lambda frames: inbox.put((peer, frames)))
        self._to_listener = _Link(
            self._network, lambda: self.cut[0], lambda frames: self._network.deliver_to_listener(peer, frames)
        )

    def send(self, message: AnyMessage) -> None:
        if self.inbox.closed:
            raise PeerGone("this end of the channel is closed")
        self._to_listener.send(message)

    async def recv(self, silence_s: float | None = None) -> AnyMessage | ProtocolError:
        inbox = self.inbox
        try:
            item = await inbox.get(silence_s)
        except PeerGone:
            if inbox is self.inbox:
                raise
            return await self.recv(silence_s)  # another task reconnected meanwhile
        if item is None and inbox.broken:
            raise PeerSilent("the connection to memory broke")
        if item is None:
            raise PeerSilent(f"heard nothing from memory for {silence_s:g} s")
        return item[1]

    def break_off(self) -> None:
        self.from_listener.drop()
        self._to_listener.drop()
        self.inbox.break_off()

    def reconnect(self) -> None:
        self.from_listener.drop()
        self._to_listener.drop()
        self.inbox.close()
        self.inbox = _Inbox()
        self._open()
