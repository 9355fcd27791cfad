"""How fast each server gets new weights: what a push should be measured by.

Fed with what the servers say of the versions they have brought live. Pure; belongs to the weights desk.
"""

from __future__ import annotations

import math
from typing import Final

from protocol.kinds import WeightsPath
from protocol.messages import WeightsLive
from protocol.weights.push_costs import NETWORK, TELLING_BYTES, LinkSpeed

SHARED: Final = LinkSpeed(math.inf)
"""Both ends map the same memory."""
LOOPBACK: Final = LinkSpeed(1.5e9)


class Links:
    """The links to the servers of the fleet, by server name.

    Args:
        local: Whether only processes of this host can be servers.
    """

    def __init__(self, *, local: bool) -> None:
        self._unseen = LOOPBACK if local else NETWORK
        self._links: dict[str, LinkSpeed] = {}

    @property
    def slowest(self) -> LinkSpeed:
        """The link that a push is waited for longest over; shared memory where there is no other. From any thread."""
        return min(tuple(self._links.values()), key=lambda link: link.bytes_per_s, default=SHARED)

    def joined(self, server: str) -> None:
        """Take note of a server, as fast as such links are taken for; nothing changes for one that is here."""
        self._links.setdefault(server, self._unseen)

    def left(self, server: str) -> None:
        """Forget a server."""
        self._links.pop(server, None)

    def live(self, server: str, report: WeightsLive) -> None:
        """Learn from a version that a server of the fleet has brought live."""
        if report.path is WeightsPath.SHARED:
            self._links[server] = SHARED
        elif report.bytes >= TELLING_BYTES and report.transfer_s > 0:
            link = self._links.get(server, self._unseen)
            if link == SHARED:  # it cannot read there any more
                link = self._unseen
            self._links[server] = link.after_transfer(report.bytes, report.transfer_s)
