"""Versions on their way into one life of SGLang after the other: checked, swapped in, checked again.

all weights:  file against schema -> pause -> update -> resume -> checksum, canaries -> live
few changes:  the same, and what is set in the pause is what differs from the version before (sparse.py)
an adapter:   file against schema -> load -> canaries -> live; what samples goes on with the one before
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from protocol.logs import event
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import EngineFailure, LoadReport, StagedWeights
from rollout_server.engines.base_model import BaseModel
from rollout_server.engines.changes import Changes, changes_to, check_changes, share_of
from rollout_server.engines.sglang.adapters import write_adapter
from rollout_server.engines.sglang.check import Gate, Mismatch
from rollout_server.engines.sglang.client import CallRefused, ServerInfo
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.schema import ModelSchema, check_adapter_file, check_file
from rollout_server.engines.sglang.sparse import DENSE_ABOVE, SparseLoads
from rollout_server.engines.sglang.swap import (
    check,
    check_adapter,
    condemning,
    gate_kind,
    link_weights,
    swap,
    unlink_weights,
)

log = logging.getLogger(__name__)


class Loading:
    """Brings versions into whichever life there is.

    Args:
        config: of the server.
        schema: of its model.
        max_length: tokens SGLang takes in all.
        meter: told of pauses.
        waits: where waiting for samples to end is shown.
        clock: monotonic seconds.
        went_live: told of a version that has passed its check, before `load` returns.
    """

    def __init__(
        self, config: ServerConfig, schema: ModelSchema, *, max_length: int, meter: Meter, waits: Waits,
        clock: Callable[[], float], went_live: Callable[[Life, Version], None],
    ) -> None:  # fmt: skip
        self._config, self._schema, self._max_length = config, schema, max_length
        self._base = BaseModel(Path(config.model))
        self._meter, self._waits, self._clock = meter, waits, clock
        self._went_live = went_live
        self._gate: Gate | None = None
        self._linked: set[Path] = set()
        """Files that have a directory for SGLang beside them."""

    def begin(self, info: ServerInfo) -> None:
        """Take note of what a new life is: checksums are compared within a kind."""
        if self._gate is None or self._gate.kind != gate_kind(info):
            self._gate = Gate(gate_kind(info))

    def check_file(self, weights: StagedWeights) -> set[str]:
        """Check a version against the model, on a thread; return the dtypes that SGLang keeps exactly.

        Raises:
            EngineFailure: it does not fit.
            ConfigError: it is an adapter to another base model.
        """
        if weights.adapter is None:
            if weights.changes is not None:
                check_changes(weights.path.name, weights.changes, self._schema.shapes)
            return check_file(weights.path, self._schema)
        self._base.check(weights.adapter)
        check_adapter_file(weights.path, weights.adapter, self._schema, self._config.lora_target_modules)
        return set()

    async def load(self, life: Life, weights: StagedWeights, dtypes: set[str]) -> LoadReport:
        """Bring a checked version in; see Engine.load_weights.

        Args:
            life: of SGLang.
            weights: the version.
            dtypes: of `check_file`.
        """
        return await (self._load_adapter(life, weights) if life.adapters else self._load(life, weights, dtypes))

    async def close(self) -> None:
        """Remove what has been made beside files."""
        for file in tuple(self._linked):
            await asyncio.to_thread(unlink_weights, file)

    async def _load(self, life: Life, weights: StagedWeights, dtypes: set[str]) -> LoadReport:
        """Swap weights, all or what differs, then check them while they sample."""
        assert self._gate is not None
        assert life.sparse is not None
        changes = self._few_changes(life.sparse, life.sampling, weights)
        async with self._beside(weights.path):
            directory = await asyncio.to_thread(link_weights, weights.path)
            if changes is not None:
                staged_bytes = await asyncio.to_thread(life.sparse.stage, weights.path, changes, directory)
                event(log, "weights_few", version=weights.version, base=weights.base, bytes=staged_bytes)
            with condemning(life, weights.version):
                pause_s = await swap(
                    life, directory, weights.version, self._config.weight_update_mode, few=changes is not None,
                    meter=self._meter, waits=self._waits, clock=self._clock,
                )  # fmt: skip
                begun_s = self._clock()
                exact = dtypes == {life.info.dtype}
                checksum, mismatch = await check(life, weights, self._gate, exact=exact, max_length=self._max_length)
        self._went_live(life, weights.version)
        return self._report(begun_s, checksum, mismatch, pause_s=pause_s)

    def _few_changes(self, sparse: SparseLoads, held: Version | None, weights: StagedWeights) -> Changes | None:
        """What is to be set of what SGLang holds; None where everything is to be loaded."""
        changes = changes_to(weights, held) if sparse.ready else None
        return changes if changes is not None and share_of(changes, self._schema.shapes) <= DENSE_ABOVE else None

    async def _load_adapter(self, life: Life, weights: StagedWeights) -> LoadReport:
        """Load an adapter beside those that sample and check it; then samples begin with it."""
        assert self._gate is not None
        assert life.adapters is not None
        version = weights.version
        async with self._beside(weights.path):
            directory = await asyncio.to_thread(write_adapter, weights, Path(self._config.model))
            try:
                with condemning(life, version, but=CallRefused):
                    await life.adapters.load(version, directory)
                    begun_s = self._clock()
                    checksum, mismatch = await check_adapter(life, weights, self._gate, max_length=self._max_length)
            except CallRefused as refused:  # it has not sampled yet, and the one before goes on
                life.adapters.drop(version)
                raise EngineFailure(f"adapter {version}: {refused}") from refused
        self._went_live(life, version)
        life.sampling = version
        life.adapters.switch(version)
        return self._report(begun_s, checksum, mismatch)

    @contextlib.asynccontextmanager
    async def _beside(self, file: Path) -> AsyncIterator[None]:
        """Remove in the end what is made beside the file for SGLang."""
        self._linked.add(file)
        try:
            yield
        finally:
            await asyncio.to_thread(unlink_weights, file)
            self._linked.discard(file)

    def _report(self, begun_s: float, checksum: str, mismatch: Mismatch | None, *, pause_s: float = 0.0) -> LoadReport:
        """Say what came of a version whose check was begun at `begun_s`."""
        return LoadReport(
            pause_s=pause_s,
            check_s=self._clock() - begun_s,
            checksum=checksum,
            mismatch_kl=mismatch.kl if mismatch else None,
            mismatch=mismatch.mean if mismatch else None,
        )
