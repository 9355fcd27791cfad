"""Passing weights on to other servers: what is here and verified is served, block by block, while the rest comes.

The learner names this server to others (WeightsReady.addresses), so that its own uplink carries few copies whatever the
number of servers. Here is only what to offer when, and for how long: the staged file is withdrawn, and left by every
chunk on its way out, before it is written again (I5). Called by the one thread that stages versions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from protocol.addresses import WILDCARD_HOSTS, parse_address, tcp_address
from protocol.errors import Superseded
from protocol.logs import event
from protocol.security import PLAIN, Security
from protocol.weights.filling import Filling
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Shipment
from protocol.weights.serving import Offer, ServeCounters, WeightsServer

log = logging.getLogger(__name__)

FREE_S = 5.0
"""A neighbor that reads so slowly keeps the old file; the next version is staged in a new one."""
FREE_CHECK_S = 0.01
FILES_LEFT = 1
"""Old files that neighbors may keep. While there are so many, nothing is passed on: memory stays bounded."""


class Relay:
    """Owns this server's end of the bulk plane towards other servers."""

    def __init__(self, address: str, security: Security = PLAIN) -> None:
        """Listen.

        Raises:
            ConfigError: the address is refused or in use.
        """
        self._server = WeightsServer(address, security, patient=True)
        self._left: list[MappedWeights] = []
        """Files given up while chunks of them were on their way."""

    @property
    def address(self) -> str:
        """Where it listens, with the port that the system chose; host `*` for every interface."""
        transport, host, port = parse_address(self._server.address)
        every = transport == "tcp" and host in WILDCARD_HOSTS
        return tcp_address("*", port) if every else self._server.address

    @property
    def counters(self) -> ServeCounters:
        """What was passed on."""
        return self._server.counters

    def vacate(self, file: MappedWeights, stop: threading.Event) -> bool:
        """Serve nothing any more; True when the file may be written, False if it is to be given up and made anew.

        Raises:
            Superseded: `stop` was set.
        """
        self._server.withdraw_all()
        deadline_s = time.monotonic() + FREE_S
        while not self._server.is_free(file):
            if time.monotonic() >= deadline_s:
                self._left.append(file)
                event(log, "relay_slow_neighbor", level=logging.WARNING, address=self.address, waited_s=FREE_S)
                return False
            if stop.wait(FREE_CHECK_S):
                raise Superseded("the fetch was called off while neighbors still read the version before")
        return True

    def offer(self, *shipments: tuple[Shipment, memoryview], file: MappedWeights) -> list[Callable[[int], None]]:
        """Pass on a version as it arrives. All ways in which it comes here are named at once.

        Args:
            shipments: What is fetched of the version, and where to.
            file: Where its tensors come to lie in the end.

        Returns:
            For each shipment, whom to tell of every block that is verified, by its index.
        """
        offers = [Offer(shipment, memory, Filling(shipment)) for shipment, memory in shipments]
        self._pass_on(offers, file)
        return [self._teller(offer.filling) for offer in offers]

    def whole(self, shipment: Shipment, file: MappedWeights) -> None:
        """Pass on a version that is all here."""
        filling = Filling(shipment)
        filling.all_arrived()
        self._pass_on([Offer(shipment, file.bytes(0, shipment.nbytes), filling)], file)

    def withdraw(self) -> None:
        """Serve nothing any more: the version is given up, or its file goes."""
        self._server.withdraw_all()

    def close(self) -> None:
        """Stop, and say what was passed on."""
        self._server.close()
        event(log, "passed_on", address=self.address, bytes=self.counters.bytes, waited=self.counters.parked)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _pass_on(self, offers: Sequence[Offer], file: MappedWeights) -> None:
        self._left = [left for left in self._left if not self._server.is_free(left)]
        passes_on = len(self._left) < FILES_LEFT
        self._server.pass_on(offers[0].shipment.version, offers if passes_on else (), file)

    def _teller(self, filling: Filling) -> Callable[[int], None]:
        def arrived(block: int) -> None:
            filling.arrived(block)
            self._server.arrived()

        return arrived
