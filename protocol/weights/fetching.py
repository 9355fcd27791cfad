"""One end of the bulk plane: `WeightsFetcher` puts the bytes of a shipment in place (the other is serving.py).

It asks for stretches of a version's file, or of a delta (WeightsRequest), and gets them in chunks (WeightsChunk): one
copy into the final place, hashed there while still in the cache. Nothing is believed but the learner's digests, which
came over the control plane (I5): chunks may be lost, repeated, reordered, cut or forged on the way, and the outcome is
the right bytes, or an error and bytes that nobody uses. Requests are idempotent and name what they want, so a fetch
resumes over any new connection, to whomever, with what is still missing: of several sources (sources.py) it uses one at
a time, and leaves one that is silent, much slower than the next, or wrong.

The thread that calls `fetch` alone touches the sockets. This file must not know engines, training, or who announces
versions to whom.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import zmq

from protocol.channel import bulk_client_socket
from protocol.codec import encode
from protocol.errors import ConfigError, Superseded, WeightsError
from protocol.logs import event
from protocol.security import PLAIN, Security
from protocol.weights.assembly import Assembly, FetchCounters, Outcome
from protocol.weights.chunks import CHUNK_BYTES, Stretch
from protocol.weights.manifest import Shipment
from protocol.weights.sources import STRIKES, TRIAL_CHUNKS, TRIAL_LIMIT_S, Pace, Sources

log = logging.getLogger(__name__)

WINDOW = 32
"""Chunks asked for and not yet here: enough to hide a round trip, little to ask again after a cut."""
CHUNKS_PER_REQUEST = 16
"""4 MiB, the most that a WeightsRequest may ask for."""
STOP_CHECK_MS = 50
"""A fetch that hears nothing looks at its stop event this often."""
TRIAL_CHECK_MS = 5
"""And so often at a source that is on trial."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """A fetch that succeeded. The two times add up to its wall time."""

    transfer_s: float
    verify_s: float
    bytes: int
    """Put in place, refetches included."""
    refetched_blocks: int


class WeightsFetcher:
    """Fetches versions into memory, in the thread that calls it; one fetch at a time."""

    def __init__(self, security: Security = PLAIN) -> None:
        self.counters = FetchCounters()
        self.shut_out: set[str] = set()
        """Sources that sent wrong blocks three times in a row. They are not asked again."""
        self._strikes: Counter[str] = Counter()
        self._security = security
        self._keys: Mapping[str, str] = {}

    def fetch(
        self,
        shipment: Shipment,
        addresses: Sequence[str],
        destination: memoryview,
        *,
        stop: threading.Event,
        deadline_s: float,
        stall_s: float,
        keys: Mapping[str, str] = MappingProxyType({}),
        on_block: Callable[[int], None] | None = None,
    ) -> FetchReport:
        """Bring a shipment into `destination`, every block verified. After an error its bytes are not to be used.

        Args:
            shipment: What to fetch, from the learner's control plane.
            addresses: Who serves it, best first, the surest last; the next one is tried when one stalls, is much
                slower, sends wrong bytes or no longer has it.
            destination: [shipment.nbytes] writable; nobody reads of it but blocks that are verified.
            stop: Set by anyone to call the fetch off.
            deadline_s: Limit of the whole fetch.
            stall_s: Without a sign of life for so long, what is outstanding is asked for anew over a fresh socket.
            keys: Public key of who serves at an address, where that is not the learner.
            on_block: Told, by its index, of every block that is here and verified.

        Raises:
            Superseded: `stop` was set, or nobody serves it any more.
            IntegrityError: a block failed verification four times.
            WeightsError: the deadline passed, or no address is allowed.
        """
        assembly = Assembly(shipment, destination, self.counters, CHUNK_BYTES, on_block)
        self._keys = keys
        begun_s = time.monotonic()
        limits = _Limits(f"version {shipment.version}", stop, begun_s + deadline_s, stall_s)
        sources, struck = Sources(addresses, self.shut_out), set[str]()
        while not assembly.done:
            address = sources.current
            if address is None:
                raise Superseded(f"{limits.what} is no longer served by {', '.join(addresses)}")
            socket = self._connect(address, sources)
            if socket is None:
                continue
            with socket, contextlib.closing(_Trials(assembly, sources, self._connect, self.counters)) as trials:
                end = _converse(socket, assembly, sources, limits, trials)
            assembly.disconnected()
            if end is _End.WITHDRAWN:
                sources.remove(address)
            elif end is _End.WRONG:
                struck.add(address)
                self._strike(address, sources)
            elif end is not _End.DONE:
                self.counters.reconnects += end is _End.SILENT
                self.counters.moves += end is _End.SLOW
                sources.move_on()
        for address in set(addresses) - struck:
            del self._strikes[address]
        wall_s = time.monotonic() - begun_s
        refetched = sum(assembly.failures.values())
        return FetchReport(wall_s - assembly.verify_s, assembly.verify_s, assembly.bytes, refetched)

    def _connect(self, address: str, sources: Sources) -> zmq.Socket[bytes] | None:
        """Connect to a source; None, and no source any more, if that is not allowed and there are others."""
        try:
            return bulk_client_socket(address, self._security, server_public_key=self._keys.get(address))
        except ConfigError as error:  # here it is the learner's word, not this user's configuration
            if len(sources) == 1:
                raise WeightsError(f"weights cannot be fetched: {error}") from error
            event(log, "weights_source_refused", level=logging.WARNING, address=address, reason=error)
            sources.remove(address)
            return None

    def _strike(self, address: str, sources: Sources) -> None:
        """A source sent wrong bytes: the next one is asked. Three times in a row, and it is out."""
        self.counters.moves += 1
        self._strikes[address] += 1
        if self._strikes[address] < STRIKES or sources.is_anchor(address):
            sources.move_on()
            return
        self.shut_out.add(address)
        sources.remove(address)
        reason = f"it sent wrong bytes {STRIKES} times in a row"
        event(log, "weights_source_shut_out", level=logging.WARNING, address=address, reason=reason)


class _End(Enum):
    """Why a conversation with a source is over."""

    DONE = 0
    WITHDRAWN = 1
    WRONG = 2
    SILENT = 3
    SLOW = 4


def _converse(
    socket: zmq.Socket[bytes], assembly: Assembly, sources: Sources, limits: _Limits, trials: _Trials
) -> _End:
    """Ask and take in over one socket until the shipment is complete, or another source is to be asked."""
    heard_s, wait_ms = time.monotonic(), 0
    while not assembly.done:
        now_s = time.monotonic()
        limits.check(assembly, now_s)
        if now_s >= heard_s + limits.stall_s:
            return _End.SILENT
        if trials.won(now_s):
            return _End.SLOW
        _ask(socket, assembly)
        if wait_ms != (wait_ms := TRIAL_CHECK_MS if trials.going_on else STOP_CHECK_MS):
            socket.set(zmq.RCVTIMEO, wait_ms)
        try:
            frames = socket.recv_multipart(copy=False)
        except zmq.Again:
            continue
        here = assembly.bytes
        outcome = assembly.take_in(frames)
        if outcome is Outcome.WITHDRAWN:
            return _End.WITHDRAWN
        if outcome is Outcome.WRONG and len(sources) > 1:
            return _End.WRONG
        if outcome is not Outcome.USELESS:
            heard_s = now_s
        trials.pace.delivered(now_s, assembly.bytes - here)
    return _End.DONE


def _ask(socket: zmq.Socket[bytes], assembly: Assembly) -> None:
    """Keep up to a window outstanding, asking in large steps: each request wakes the other side up."""
    while assembly.plan.num_outstanding <= WINDOW - CHUNKS_PER_REQUEST:
        request = assembly.next_request(CHUNKS_PER_REQUEST)
        if request is None:
            return
        socket.send_multipart(encode(request))


class _Trials:
    """Asks the next source for a little, now and then, while a conversation with another goes on."""

    def __init__(
        self,
        assembly: Assembly,
        sources: Sources,
        connect: Callable[[str, Sources], zmq.Socket[bytes] | None],
        counters: FetchCounters,
    ) -> None:
        self.pace = Pace(time.monotonic())
        """Of the source of the moment."""
        self._assembly = assembly
        self._sources = sources
        self._connect = connect
        self._counters = counters
        self._socket: zmq.Socket[bytes] | None = None
        self._stretch = Stretch(0, 0)
        self._begun_s = 0.0
        self._came = 0

    @property
    def going_on(self) -> bool:
        """Whether one is."""
        return self._socket is not None

    def won(self, now_s: float) -> bool:
        """Begin one when it is time, take in what has come, and say whether the fetch should move."""
        if self._socket is None:
            if now_s >= self.pace.next_trial_s:
                self._begin(now_s)
            return False
        while self._came < self._stretch.nbytes and self._socket.poll(0):
            here = self._assembly.bytes
            outcome = self._assembly.take_in(self._socket.recv_multipart(copy=False), source=1)
            self._came += self._assembly.bytes - here
            if outcome not in (Outcome.USED, Outcome.USELESS):  # it has not got it, or not as it should be
                return self._over(now_s)
        took_s = now_s - self._begun_s
        if self._came >= self._stretch.nbytes:
            return self._over(now_s, self.pace.is_far_below(self._came, took_s, now_s))
        return took_s > TRIAL_LIMIT_S and self._over(now_s)

    def close(self) -> None:
        """Forget one that is going on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._assembly.plan.give_back(self._stretch)

    def _begin(self, now_s: float) -> None:
        address, request = self._sources.next, self._assembly.next_request(TRIAL_CHUNKS)
        if address is None or request is None:
            self.pace.tried(now_s)
        if request is None:
            return
        self._stretch, self._came, self._begun_s = Stretch(request.offset, request.length), 0, now_s
        self._socket = None if address is None else self._connect(address, self._sources)
        if self._socket is None:
            self._assembly.plan.give_back(self._stretch)
            return
        self._counters.trials += 1
        self._socket.send_multipart(encode(request))

    def _over(self, now_s: float, move: bool = False) -> bool:
        self.close()
        self.pace.tried(now_s)
        return move


@dataclass(frozen=True, slots=True)
class _Limits:
    """When a fetch ends without success. Times are of the monotonic clock."""

    what: str
    stop: threading.Event
    deadline_s: float
    stall_s: float

    def check(self, assembly: Assembly, now_s: float) -> None:
        """Go on only within them.

        Raises:
            Superseded: called off.
            WeightsError: the time is up.
        """
        if self.stop.is_set():
            raise Superseded(f"the fetch of {self.what} was called off")
        if now_s >= self.deadline_s:
            done, wanted = assembly.plan.num_done, assembly.plan.num_chunks
            raise WeightsError(f"{self.what}: only {done} of {wanted} chunks had arrived when its time was up")
