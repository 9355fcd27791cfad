"""A scripted engine that checks its weights and can lose them, as one in a process of its own does."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from protocol.completions import Completion
from protocol.versions import Version
from rollout_server.config import ScriptedOptions
from rollout_server.engines.base import (
    EngineFailure,
    EngineStatus,
    GenerationRequest,
    LoadReport,
    SamplesWithheld,
    StagedWeights,
)
from rollout_server.engines.scripted import ScriptedEngine


class MortalEngine(ScriptedEngine):
    """What it was doing when it died fails; it has no weights then, and a load waits until it is up again.

    With `canaries` it wants logprobs that are all the negative policy_version, and reports a checksum.
    """

    def __init__(self, options: ScriptedOptions, room: int, *, canaries: bool = False) -> None:
        super().__init__(options, room)
        self._info = replace(self._info, canaries=canaries)
        self.deaths = 0
        self.restarted = 0
        """Deaths after which weights were loaded."""
        self.checked = 0
        """Loads that had canaries."""
        self.stuck_s = 0.0
        """What the next load takes longer."""
        self.is_stuck = False
        self._up_s = 0.0
        self._withholds = False

    def die(self, restart_s: float, *, withhold: bool = False) -> None:
        """Lose the weights. `withhold`: because they failed a check, so that what they sampled is no group's fault."""
        self._settle()
        self.deaths += 1
        self._up_s = asyncio.get_running_loop().time() + restart_s
        self._withholds = withhold
        self._batch.live = None
        self._batch.clear()
        self._settle()
        self.lost.notify()

    def status(self) -> EngineStatus:
        """Count the restarts too."""
        return replace(super().status(), restarts=self.deaths)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Play the group, unless the engine dies meanwhile."""
        deaths = self.deaths
        try:
            return await super().generate(request)
        except EngineFailure as error:
            if self.deaths > deaths and self._withholds:
                raise SamplesWithheld(f"group {request.group_id}: its weights failed their check") from error
            raise

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        """Wait for the restart, then load and check."""
        await asyncio.sleep(max(0.0, self._up_s - asyncio.get_running_loop().time()))
        if self.stuck_s:
            stuck_s, self.stuck_s, self.is_stuck = self.stuck_s, 0.0, True
            await asyncio.sleep(stuck_s)
            self.is_stuck = False
        dead = self.live is None and self.deaths > 0
        loaded = await super().load_weights(weights)
        self.restarted += dead
        return self._check(weights, loaded) if self.info.canaries else loaded

    def _check(self, weights: StagedWeights, loaded: LoadReport) -> LoadReport:
        checksum = checksum_of(weights.version)
        assert weights.checksums in ((), (checksum,)), "of another version"
        if weights.canaries is not None:
            self.checked += 1
            assert (weights.canaries.logprobs == -weights.version.policy_version).all(), "of another version"
        return replace(loaded, checksum=checksum, mismatch_kl=0.0, mismatch=0.0)


def checksum_of(version: Version) -> str:
    """What every mortal engine holds of a version."""
    return f"mortal:{version.policy_version}"
