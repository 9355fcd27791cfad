"""A ZeroMQ socket on an event loop: no polling, no thread, no zmq.asyncio (which costs several times the CPU).

A ZeroMQ socket signals through a file descriptor, edge-triggered: it says that *something* happened, and any call on
the socket may swallow the signal. So whoever waits does so only after a receive that found nothing, and every send
made during the wait looks at the socket's events again. Works on any loop with `add_reader`. Knows nothing of
messages; sockets are made in channel.py and handed in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import zmq

from protocol.codec import MAX_FRAMES, Buffer
from protocol.errors import PeerGone

RECV_BURST: Final = 64
"""Messages taken in a row before other tasks get their turn (I9): a flood cannot starve the loop."""
COPY_BELOW_BYTES: Final = 8192
"""Smaller frames become bytes: they lie unaligned in ZeroMQ's receive buffers, and would keep those alive."""

_FRAMES_KEPT: Final = MAX_FRAMES + 3
"""A peer's key and id, and one frame more than any message may have, so that the codec sees it was too many."""
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_send: Final = zmq.backend.Socket.send
"""(socket, frame, flags, copy): what zmq.Socket.send ends in, at half the cost per frame."""


class LoopSocket:
    """Owns one socket. One task receives; any callback of the same loop may send."""

    def __init__(self, socket: zmq.Socket[bytes], *, with_key: bool = False) -> None:
        """Take the socket over. `with_key`: put the sender's key in front of each message, where it has proved one."""
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._with_key = with_key
        self._fd = int(socket.get(zmq.FD))
        self._waiter: asyncio.Future[None] | None = None
        self._burst = 0
        self._heard_s = self._loop.time()
        self._heard = False
        self.first_frame: zmq.Frame | None = None
        """Of the message received last: ZeroMQ says with it where that came from."""
        self.broken = False
        """Nothing more is to be expected of the connection."""
        self._loop.add_reader(self._fd, self._on_signal)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message. Large frames are not copied: leave their memory alone until they have left.

        Raises:
            zmq.ZMQError: EHOSTUNREACH from a ROUTER whose peer is gone.
        """
        *parts, last = frames
        for frame in parts:
            _send(self._socket, frame, _NOBLOCK_MORE, False)
        _send(self._socket, last, _NOBLOCK, False)
        if self._waiter is not None:
            self._on_signal()

    async def recv(self, silence_s: float | None = None) -> list[Buffer] | None:
        """Wait for a message and return its frames; None when nothing at all arrived for `silence_s`, or it is broken.

        Cancelling loses no message.

        Raises:
            PeerGone: the socket was closed.
        """
        if self._burst >= RECV_BURST:
            self._burst = 0
            await asyncio.sleep(0)
        while (frames := self._take()) is None:
            self._burst = 0
            deadline_s = None if silence_s is None else self._heard_s + silence_s
            if self.broken or (deadline_s is not None and self._loop.time() >= deadline_s):
                return None
            await self._wait_readable(deadline_s)
        self._burst += 1
        self._heard_s = self._loop.time()
        self._heard = True
        return frames

    def break_off(self) -> None:
        """The connection is gone: what has arrived can still be received. Before anything was heard, none was made."""
        if self._heard:
            self.give_up()

    def give_up(self) -> None:
        """No connection will come about here, or none any more: whoever receives is told, after what has arrived."""
        self.broken = True
        self._wake()

    def close(self, linger_ms: int) -> None:
        """Close; what is queued may go on leaving for `linger_ms`. A task waiting in recv gets PeerGone."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger_ms)
            self._wake()

    def _take(self) -> list[Buffer] | None:
        """Return the frames of the next message, or None when there is none."""
        frames: list[Buffer] = []
        receive = self._socket.recv
        more = True
        while more:
            try:
                frame = receive(_NOBLOCK, False)
            except zmq.Again:  # only before the first frame: messages arrive whole
                return None
            except zmq.ZMQError as error:
                if self._socket.closed:
                    raise PeerGone("this end of the channel is closed") from error
                raise
            more = frame.more
            if not frames:
                self.first_frame = frame
                if self._with_key:
                    frames.append(str(frame.get("User-Id")).encode())
            if len(frames) < _FRAMES_KEPT:
                frames.append(frame.bytes if len(frame) < COPY_BELOW_BYTES else frame)
        return frames

    async def _wait_readable(self, deadline_s: float | None) -> None:
        """Wait until a message may be there, or loop time is `deadline_s`. Only right after a `_take` of None."""
        if self._waiter is not None:
            raise RuntimeError("two tasks receive from one channel: it has one owner")
        self._waiter = self._loop.create_future()
        timer = None if deadline_s is None else self._loop.call_at(deadline_s, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _on_signal(self) -> None:
        """Look at the events, which takes the signal back, and wake the receiver when there is a message."""
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
