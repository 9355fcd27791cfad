"""When a path that weights come by is not taken again."""

from __future__ import annotations

import logging

from protocol.kinds import WeightsPath
from protocol.logs import event
from protocol.versions import Version

log = logging.getLogger(__name__)

STRIKES = 3
"""A path that brings wrong bytes so often in a row is not taken again."""


class Strikes:
    """Wrong versions in a row that came by one path. Pure, but for the line that says that it is out."""

    def __init__(self, path: WeightsPath) -> None:
        self._path = path
        self._wrong = 0

    @property
    def out(self) -> bool:
        """Whether the path is not to be taken any more."""
        return self._wrong >= STRIKES

    def right(self) -> None:
        """A version came whole: what was wrong before is forgotten."""
        self._wrong = 0

    def wrong(self, version: Version) -> None:
        """A version's bytes were wrong."""
        self._wrong += 1
        if self._wrong == STRIKES:
            text = f"{STRIKES} in a row: versions no longer come by {self._path}"
            event(log, "weights_path_quarantined", level=logging.ERROR, version=version, path=self._path, reason=text)
