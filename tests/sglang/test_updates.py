"""Many updates under load: no request is lost or aborted, and nothing grows."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from pathlib import Path

import psutil
import pytest

from protocol.messages import FinishReason
from protocol.versions import Version
from tests.sglang.driving import Versions, attach, request, run
from tests.sglang_cpu.launch import RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(180)]
UPDATES = 300
WARM = 100
"""Updates after which allocators have seen everything."""
GROWTH_BYTES = 24 << 20
"""Of the resident memory of all of SGLang over the rest: what allocators move by; a leak of the weights would be
17 MB, of a request's tokens more."""


def test_updates_under_load_lose_nothing_and_leak_nothing(sglang: RunningSGLang, tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    staged = [versions.make(0), versions.make(1)]
    processes = sglang.processes()

    def resident() -> int:
        return sum(process.memory_info().rss for process in processes)

    def descriptors() -> list[int]:
        return [process.num_fds() for process in [*processes, psutil.Process()]]

    async def case() -> None:
        numbers, groups, ends = itertools.count(), [], asyncio.Event()

        async def keep_busy(engine) -> None:
            while not ends.is_set():
                groups.append(await engine.generate(request(f"g{next(numbers)}", length=30)))

        async with attach(sglang, mode="retract") as engine:
            await engine.load_weights(staged[0])
            busy = [asyncio.create_task(keep_busy(engine)) for _ in range(3)]
            before = (0, [0])
            for number in range(1, UPDATES + 1):
                weights = staged[number % 2]
                await engine.load_weights(dataclasses.replace(weights, version=Version(1, number)))
                if number == WARM:
                    before = resident(), descriptors()
            after = resident(), descriptors()
            ends.set()
            await asyncio.gather(*busy)
            assert engine.status().restarts == 0
        assert after[0] - before[0] < GROWTH_BYTES
        # Idle connections come and go with the load; each update would add one if it leaked.
        assert max(map(abs, (a - b for a, b in zip(after[1], before[1], strict=True)))) < (UPDATES - WARM) / 10
        completions = [completion for group in groups for completion in group]
        assert {completion.finish_reason for completion in completions} == {FinishReason.LENGTH}
        assert {len(completion.completion_tokens) for completion in completions} == {30}
        assert sum(len(completion.spans) > 1 for completion in completions) > UPDATES / 2

    run(case(), limit_s=150)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_ends_no_request(sglang: RunningSGLang, tmp_path: Path, mode: str) -> None:
    versions = Versions(tmp_path)

    async def case() -> None:
        async with attach(sglang, mode=mode) as engine:
            await engine.load_weights(versions.make(0))
            tasks = [asyncio.create_task(engine.generate(request(f"g{i}", length=200))) for i in range(6)]
            for number in range(1, 6):
                while engine.status().samples_running < 16 and not all(task.done() for task in tasks):
                    await asyncio.sleep(0.001)
                await engine.load_weights(versions.make(number))
            groups = await asyncio.gather(*tasks)
            for completion in itertools.chain(*groups):
                assert completion.finish_reason is FinishReason.LENGTH
                assert len(completion.completion_tokens) == 200
            assert {span[0] for group in groups for c in group for span in c.spans} > {Version(1, 0), Version(1, 1)}

    run(case())


def test_everything_listens_on_loopback_only(sglang: RunningSGLang) -> None:
    listening = [
        connection.laddr
        for process in sglang.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert int(sglang.url.rpartition(":")[2]) in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}
