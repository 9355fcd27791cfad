"""A peer that speaks to the learner without any of our channel code: what a broken or hostile process could send."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import zmq

from protocol.codec import decode, encode
from protocol.messages import AnyMessage, Hello, Refused, Welcome

DEADLINE_S = 10.0
M = TypeVar("M", bound=AnyMessage)


class RawPeer:
    """A plain DEALER socket."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def send_frames(self, frames: Sequence[bytes | memoryview]) -> None:
        """Send any bytes at all."""
        self._socket.send_multipart(frames)

    def send(self, message: AnyMessage, **changes: Any) -> None:
        """Send a message, with fields of its header changed in ways that our own types forbid."""
        header, *arrays = encode(message)
        fields = msgspec.msgpack.decode(header) | changes
        self.send_frames([msgspec.msgpack.encode(fields), *arrays])

    def expect(self, *kinds: type[M]) -> M:
        """Wait for a message of one of these types; others are passed over."""
        deadline = time.monotonic() + DEADLINE_S
        while (left_s := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(1000 * left_s)):
                message = decode(self._socket.recv_multipart())
                if isinstance(message, kinds):
                    return message
        raise AssertionError(f"no {kinds} came in {DEADLINE_S:g} s")

    def say_hello(self, **changes: Any) -> Welcome | Refused:
        """Introduce this peer as a scripted server, and return the answer."""
        hello = Hello(
            session="raw", server="raw", engine="scripted", room=0, vocab_size=4, model_digest="", tokenizer_digest="",
            reward_functions=("scripted",),
        )  # fmt: skip
        self.send(hello, **changes)
        return self.expect(Welcome, Refused)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)
