"""What the real SGLang still has, and when it has it no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.sglang.driving import Versions, attach, request, run
from tests.sglang_cpu.launch import RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(120)]
SOON_S = 3.0
"""SGLang itself looks every four seconds whether a caller has hung up."""


def test_a_cancelled_group_is_ended_before_its_seats_are_free(sglang: RunningSGLang, tmp_path: Path) -> None:
    async def case() -> None:
        async with attach(sglang, room=8) as engine:
            await engine.load_weights(Versions(tmp_path).make(0))
            assert engine._life is not None
            client, loop = engine._life.client, asyncio.get_running_loop()
            gone = asyncio.create_task(engine.generate(request("gone", generations=8, length=450)))
            while engine.status().tokens_generated < 100:
                await asyncio.sleep(0.001)
            gone.cancel()
            await asyncio.wait([gone])
            assert engine.status().samples_running > 0, "they are SGLang's still"
            begun_s = loop.time()
            while engine.status().samples_running:
                await asyncio.sleep(0.001)
            assert loop.time() - begun_s < SOON_S
            while any(load.num_running_reqs or load.num_waiting_reqs for load in await client.loads()):
                assert loop.time() - begun_s < SOON_S

    run(case())


def test_a_busy_engine_is_not_taken_for_one_that_loses_requests(sglang: RunningSGLang, tmp_path: Path) -> None:
    """What it says that it has is compared at every look with what it was given, and must hold for half a second."""

    async def case() -> None:
        async with attach(sglang, room=8, engine_probe_s=0.5) as engine:
            await engine.load_weights(Versions(tmp_path).make(0))
            groups = [request(f"g{number}", generations=6, length=1 + 60 * (number % 5)) for number in range(12)]
            for group in await asyncio.gather(*map(engine.generate, groups)):
                assert len(group) == 6
            assert engine.status().restarts == 0

    run(case())
