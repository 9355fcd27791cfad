"""What a server says of its weights: turns, losses, samples that are withheld, and what Hello and Ping tell of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rollout_server.app
from protocol.channel import listen
from protocol.messages import (
    Drain,
    Goodbye,
    Group,
    Hello,
    Ping,
    Return,
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.tasks import run_loop
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.layout import build_manifest
from protocol.weights.serving import WeightsServer
from rollout_server.app import serve
from rollout_server.config import ScriptedOptions, ServerConfig
from rollout_server.engines.base import EngineStatus, SamplesWithheld
from tests.factories import INITIAL, RUN_ID, make_lease
from tests.mortal import MortalEngine
from tests.unit.rollout_server.serving import FakeLearner, Served, play, play_welcomed, taken_in
from tests.weights import make_weights

SOON_S = 20.0
LIVE = Version(1, 1)


def test_a_turn_reaches_the_receiver(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(WeightsSwap(version=Version(1, 9)))
        failed = await served.learner.hears_next(WeightsFailed)
        assert (failed.version, failed.reason) == (Version(1, 9), f"superseded: live at {INITIAL}")

    play_welcomed(tmp_path, scenario)


def test_hello_says_whether_the_engine_tries_new_weights(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        assert not (await served.learner.hears(Hello)).canaries
        served.engine._info = replace(served.engine.info, canaries=True)
        assert (await served.learner.hears(Hello)).canaries

    play(tmp_path, scenario)


def test_weights_of_another_run_are_not_said_to_be_live(tmp_path: Path) -> None:
    """Versions of different runs have the same names: it serves 1.0 of a run that nobody speaks of any more."""

    async def scenario(served: Served) -> None:
        assert (await served.learner.welcome(run_id="another run")).live == INITIAL
        while served.parts.welcome.run_id == RUN_ID:
            await asyncio.sleep(0)
        served.parts.weights.still_live()
        hello = await served.learner.hears(Hello)  # after the usual silence
        assert (hello.run_id, hello.live) == ("another run", None)
        assert not any(isinstance(message, WeightsLive) for message in served.learner.heard)

    async def welcomed(served: Served) -> None:
        await served.learner.welcome()
        await taken_in(served)
        await scenario(served)

    play(tmp_path, welcomed)


def test_samples_that_are_withheld_are_no_fault_of_their_group(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        async def withhold(request: object) -> Any:
            raise SamplesWithheld("its weights failed their check")

        served.engine.generate = withhold  # type: ignore[method-assign]
        served.learner.send(make_lease(attempt=2))
        returned = await served.learner.hears_next(Return)
        assert (returned.attempt, returned.fault) == (2, False)
        assert returned.reason == "its weights failed their check"
        live = await served.learner.hears_next(WeightsLive)
        assert live.version == INITIAL, "else it would be taken for a server without weights"

    play_welcomed(tmp_path, scenario)


def test_a_ping_tells_of_prompts_cache_and_restarts(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        engine = EngineStatus(prompt_tokens=8, cached_prompt_tokens=6, kv_usage=0.25, restarts=2)
        served.engine.status = lambda: engine  # type: ignore[method-assign]
        status = (await served.learner.hears(Ping)).status
        assert status is not None
        assert (status.prompt_tokens, status.cached_prompt_tokens, status.kv_usage) == (8, 6, 0.25)
        assert status.engine_restarts == 2

    play_welcomed(tmp_path, scenario)


def test_what_waits_for_its_turn_is_said_again_to_the_next_learner_only_if_it_is_its_own(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.turns = False
        for incarnation in (1, 2):
            served.parts.weights.reports.put_nowait(WeightsStaged(version=Version(incarnation, 4)))
        assert (await served.learner.hears_next(WeightsStaged)).version == Version(2, 4)

    async def welcomed(served: Served) -> None:
        await served.learner.welcome(incarnation=2)
        await taken_in(served)
        await scenario(served)

    play(tmp_path, welcomed)


# --- the whole process, over real sockets


def run_server(tmp_path: Path, sockets: Path, scenario: Callable[..., Awaitable[None]], **script: Any) -> int:
    """Run `serve` beside a learner played by hand, which has published one version."""
    control, bulk = f"ipc://{sockets}/c", f"ipc://{sockets}/w"
    options = ScriptedOptions(vocab_size=32, mean_length=4.0, length_sigma=0.0, **script)
    config = ServerConfig(
        learner=control, name="server-0", engine="scripted", staging_dir=tmp_path / "staging", scripted=options
    )
    published = make_weights(tmp_path / "published", seed=1)
    manifest = build_manifest(LIVE, published, "xxh3_128")
    ready = WeightsReady(version=LIVE, manifest=np.frombuffer(manifest.to_json(), np.uint8), addresses=(bulk,))

    async def learn(learner: FakeLearner) -> None:
        with WeightsServer(bulk) as server:
            server.serve(manifest, published)
            await scenario(learner, ready)
            learner.send(Drain(reason="done"))
            await learner.hears(Goodbye)

    async def main() -> int:
        async with listen(control) as listener, asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(learn(FakeLearner(listener)))
            return await serve(config)

    return run_loop(main)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> list[MortalEngine]:
    """Let servers have an engine that can die; it is here once there is one."""
    engines: list[MortalEngine] = []

    @asynccontextmanager
    async def create(config: ServerConfig, waits: Waits) -> Any:
        async with MortalEngine(config.scripted, config.room) as engine:
            engines.append(engine)
            yield engine

    monkeypatch.setattr(rollout_server.app, "create_engine", create)
    return engines


def test_an_engine_that_dies_is_brought_back_to_the_newest_version(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, mortal: list[MortalEngine]
) -> None:
    async def scenario(learner: FakeLearner, ready: WeightsReady) -> None:
        await learner.welcome()
        learner.send(ready)
        first = await learner.hears(WeightsLive)
        learner.send(make_lease(min_version=LIVE))
        await learner.hears(Ping, lambda ping: ping.status.groups_in_flight == 1)
        mortal[0].die(restart_s=0.1)
        await learner.hears(WeightsLost)
        second = await learner.hears(WeightsLive)
        assert (first.version, second.version) == (LIVE, LIVE)
        assert first.transfer_s > 0
        assert second.transfer_s == 0, "the file was there"
        kinds = [type(message) for message in learner.heard]
        assert kinds.count(WeightsStaged) == 2
        assert kinds.count(Return) == 1
        assert kinds.index(WeightsLost) < len(kinds) - 1 - kinds[::-1].index(WeightsStaged)
        mortal[0]._options = ScriptedOptions(vocab_size=32)
        status = (await learner.hears(Ping)).status
        assert status is not None
        assert status.engine_restarts == 1

    assert run_server(tmp_path, tmp_path_factory.mktemp("s"), scenario, token_s=100.0) == 0


def test_a_reconnected_server_gets_the_turn_that_was_lost(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The turn was on its way when the connection broke: nobody else knows that the server waits."""

    async def scenario(learner: FakeLearner, ready: WeightsReady) -> None:
        learner.turns = False
        await learner.welcome()
        learner.send(ready)
        await learner.hears(WeightsStaged)
        hello = await learner.welcome()  # it has heard nothing for liveness_s
        assert hello.run_id == RUN_ID
        assert hello.live is None
        staged = await learner.hears(WeightsStaged)
        learner.send(WeightsSwap(version=staged.version))
        assert (await learner.hears(WeightsLive)).version == LIVE
        learner.send(make_lease(min_version=LIVE))
        await learner.hears(Group)

    assert run_server(tmp_path, tmp_path_factory.mktemp("s"), scenario) == 0
