"""WeightsReceiver: the newest announced version becomes live, or the old one goes on serving and that is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import rollout_server.weights
from protocol.errors import MalformedMessage, Superseded, WeightsError
from protocol.messages import WeightsFailed, WeightsLive, WeightsReady
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import Manifest
from protocol.weights.transfer import FetchReport
from rollout_server.engines.base import EngineFailure, StagedWeights
from rollout_server.weights import RETRY_S, WeightsReceiver
from tests.virtual_time import run_virtual
from tests.weights import make_weights

REPORT = FetchReport(transfer_s=0.25, verify_s=0.125, bytes=1000, refetched_tensors=0)
DIALED = "tcp://10.0.0.7:5555"
SOON_S = 10.0


class HandExecutor(Executor):
    """Runs what was submitted when the test says so: a fetch lasts as long as the test wants."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except WeightsError as error:
                future.set_exception(error)

        self.waiting.append(run)
        return future


@dataclass
class FakeFetcher:
    """Succeeds, unless called off or told otherwise."""

    outcomes: list[WeightsError] = field(default_factory=list)
    """Errors of the next fetches."""
    fetched: list[tuple[Version, Sequence[str], Path]] = field(default_factory=list)

    def fetch(
        self, manifest: Manifest, addresses: Sequence[str], destination: MappedWeights, *, stop: threading.Event,
        deadline_s: float, stall_s: float,
    ) -> FetchReport:  # fmt: skip
        assert destination.layout == manifest.layout
        assert 0 < stall_s < deadline_s
        self.fetched.append((manifest.version, addresses, destination.path))
        if stop.is_set():
            raise Superseded(f"the fetch of version {manifest.version} was called off")
        if self.outcomes:
            raise self.outcomes.pop(0)
        return REPORT


class FakeEngine:
    """Takes weights when `gate` is open."""

    def __init__(self) -> None:
        self.live: Version | None = None
        self.loaded: list[StagedWeights] = []
        self.outcomes: list[EngineFailure] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def load_weights(self, weights: StagedWeights) -> float:
        self.loaded.append(weights)
        await self.gate.wait()
        if self.outcomes:
            raise self.outcomes.pop(0)
        self.live = weights.version
        return 0.5


@dataclass(frozen=True)
class Receiving:
    """A receiver under test and what it talks to."""

    receiver: WeightsReceiver
    engine: FakeEngine
    fetcher: FakeFetcher
    executor: HandExecutor
    ready: Callable[..., WeightsReady]

    async def fetch_ends(self) -> None:
        """Let the receiver ask for a fetch, run it, and let the receiver act on it."""
        while not self.executor.waiting:
            await asyncio.sleep(0.01)
        self.executor.waiting.pop(0)()
        await asyncio.sleep(0.01)

    async def report(self) -> WeightsLive | WeightsFailed:
        async with asyncio.timeout(SOON_S):
            return await self.receiver.reports.get()


Play = Callable[[Callable[[Receiving], Awaitable[None]]], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run a scenario with a receiver whose loop is running, on a virtual clock."""
    executor, fetcher = HandExecutor(), FakeFetcher()
    monkeypatch.setattr(rollout_server.weights, "ThreadPoolExecutor", lambda *args, **kwargs: executor)
    monkeypatch.setattr(rollout_server.weights, "WeightsFetcher", lambda **kwargs: fetcher)
    manifest = build_manifest(Version(1, 0), make_weights(tmp_path / "published", seed=1), "xxh3_128")

    def ready(policy_version: int, *addresses: str, incarnation: int = 1) -> WeightsReady:
        version = Version(incarnation, policy_version)
        announced = msgspec.structs.replace(manifest, version=version)
        return WeightsReady(
            version=version, manifest=np.frombuffer(announced.to_json(), np.uint8), addresses=addresses or ("ipc:///x",)
        )

    async def main(scenario: Callable[[Receiving], Awaitable[None]]) -> None:
        engine, waits = FakeEngine(), Waits(asyncio.get_running_loop().time)
        receiver = WeightsReceiver(
            engine,  # type: ignore[arg-type]
            waits,
            learner=DIALED,
            directory=tmp_path / "staging",
            insecure_plaintext=False,
        )
        loop = asyncio.create_task(receiver.loop())
        await scenario(Receiving(receiver, engine, fetcher, executor, ready))
        assert not loop.done(), "whatever happens to a version, the loop lives on"
        loop.cancel()

    return lambda scenario: run_virtual(main(scenario))


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_an_announced_version_is_fetched_loaded_and_reported(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(3))
        await r.fetch_ends()
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == Version(1, 3)
        assert (report.transfer_s, report.verify_s, report.pause_s) == (0.25, 0.125, 0.5)
        assert r.engine.live == Version(1, 3)
        assert r.engine.loaded[0].path == r.fetcher.fetched[0][2]

    play(scenario)


def test_the_host_of_a_wildcard_address_is_the_one_that_was_dialed(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(1, "tcp://*:5556", "ipc:///weights"))
        await r.fetch_ends()
        assert r.fetcher.fetched[0][1] == ("tcp://10.0.0.7:5556", "ipc:///weights")

    play(scenario)


def test_all_versions_are_staged_in_one_file(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        for policy_version in (1, 2, 3):
            r.receiver.announce(r.ready(policy_version))
            await r.fetch_ends()
        assert len({path for _, _, path in r.fetcher.fetched}) == 1

    play(scenario)


def test_an_older_or_the_same_announcement_changes_nothing(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(3))
        await r.fetch_ends()
        await r.report()
        for policy_version in (2, 3):
            r.receiver.announce(r.ready(policy_version))
        await asyncio.sleep(10 * SOON_S)
        assert not r.executor.waiting
        assert r.engine.live == Version(1, 3)

    play(scenario)


def test_the_next_incarnation_is_newer_whatever_its_policy_version(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(9))
        await r.fetch_ends()
        r.receiver.announce(r.ready(4, incarnation=2))
        await r.fetch_ends()
        assert r.engine.live == Version(2, 4)
        r.receiver.announce(r.ready(10, incarnation=1))
        await asyncio.sleep(SOON_S)
        assert not r.executor.waiting, "the dead are fenced off"

    play(scenario)


def test_a_newer_announcement_calls_off_the_fetch_under_way(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(1))
        while not r.executor.waiting:
            await asyncio.sleep(0.01)
        for policy_version in (2, 3):
            r.receiver.announce(r.ready(policy_version))
        begun_s = now_s()
        await r.fetch_ends()
        await r.fetch_ends()
        assert [version for version, _, _ in r.fetcher.fetched] == [Version(1, 1), Version(1, 3)]
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == Version(1, 3)
        assert [weights.version for weights in r.engine.loaded] == [Version(1, 3)], "never half a version"
        assert r.receiver.reports.empty(), "being superseded is no failure"
        assert now_s() - begun_s < RETRY_S[0], "and no reason for a pause"

    play(scenario)


def test_a_version_announced_during_the_swap_comes_after_it(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.gate.clear()
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        r.receiver.announce(r.ready(2))
        r.engine.gate.set()
        await r.fetch_ends()
        reports = [await r.report(), await r.report()]
        assert [(type(report), report.version) for report in reports] == [
            (WeightsLive, Version(1, 1)),
            (WeightsLive, Version(1, 2)),
        ]

    play(scenario)


def test_a_fetch_that_fails_is_said_and_tried_again_with_growing_pauses(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        errors = [WeightsError(f"failure {number}") for number in range(len(RETRY_S) + 1)]
        r.fetcher.outcomes += errors
        r.receiver.announce(r.ready(1))
        failed_s = []
        for number in range(len(errors)):
            await r.fetch_ends()
            failed_s.append(now_s())
            report = await r.report()
            assert isinstance(report, WeightsFailed)
            assert (report.version, report.reason) == (Version(1, 1), f"failure {number}")
            assert r.engine.live is None
        pauses_s = np.diff(failed_s)
        assert pauses_s == pytest.approx([*RETRY_S], abs=0.05)
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        assert now_s() - failed_s[-1] == pytest.approx(RETRY_S[-1], abs=0.05), "the longest pause is the last one"

    play(scenario)


def test_success_makes_the_pauses_short_again(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.fetcher.outcomes += [WeightsError("first"), WeightsError("second")]
        r.receiver.announce(r.ready(1))
        for _ in range(3):
            await r.fetch_ends()
            await r.report()
        r.fetcher.outcomes.append(WeightsError("third"))
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        await r.report()
        begun_s = now_s()
        await r.fetch_ends()
        assert now_s() - begun_s == pytest.approx(RETRY_S[0], abs=0.05)

    play(scenario)


def test_a_newer_version_does_not_wait_for_the_pause_after_a_failure(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.fetcher.outcomes += [WeightsError("no luck")] * 4
        r.receiver.announce(r.ready(1))
        for _ in range(4):
            await r.fetch_ends()
        begun_s = now_s()
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        assert now_s() - begun_s < 0.1
        assert r.engine.live == Version(1, 2)

    play(scenario)


def test_when_the_engine_cannot_load_a_version_the_old_one_serves_and_it_is_tried_again(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        await r.report()
        r.engine.outcomes.append(EngineFailure("shapes do not fit"))
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        report = await r.report()
        assert isinstance(report, WeightsFailed)
        assert (report.version, report.reason) == (Version(1, 2), "shapes do not fit")
        assert r.engine.live == Version(1, 1)
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        assert r.engine.live == Version(1, 2)

    play(scenario)


def test_another_run_begins_anew_with_the_same_numbers(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(5))
        await r.fetch_ends()
        await r.report()
        r.receiver.new_run()
        r.receiver.announce(r.ready(0))
        await r.fetch_ends()
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == r.engine.live == Version(1, 0)

    play(scenario)


@pytest.mark.parametrize("next_version", [1, 2])
def test_a_swap_begun_for_another_run_is_not_reported_as_this_ones(play: Play, next_version: int) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.gate.clear()
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        r.receiver.new_run()
        r.receiver.announce(r.ready(next_version))
        r.engine.gate.set()
        await asyncio.sleep(0.1)
        assert r.receiver.reports.empty(), "live are the weights of the run that was left"
        await r.fetch_ends()
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == Version(1, next_version)
        assert len(r.engine.loaded) == 2

    play(scenario)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": Version(1, 4)}, "version .* announced with the manifest of"),
        ({"manifest": np.frombuffer(b"{}", np.uint8)}, "manifest"),
        ({"addresses": ("carrier pigeon",)}, "announced address: .*carrier pigeon"),
    ],
)
def test_an_announcement_that_lies_is_refused_and_changes_nothing(
    play: Play, change: dict[str, Any], text: str
) -> None:
    async def scenario(r: Receiving) -> None:
        with pytest.raises(MalformedMessage, match=text):
            r.receiver.announce(msgspec.structs.replace(r.ready(3), **change))
        await asyncio.sleep(SOON_S)
        assert not r.executor.waiting
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        assert r.engine.live == Version(1, 1)

    play(scenario)
