"""The server process from start to end: draining on a virtual clock, and whole processes' worth over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.channel import listen
from protocol.errors import ConfigError
from protocol.errors import Refused as RefusedError
from protocol.messages import Drain, Goodbye, Group, Hello, Ping, Refused, Return, WeightsLive, WeightsReady
from protocol.tasks import run_loop
from protocol.versions import Version
from protocol.weights.layout import build_manifest
from protocol.weights.serving import WeightsServer
from rollout_server.app import drain, group_tasks, open_scorer, run, serve, text_decoder
from rollout_server.config import ScriptedOptions, ServerConfig
from rollout_server.scorers import ScriptedScorer
from tests.factories import make_lease, make_sampling
from tests.unit.rollout_server.serving import GROUP_S, FakeLearner, Served, run_served, serving
from tests.weights import make_weights

SOON_S = 20.0
LIVE = Version(1, 1)


# --- draining


def draining(tmp_path: Path, scenario: Callable[[Served], Awaitable[None]], **script: Any) -> None:
    """Run a scenario with a welcomed server that has one lease of group 0, begun at time 0."""

    async def main() -> None:
        async with serving(tmp_path, **script) as served:
            await served.learner.welcome()
            served.learner.send(make_lease(ordinal=0))
            await asyncio.sleep(0.01)
            assert len(group_tasks()) == 1
            served.parts.end("SIGTERM")
            await scenario(served)

    run_served(main())


def test_a_draining_server_finishes_what_it_can_and_says_goodbye(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        await drain(served.parts, drain_s=10 * GROUP_S)
        assert asyncio.get_running_loop().time() == pytest.approx(GROUP_S), "it waits no longer than it must"
        assert (await served.learner.hears_next(Drain)).reason == "SIGTERM"
        assert (await served.learner.hears_next(Group)).ordinal == 0
        assert (await served.learner.hears_next(Goodbye)).reason == "SIGTERM"

    draining(tmp_path, scenario)


@pytest.mark.parametrize("drain_s", [0.0, GROUP_S])
def test_what_a_draining_server_cannot_finish_in_time_comes_back_without_fault(tmp_path: Path, drain_s: float) -> None:
    async def scenario(served: Served) -> None:
        begun_s = asyncio.get_running_loop().time()
        await drain(served.parts, drain_s=drain_s)
        assert asyncio.get_running_loop().time() - begun_s == pytest.approx(drain_s)
        await served.learner.hears_next(Drain)
        returned = await served.learner.hears_next(Return)
        assert (returned.group_id, returned.attempt) == (make_lease().group_id, 1)
        assert (returned.reason, returned.fault) == ("draining", False)
        await served.learner.hears_next(Goodbye)
        assert served.engine.status().samples_running == 0
        await served.learner.hears_nothing_for(2 * GROUP_S)

    draining(tmp_path, scenario, token_s=GROUP_S)


def test_a_server_that_drains_takes_no_more_leases(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        ending = asyncio.create_task(drain(served.parts, drain_s=10 * GROUP_S))
        await served.learner.hears_next(Drain)
        served.learner.send(make_lease(ordinal=1))
        returned = await served.learner.hears_next(Return)
        assert (returned.group_id, returned.fault) == (make_lease(ordinal=1).group_id, False)
        assert (await served.learner.hears_next(Group)).ordinal == 0
        await ending

    draining(tmp_path, scenario)


def test_a_server_that_was_never_welcomed_has_nobody_to_say_goodbye_to(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as served:
            await served.learner.hears(Hello)
            served.parts.end("SIGTERM")
            await drain(served.parts, drain_s=10.0)
            await served.learner.hears_nothing_for(1.0)

    run_served(main())


# --- the parts


def test_without_reward_functions_the_scripted_scorer_is_used() -> None:
    async def main() -> None:
        async with open_scorer(ServerConfig(engine="scripted")) as scorer:
            assert isinstance(scorer, ScriptedScorer)
            assert scorer.names == ("scripted",)

    asyncio.run(main())


def test_without_a_model_tokens_are_shown_as_numbers() -> None:
    assert text_decoder(ServerConfig(engine="scripted"))([3, 1, 4]) == "3 1 4"


def test_with_a_model_tokens_are_text(tiny_model_dir: Path) -> None:
    from tests.models import encode

    assert text_decoder(ServerConfig(model=str(tiny_model_dir)))(encode("1+2=3")) == "1+2=3"


def test_an_address_off_loopback_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"192\.168\.0\.1 is not loopback"):
        run(ServerConfig(learner="tcp://192.168.0.1:5555", engine="scripted"))


@pytest.mark.parametrize("half", ["key", "learner_key"])
def test_one_half_of_the_keys_is_refused(tmp_path: Path, half: str) -> None:
    with pytest.raises(ValueError, match="give both or none; each side proves who it is"):
        ServerConfig(**{half: tmp_path / "a"})


def test_a_key_file_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("")
    config = ServerConfig(key=tmp_path / "a.key", learner_key=tmp_path / "b.pub", engine="scripted")
    with pytest.raises(ConfigError, match=r"a\.key: others than its owner may read it \(mode 0644\): chmod 600"):
        run(config)


# --- the whole


class Lab:
    """A server's `serve` beside a learner played by hand, in one loop."""

    def __init__(self, tmp_path: Path, sockets: Path, **changes: Any) -> None:
        self.weights_address = f"ipc://{sockets}/w"
        self.address = f"ipc://{sockets}/c"
        self.directory = tmp_path
        script = {"vocab_size": 32, "mean_length": 4.0, "length_sigma": 0.0, **changes.pop("scripted", {})}
        self.config = ServerConfig(
            learner=self.address,
            name="server-0",
            engine="scripted",
            staging_dir=tmp_path / "staging",
            scripted=ScriptedOptions(**script),
            **changes,
        )

    def play(self, scenario: Callable[[FakeLearner], Awaitable[None]]) -> int:
        """Run both to the server's end and return its exit code."""

        async def main() -> int:
            async with listen(self.address) as listener, asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._play(scenario, FakeLearner(listener)))
                return await serve(self.config)

        return run_loop(main)

    async def _play(self, scenario: Callable[[FakeLearner], Awaitable[None]], learner: FakeLearner) -> None:
        published = make_weights(self.directory / "published", seed=1)
        manifest = build_manifest(LIVE, published, "xxh3_128")
        with WeightsServer(self.weights_address) as server:
            server.serve(manifest, published)
            text = np.frombuffer(manifest.to_json(), np.uint8)
            self.ready = WeightsReady(version=LIVE, manifest=text, addresses=(self.weights_address,))
            await scenario(learner)


@pytest.fixture
def make_lab(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lab]:
    return lambda **changes: Lab(tmp_path, tmp_path_factory.mktemp("s"), **changes)


def test_a_server_serves_until_the_run_is_over(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab()

    async def scenario(learner: FakeLearner) -> None:
        hello = await learner.welcome()
        assert (hello.server, hello.live) == ("server-0", None)
        learner.send(lab.ready)
        live = await learner.hears(WeightsLive)
        assert live.version == LIVE
        learner.send(make_lease(min_version=LIVE))
        group = await learner.hears(Group)
        assert group.span_versions.tolist() == [[1, 1]] * 4
        learner.send(Drain(reason="all 10 steps are trained"))
        goodbye = await learner.hears(Goodbye)
        assert goodbye.reason == "the learner ends the run: all 10 steps are trained"

    assert lab.play(scenario) == 0
    assert list((lab.directory / "staging").glob("weights-*")) == [], "nothing is left behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server(make_lab: Callable[..., Lab], number: signal.Signals) -> None:
    lab = make_lab(scripted={"token_s": 0.1})

    async def scenario(learner: FakeLearner) -> None:
        await learner.welcome()
        learner.send(lab.ready)
        await learner.hears(WeightsLive)
        short, longer = make_lease(ordinal=0, sampling=make_sampling(max_completion_length=1)), make_lease(ordinal=1)
        learner.send(short, longer)
        assert (await learner.hears_next(Group)).ordinal == 0
        os.kill(os.getpid(), number)
        assert (await learner.hears_next(Drain)).reason == number.name
        assert (await learner.hears_next(Group)).ordinal == 1
        assert (await learner.hears_next(Goodbye)).reason == number.name

    assert lab.play(scenario) == 0


def test_a_signal_ends_a_server_that_still_waits_for_its_learner(make_lab: Callable[..., Lab]) -> None:
    async def scenario(learner: FakeLearner) -> None:
        await learner.hears(Hello)
        os.kill(os.getpid(), signal.SIGTERM)

    assert make_lab().play(scenario) == 0


def test_a_second_signal_ends_the_server_at_once(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(scripted={"token_s": 1000.0})

    async def scenario(learner: FakeLearner) -> None:
        await learner.welcome()
        learner.send(lab.ready)
        await learner.hears(WeightsLive)
        learner.send(make_lease())
        await learner.hears(Ping, lambda ping: ping.status.groups_in_flight == 1)  # else there is nothing to drain
        os.kill(os.getpid(), signal.SIGTERM)
        await learner.hears(Drain)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        lab.play(scenario)


def test_a_refusal_is_the_one_error_that_ends_the_process(make_lab: Callable[..., Lab]) -> None:
    async def scenario(learner: FakeLearner) -> None:
        await learner.hears(Hello)
        learner.send(Refused(code="reward_functions", reason="it scores with scripted; this run expects exact_match"))

    with pytest.raises(RefusedError, match=r"\(reward_functions\): it scores with scripted; this run expects exact"):
        make_lab().play(scenario)
