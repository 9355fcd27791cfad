"""WeightsReceiver: the newest announced version becomes live, or the old one goes on serving and that is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import rollout_server.weights
from learner.tuning.virtual_time import run_virtual
from protocol.errors import MalformedMessage, Superseded, WeightsError
from protocol.messages import (
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsPath,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.signals import Signal
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.fetching import FetchReport
from protocol.weights.layout import build_manifest
from protocol.weights.manifest import Manifest, Shipment, content_digest
from rollout_server.engines.base import EngineFailure, EngineInfo, LoadReport, StagedWeights
from rollout_server.stage import Delivery
from rollout_server.weights import RETRY_S, SWAP_S, TURN_AGAIN_S, Report, WeightsReceiver
from tests.weights import make_weights

REPORT = FetchReport(transfer_s=0.25, verify_s=0.125, bytes=1000, refetched_blocks=0)
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
    fetched: list[tuple[Version, Sequence[str]]] = field(default_factory=list)

    def fetch(
        self, shipment: Shipment, addresses: Sequence[str], destination: memoryview, *, stop: threading.Event,
        deadline_s: float, stall_s: float, keys: Mapping[str, str], on_block: Callable[[int], None] | None,
    ) -> FetchReport:  # fmt: skip
        assert destination.nbytes == shipment.nbytes
        assert 0 < stall_s < deadline_s
        self.fetched.append((shipment.version, addresses))
        if stop.is_set():
            raise Superseded(f"the fetch of version {shipment.version} was called off")
        if self.outcomes:
            raise self.outcomes.pop(0)
        return REPORT


LOADED = LoadReport(pause_s=0.5, check_s=0.25, checksum="fake:12", mismatch_kl=1e-4, mismatch=1e-2)


class FakeEngine:
    """Takes weights when `gate` is open."""

    info = EngineInfo(engine="fake", room=8, vocab_size=32, model_digest="m", tokenizer_digest="t", canaries=True)

    def __init__(self) -> None:
        self.live: Version | None = None
        self.lost = Signal()
        self.loaded: list[StagedWeights] = []
        self.outcomes: list[EngineFailure] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.dies = False
        """As soon as it has loaded."""

    def die(self) -> None:
        """Have no weights any more."""
        self.live = None
        self.lost.notify()

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        assert weights.path.exists()
        self.loaded.append(weights)
        await self.gate.wait()
        if self.outcomes:
            raise self.outcomes.pop(0)
        self.live = weights.version
        if self.dies:
            self.die()
        return LOADED


@dataclass
class Receiving:
    """A receiver under test and what it talks to. Every turn comes at once, unless `turns` says otherwise."""

    receiver: WeightsReceiver
    engine: FakeEngine
    fetcher: FakeFetcher
    executor: HandExecutor
    ready: Callable[..., WeightsReady]
    turns: bool = True
    heard: asyncio.Queue[Report] = field(default_factory=asyncio.Queue)
    """Reports, but those that a turn has answered."""

    async def play_learner(self) -> None:
        """Hear reports and give turns."""
        while True:
            report = await self.receiver.reports.get()
            if self.turns and isinstance(report, WeightsStaged):
                self.receiver.swap(WeightsSwap(version=report.version))
            else:
                self.heard.put_nowait(report)

    async def fetch_ends(self) -> None:
        """Let the receiver ask for a fetch, run it, and let the receiver act on it."""
        while not self.executor.waiting:
            await asyncio.sleep(0.01)
        self.executor.waiting.pop(0)()
        await asyncio.sleep(0.01)

    async def report(self) -> Report:
        async with asyncio.timeout(SOON_S):
            return await self.heard.get()

    async def serve(self, policy_version: int) -> None:
        """Bring a version live."""
        self.receiver.announce(self.ready(policy_version))
        await self.fetch_ends()
        assert isinstance(await self.report(), WeightsLive)

    async def stage(self, policy_version: int) -> None:
        """Bring a version to where it waits for its turn."""
        self.turns = False
        self.receiver.announce(self.ready(policy_version))
        await self.fetch_ends()
        staged = await self.report()
        assert isinstance(staged, WeightsStaged)
        assert staged.version.policy_version == policy_version

    def turn(self, policy_version: int, **fields: Any) -> None:
        self.receiver.swap(WeightsSwap(version=Version(1, policy_version), **fields))


Play = Callable[[Callable[[Receiving], Awaitable[None]]], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run a scenario with a receiver whose loop is running, on a virtual clock."""
    executor, fetcher = HandExecutor(), FakeFetcher()
    monkeypatch.setattr(rollout_server.weights, "ThreadPoolExecutor", lambda *args, **kwargs: executor)
    monkeypatch.setattr(rollout_server.weights, "WeightsFetcher", lambda security: fetcher)
    first = build_manifest(Version(1, 0), make_weights(tmp_path / "published", seed=1), "xxh3_128")

    def ready(
        policy_version: int, *addresses: str, incarnation: int = 1, content: int | None = None, **fields: Any
    ) -> WeightsReady:
        """Announce a version; its content is as new as its number unless said otherwise."""
        version = Version(incarnation, policy_version)
        digest = f"{policy_version if content is None else content:032x}"
        changed = msgspec.structs.replace(first.tensors[0], digests=(digest,))
        announced = msgspec.structs.replace(first, version=version, tensors=(changed, *first.tensors[1:]))
        text = np.frombuffer(announced.to_json(), np.uint8)
        return WeightsReady(version=version, manifest=text, addresses=addresses or ("ipc:///x",), **fields)

    async def main(scenario: Callable[[Receiving], Awaitable[None]]) -> None:
        engine, waits = FakeEngine(), Waits(asyncio.get_running_loop().time)
        receiver = WeightsReceiver(
            engine,  # type: ignore[arg-type]
            waits,
            learner=DIALED,
            directory=tmp_path / "staging",
        )
        r = Receiving(receiver, engine, fetcher, executor, ready)
        loops = [asyncio.create_task(loop) for loop in (receiver.loop(), receiver.engine_loop(), r.play_learner())]
        await asyncio.sleep(0)
        await scenario(r)
        assert not any(loop.done() for loop in loops), "whatever happens to a version, the loops live on"
        for loop in loops:
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
        assert (report.check_s, report.checksum, report.mismatch_kl, report.mismatch) == (0.25, "fake:12", 1e-4, 1e-2)
        assert r.engine.live == r.receiver.live == Version(1, 3)
        assert r.engine.loaded[0].path.parent.name == "staging"

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
        assert len({staged.path for staged in r.engine.loaded}) == 1

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
        assert [version for version, _ in r.fetcher.fetched] == [Version(1, 1), Version(1, 3)]
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == Version(1, 3)
        assert [weights.version for weights in r.engine.loaded] == [Version(1, 3)], "never half a version"
        assert r.heard.empty(), "being superseded is no failure"
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
        assert r.heard.empty(), "live are the weights of the run that was left"
        assert r.receiver.live is None
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


# --- turns


def test_nothing_is_swapped_before_the_turn(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        await r.stage(2)
        await asyncio.sleep(TURN_AGAIN_S - 1.0)
        assert [weights.version.policy_version for weights in r.engine.loaded] == [1]
        r.turn(2, checksums=("fake:34",))
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.version == Version(1, 2)
        assert r.engine.loaded[-1].checksums == ("fake:34",)

    play(scenario)


def test_the_engine_is_told_what_it_loads_and_what_to_try_it_on(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        tokens, logprobs = np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((2, 2), np.float32)
        ready = r.ready(1, canary_tokens=tokens, canary_logprobs=logprobs)
        r.receiver.announce(ready)
        await r.fetch_ends()
        (staged,) = r.engine.loaded
        assert staged.canaries is not None
        assert staged.canaries.tokens is tokens
        assert staged.canaries.logprobs is logprobs
        assert staged.digest == content_digest(Manifest.from_json(ready.manifest.tobytes()))
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        assert r.engine.loaded[-1].canaries is None

    play(scenario)


@pytest.mark.parametrize("token", [-1, 32, 2**31 - 1])
def test_canaries_that_no_engine_could_embed_are_no_announcement(play: Play, token: int) -> None:
    async def scenario(r: Receiving) -> None:
        ready = r.ready(1, canary_tokens=np.array([[3, token]], np.int32), canary_logprobs=np.zeros((1, 1), np.float32))
        with pytest.raises(MalformedMessage, match=r"canaries of version 1\.1 with tokens .*, allowed are 0 to 31"):
            r.receiver.announce(ready)
        await asyncio.sleep(0.01)
        assert r.executor.waiting == [], "nothing is fetched for it"

    play(scenario)


def test_a_turn_that_does_not_come_is_asked_for_again(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.stage(1)
        for _ in range(2):
            begun_s = now_s()
            async with asyncio.timeout(2 * TURN_AGAIN_S):
                again = await r.heard.get()
            assert isinstance(again, WeightsStaged)
            assert now_s() - begun_s == pytest.approx(TURN_AGAIN_S, abs=0.1)
        r.turn(1)
        assert isinstance(await r.report(), WeightsLive)

    play(scenario)


def test_a_new_connection_is_told_what_waits(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.welcomed()
        await r.stage(1)
        r.receiver.welcomed()
        again = await r.report()
        assert isinstance(again, WeightsStaged)
        assert again.version == Version(1, 1)
        r.turn(1)
        assert isinstance(await r.report(), WeightsLive)
        r.receiver.welcomed()
        await asyncio.sleep(SOON_S)
        assert r.heard.empty(), "nothing waits any more"

    play(scenario)


def test_a_newer_version_takes_the_place_of_the_one_that_waits(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.stage(1)
        await r.stage(2)
        r.turn(1)
        late = await r.report()
        assert isinstance(late, WeightsFailed)
        assert (late.version, late.reason) == (Version(1, 1), "superseded: version 1.2 waits for its turn")
        assert not r.engine.loaded
        r.turn(2)
        live = await r.report()
        assert isinstance(live, WeightsLive)
        assert live.version == Version(1, 2)

    play(scenario)


def test_a_turn_for_what_is_not_here_yet_is_given_on(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.turns = False
        r.receiver.announce(r.ready(1))
        await asyncio.sleep(0.1)
        r.turn(1)
        failed = await r.report()
        assert isinstance(failed, WeightsFailed)
        assert failed.reason == "superseded: version 1.1 is on its way"
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsStaged)
        r.turn(1)
        assert isinstance(await r.report(), WeightsLive)
        r.turn(0)
        failed = await r.report()
        assert isinstance(failed, WeightsFailed)
        assert failed.reason == "superseded: live at 1.1"

    play(scenario)


def test_a_turn_that_comes_twice_is_one_turn(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.gate.clear()
        await r.stage(1)
        r.turn(1)
        r.turn(1)
        await asyncio.sleep(0.1)
        r.turn(1)
        r.engine.gate.set()
        assert isinstance(await r.report(), WeightsLive)
        r.turn(1)
        await asyncio.sleep(SOON_S)
        assert r.heard.empty()
        assert len(r.engine.loaded) == 1

    play(scenario)


def test_a_swap_that_never_ends_is_given_up_and_its_file_left_to_whoever_reads_it(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.gate.clear()
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        async with asyncio.timeout(2 * SWAP_S):
            failed = await r.heard.get()
        assert isinstance(failed, WeightsFailed)
        assert failed.reason == f"waited {SWAP_S:g} s for swap (engine)"
        r.engine.gate.set()
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        first, second = r.engine.loaded
        assert first.path != second.path

    play(scenario)


def test_a_run_that_is_left_takes_its_turns_with_it(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.stage(1)
        r.receiver.new_run()
        r.receiver.welcomed()
        r.turn(1)
        failed = await r.report()
        assert isinstance(failed, WeightsFailed)
        assert not r.engine.loaded
        await r.stage(1)
        assert not r.executor.waiting, "the same bytes, whatever the run"

    play(scenario)


# --- losses


def test_an_engine_that_lost_its_weights_gets_them_again_from_the_file(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.engine.die()
        lost = await r.report()
        assert isinstance(lost, WeightsLost)
        assert lost.reason == "the engine has lost its weights and restarts"
        await r.fetch_ends()
        live = await r.report()
        assert isinstance(live, WeightsLive)
        assert (live.version, live.transfer_s, live.verify_s) == (Version(1, 1), 0.0, 0.0)
        assert len(r.fetcher.fetched) == 1, "the staged file still has it"
        assert [weights.version.policy_version for weights in r.engine.loaded] == [1, 1]

    play(scenario)


def test_a_loss_asks_for_a_turn_like_any_version(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.turns = False
        r.engine.die()
        await r.fetch_ends()
        assert [type(await r.report()) for _ in range(2)] == [WeightsLost, WeightsStaged]
        assert len(r.engine.loaded) == 1
        r.turn(1)
        assert isinstance(await r.report(), WeightsLive)

    play(scenario)


def test_a_loss_while_a_newer_version_is_fetched_ends_with_the_newer_one(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.receiver.announce(r.ready(2))
        while not r.executor.waiting:
            await asyncio.sleep(0.01)
        r.engine.die()
        assert isinstance(await r.report(), WeightsLost)
        await r.fetch_ends()
        live = await r.report()
        assert isinstance(live, WeightsLive)
        assert live.version == Version(1, 2)
        assert [version.policy_version for version, _ in r.fetcher.fetched] == [1, 2]

    play(scenario)


def test_a_file_overwritten_by_a_fetch_that_failed_is_not_loaded(play: Play) -> None:
    """The file had version 1 and part of version 2: neither is whole."""

    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.fetcher.outcomes.append(WeightsError("no luck"))
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsFailed)
        r.receiver.announce(r.ready(3, content=1))
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        assert [version.policy_version for version, _ in r.fetcher.fetched] == [1, 2, 3]

    play(scenario)


def test_a_staged_file_that_somebody_deleted_is_fetched_again(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.engine.loaded[0].path.unlink()
        r.engine.die()
        assert isinstance(await r.report(), WeightsLost)
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        assert len(r.fetcher.fetched) == 2

    play(scenario)


def test_a_version_with_the_same_bytes_is_not_fetched(play: Play) -> None:
    """A learner that comes back publishes the weights of its checkpoint under its own name."""

    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.receiver.announce(r.ready(1, incarnation=2))
        await r.fetch_ends()
        live = await r.report()
        assert isinstance(live, WeightsLive)
        assert live.version == r.engine.live == Version(2, 1)
        assert len(r.fetcher.fetched) == 1

    play(scenario)


def test_a_load_that_leaves_nothing_live_is_a_loss_and_then_a_failure(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        await r.serve(1)
        r.engine.gate.clear()
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        r.engine.outcomes.append(EngineFailure("its logprobs are off: the engine is quarantined"))
        r.engine.live = None  # it says so only after its load has failed
        r.engine.gate.set()
        assert [type(await r.report()) for _ in range(2)] == [WeightsLost, WeightsFailed]
        r.engine.lost.notify()
        await r.fetch_ends()
        live = await r.report()
        assert isinstance(live, WeightsLive), "and the loss is not said twice"
        assert live.version == Version(1, 2)

    play(scenario)


def test_an_engine_that_dies_as_soon_as_it_has_loaded_is_not_called_live(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.dies = True
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        failed = await r.report()
        assert isinstance(failed, WeightsFailed)
        assert failed.reason == "the engine lost the version as soon as it had it"

    play(scenario)


def test_an_engine_without_weights_has_none_to_lose(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.engine.die()
        await asyncio.sleep(SOON_S)
        assert r.heard.empty()

    play(scenario)


def test_what_is_live_can_be_said_again(play: Play) -> None:
    async def scenario(r: Receiving) -> None:
        r.receiver.still_live()
        await asyncio.sleep(SOON_S)
        assert r.heard.empty()
        await r.serve(1)
        r.receiver.still_live()
        live = await r.report()
        assert isinstance(live, WeightsLive)
        assert (live.version, live.mismatch_kl) == (Version(1, 1), None)

    play(scenario)


def test_an_engine_that_does_not_check_is_not_bothered_with_canaries(play: Play) -> None:
    """The scripted engine has a vocabulary of its own, smaller than any learner's."""

    async def scenario(r: Receiving) -> None:
        r.engine.info = replace(r.engine.info, canaries=False)
        r.receiver.announce(
            r.ready(1, canary_tokens=np.array([[3, 99]], np.int32), canary_logprobs=np.zeros((1, 1), np.float32))
        )
        await r.fetch_ends()
        (staged,) = r.engine.loaded
        assert staged.canaries is None

    play(scenario)


@pytest.mark.parametrize("known", [True, False], ids=["of what the engine has", "of something else"])
def test_changes_are_handed_on_only_to_an_engine_that_has_their_base(
    play: Play, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"w": np.array([3, 5])}

    async def scenario(r: Receiving) -> None:
        r.receiver.announce(r.ready(1))
        await r.fetch_ends()
        assert isinstance(await r.report(), WeightsLive)
        (first,) = r.engine.loaded
        assert (first.base, first.changes) == (None, None)
        delivery = Delivery(
            file=first.path,
            digest="new",
            path=WeightsPath.DELTA,
            base=first.digest if known else "0" * 32,
            changes=changes,
        )
        monkeypatch.setattr(r.receiver._stage, "bring", lambda wanted, stop: delivery)
        r.receiver.announce(r.ready(2))
        await r.fetch_ends()
        report = await r.report()
        assert isinstance(report, WeightsLive)
        assert report.path is WeightsPath.DELTA
        second = r.engine.loaded[1]
        assert (second.base, second.changes) == ((Version(1, 1), changes) if known else (None, None))

    play(scenario)
