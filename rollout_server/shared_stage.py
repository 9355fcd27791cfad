"""The learner's own file, for a server on the same host: claimed, verified and loaded where it lies.

No byte is copied on its way to the engine, and every byte is verified (I5). The claim is kept until the engine has
loaded, so that the learner cannot write the next version under it. Whatever is wrong with the file, the version comes
over the bulk plane instead; that is said once, for it is the same for every version of a learner on another host.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from protocol.errors import IntegrityError, Superseded, WeightsError
from protocol.kinds import WeightsPath
from protocol.logs import event
from protocol.parallel import in_threads
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Block, Manifest, digest
from protocol.weights.shared import SharedReader
from rollout_server.strikes import Strikes

log = logging.getLogger(__name__)


class SharedStage:
    """Owns this server's claim on the learner's files."""

    def __init__(self, directory: Path) -> None:
        self._reader = SharedReader(directory)
        self._said = False
        self.refused = 0
        """Versions that could not be read where they lie, since the start."""
        self._strikes = Strikes(WeightsPath.SHARED)

    def bring(self, manifest: Manifest, name: str, stop: threading.Event) -> tuple[MappedWeights, float] | None:
        """Claim and verify the learner's file.

        Args:
            manifest: of the version.
            name: of the file, as announced; empty where there is none.
            stop: set by anyone to call it off.

        Returns:
            (the file, seconds of hashing); None where it cannot be had this way.

        Raises:
            Superseded: `stop` was set.
        """
        self._reader.release()
        if not name or self._strikes.out:
            return None
        try:
            mapped = self._reader.claim(name, manifest.layout)
            begun_s = time.monotonic()
            _verify(mapped, manifest, stop)
            self._strikes.right()
            return mapped, time.monotonic() - begun_s
        except Superseded:
            self._reader.release()
            raise
        except WeightsError as error:
            self._reader.release()
            self.refused += 1
            level = logging.ERROR if isinstance(error, IntegrityError) else logging.INFO
            if not self._said or level == logging.ERROR:
                event(log, "weights_not_shared", level=level, version=manifest.version, reason=error)
            self._said = True
            if isinstance(error, IntegrityError):
                self._strikes.wrong(manifest.version)
            return None

    def release(self) -> None:
        """Give the claim up, unless a load that was given up may still be reading."""
        self._reader.release()

    def loaded(self) -> None:
        """Give every claim up: the engine has finished a load, and with it what it began before."""
        self._reader.settle()

    def doubt(self) -> None:
        """Keep the claim until an engine has loaded something else: perhaps the file is still being read."""
        self._reader.doubt()

    def close(self) -> None:
        """Give up claims and mappings."""
        self._reader.close()


def _verify(mapped: MappedWeights, manifest: Manifest, stop: threading.Event) -> None:
    blocks = manifest.shipment.blocks

    def is_right(block: Block) -> bool:
        return digest(manifest.algorithm, mapped.bytes(block.offset, block.nbytes)) == block.digest

    looks = in_threads(is_right, blocks, nbytes=manifest.file_bytes)
    with contextlib.closing(looks):  # none reads on once the claim is given up
        for index, right in looks:
            if stop.is_set():
                raise Superseded(f"the reading of version {manifest.version} was called off")
            if not right:
                raise IntegrityError(f"{mapped.path.name}, {blocks[index].what}: its bytes do not hash to the manifest")
