"""Reads SGLang's state while it works: how full it is, whether it gets on, whether it still has what it was given."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from protocol.logs import event
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang.answers import PROBE
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.progress import Progress, RollCall

log = logging.getLogger(__name__)

POLL_S = 0.25
STALL_S = 10.0
"""Without a token for so long, SGLang is asked for one."""


class Watch:
    """Moves the limit of samples, and condemns a life that hangs.

    Args:
        meter: has the tokens of samples that have ended.
        clock: monotonic seconds.
        probe_s: without a token that was asked for, or without requests that it was given, for so long: a life is over.
    """

    def __init__(self, meter: Meter, clock: Callable[[], float], *, probe_s: float) -> None:
        self._meter, self._clock, self._probe_s = meter, clock, probe_s
        self.kv_usage = 0.0
        """Share of the fullest KV cache in use, as of the last look."""

    async def run(self, life: Callable[[], Life | None]) -> None:
        """Look at whatever life there is, for ever.

        waits for: its own timer      produces: the limit of samples, counters, the end of a life that hangs
        """
        progress, roll = Progress(STALL_S, self._clock()), RollCall(self._probe_s)
        while True:
            await asyncio.sleep(POLL_S)
            now = life()
            if now is None or now.condemned.done():
                continue
            busy = now.admission.running > 0 and not now.standing
            if busy:
                with contextlib.suppress(EngineFailure):  # no answer is no progress; the probe decides
                    await self._read_loads(now, roll)
            progress.note((now.decoded, self._meter.tokens_finished, now), self._clock(), busy=busy)
            if progress.stalled(self._clock()):
                await self._probe(now)

    async def _read_loads(self, life: Life, roll: RollCall) -> None:
        loads = await life.client.loads(deadline_s=STALL_S)
        self.kv_usage = max(load.token_usage for load in loads)
        life.decoded = sum(load.tokens_decoded for load in loads)
        running = sum(load.num_running_reqs for load in loads)
        queued = sum(load.num_waiting_reqs for load in loads)
        admission = life.admission
        if admission.limit.observe(
            usage=self.kv_usage, running=running, queued=queued, waiting=admission.waiting
        ):  # fmt: skip
            event(log, "engine_limit", samples=admission.limit.value, kv_usage=self.kv_usage)
            admission.admit()
        if life.info.pp_size > 1:
            return  # it counts the requests of one pipeline stage only
        held = sum(load.num_held_reqs for load in loads)
        if missing := roll.note(life.asked, held=held, now_s=self._clock()):
            life.condemn(
                EngineFailure(
                    f"SGLang has lost at least {missing} of {len(life.asked)} requests: for {self._probe_s:g} s it has"
                    " neither had nor answered them"
                )
            )

    async def _probe(self, life: Life) -> None:
        """Ask for one token. Who does not give it in time is given up."""
        try:
            await life.client.generate(PROBE, deadline_s=self._probe_s)
        except EngineFailure as failure:
            if life.standing:
                return  # it came into a swap, which has a deadline of its own
            life.condemn(EngineFailure(f"SGLang makes no progress: no token within {self._probe_s:g} s ({failure})"))
