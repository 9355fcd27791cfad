"""A scripted engine that can lose its weights, as one in a process of its own can."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from protocol.completions import Completion
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
    """What it was doing when it died fails; it has no weights then, and a load waits until it is up again."""

    def __init__(self, options: ScriptedOptions, room: int) -> None:
        super().__init__(options, room)
        self.deaths = 0
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
        """Wait for the restart, then load."""
        await asyncio.sleep(max(0.0, self._up_s - asyncio.get_running_loop().time()))
        return await super().load_weights(weights)
