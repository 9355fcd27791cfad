"""SGLang (the fake one) dies, hangs or is exchanged, or the engine is closed, at the worst of times."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.waits import Waits
from rollout_server.engines.base import EngineFailure, SamplesWithheld, StagedWeights
from rollout_server.engines.sglang import SGLangEngine, generation, loading, restarts, watch
from rollout_server.engines.sglang.answers import ForeignWeights
from rollout_server.engines.sglang.host import free_port
from tests.check import ROOT
from tests.fake_sglang.driving import (
    ADMIN_KEY,
    API_KEY,
    V0,
    V1,
    V2,
    Fake,
    child_engine,
    is_pure,
    make_config,
    request,
    run,
    running_fake,
    until,
)

MakeWeights = Callable[..., StagedWeights]
LONG = 200


@pytest.fixture(autouse=True)
def quick(fake_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STALL_S", 0.1)
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 0.01))


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def open_files() -> list[str]:
    """What this process has open, by kind, but for connections: how many of them are kept is a matter of time."""
    kinds = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            kinds.append(os.readlink(entry).partition(":")[0])
    assert kinds.count("socket") < 50
    return sorted(kind for kind in kinds if kind != "socket")


async def stopped_group(engine: SGLangEngine, fake: Fake, generations: int = 4) -> asyncio.Task[Any]:
    """A group under way that has five tokens a sample and gets no more."""
    await fake.tell(stop_at=5)
    group = asyncio.create_task(engine.generate(request("under way", generations=generations, length=LONG)))
    await fake.until(lambda told: told["lengths"] == [5] * min(generations, 8))
    return group


async def serves(engine: SGLangEngine, weights: StagedWeights) -> None:
    """Load weights into the next life and see that it works."""
    await engine.load_weights(weights)
    assert engine.live == weights.version
    assert all(is_pure(completion, weights) for completion in await engine.generate(request("after")))


def test_a_scheduler_that_is_killed_twenty_times_costs_its_groups_and_nothing_else(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    rounds = 20
    before = psutil.Process().children(recursive=True)  # the real SGLang, where other tests have one

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            pids: list[int] = []
            files: list[list[str]] = []
            outcomes: list[str] = []
            await engine.load_weights(weights(V0))
            for number in range(rounds):
                group = await stopped_group(engine, fake, generations=10)
                told = await fake.tell()
                pids += [told["pid"], told["worker"]]
                assert Path(f"/dev/shm/sglang_fake_{told['pid']}").exists()
                lost = asyncio.create_task(engine.lost.wait())
                os.kill(told["worker"], signal.SIGKILL)
                with pytest.raises(EngineFailure, match=rf"SGLang died: sglang::scheduler \({told['worker']}\) died"):
                    await group
                outcomes.append("failed")
                await lost
                assert engine.live is None
                assert (engine.status().samples_running, engine.status().samples_waiting) == (0, 0)
                await serves(engine, weights(V0))
                outcomes.append("served")
                assert engine.status().restarts == number + 1
                files.append(open_files())
                assert not Path(f"/dev/shm/sglang_fake_{told['pid']}").exists()
            assert outcomes == ["failed", "served"] * rounds
            assert all(map(is_gone, pids))
            assert len(set(pids)) == 2 * rounds
            assert files == [files[0]] * rounds
            others = [process for process in psutil.Process().children(recursive=True) if process not in before]
            assert len(others) == 2
            last = (await fake.tell())["pid"]
        assert is_gone(last)
        assert not Path(f"/dev/shm/sglang_fake_{last}").exists()

    run(case(), limit_s=60)


def test_a_child_that_ends_takes_its_groups_with_it_and_its_log_is_kept(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            shared = Path(f"/dev/shm/sglang_fake_{(await fake.tell())['pid']}")
            assert shared.exists()
            await fake.tell(die=9)
            with pytest.raises(EngineFailure, match=r"SGLang died: (exit code 9|sglang::scheduler)|/generate: "):
                await group
            await serves(engine, weights(V0))
            assert not shared.exists()
            log = engine._host._log_file  # type: ignore[attr-defined]
        assert log.read_text().count("fake SGLang on port") == 2
        log.unlink()
        log.parent.rmdir()

    run(case())


def test_an_engine_that_stands_still_is_asked_and_then_restarted(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, engine_probe_s=0.2) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            await fake.tell(hang=True)
            with pytest.raises(
                EngineFailure, match=r"SGLang makes no progress: no token within 0\.2 s .*/generate did not answer"
            ):
                await group
            await serves(engine, weights(V0))
            assert engine.status().restarts == 1

    run(case())


def test_an_engine_that_answers_the_probe_is_left_alone(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, engine_probe_s=5.0) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            before = (await fake.tell())["calls"]["/generate"]
            await fake.until(lambda told: told["calls"]["/generate"] >= before + 3)
            await fake.tell(stop_at=0)
            assert {len(completion.completion_tokens) for completion in await group} == {LONG}
            assert engine.status().restarts == 0

    run(case())


def test_an_engine_that_has_nothing_to_do_is_not_probed(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, engine_probe_s=0.1) as (engine, fake):
            await engine.load_weights(weights(V0))
            before = (await fake.tell())["calls"]
            async with asyncio.timeout(None):
                loop = asyncio.get_running_loop()
                begun_s = loop.time()
                await until(lambda: loop.time() - begun_s > 4 * watch.STALL_S)
            assert (await fake.tell())["calls"] == before

    run(case())


def test_a_hang_is_found_while_a_swap_waits_for_samples_to_end(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        changes: dict[str, Any] = {"weight_update_mode": "drain", "engine_probe_s": 0.2}
        async with child_engine(tiny_model_dir, **changes) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            await fake.tell(hang=True)
            loading = asyncio.create_task(engine.load_weights(weights(V1)))
            for call in (group, loading):
                with pytest.raises(EngineFailure, match="SGLang makes no progress"):
                    await call
            await serves(engine, weights(V1))

    run(case())


def test_a_swap_that_takes_longer_than_a_probe_is_no_hang(tiny_model_dir: Path, weights: MakeWeights) -> None:
    """Also when the probe came first: it waits for the swap, as every request does."""

    async def case() -> None:
        async with child_engine(tiny_model_dir, engine_probe_s=0.3) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            await fake.tell(hold=["/generate", "/update_weights_from_disk"])
            await fake.until_held("/generate")  # the probe
            loading = asyncio.create_task(engine.load_weights(weights(V1)))
            await fake.until_held("/update_weights_from_disk")
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            await until(lambda: loop.time() - begun_s > 0.4)  # the probe was given up
            await fake.tell(hold=[], stop_at=0)
            await loading
            assert [completion.spans for completion in await group] == [((V0, 5), (V1, LONG - 5))] * 4
            assert engine.status().restarts == 0

    run(case())


class Clock:
    """The engine's; deadlines of its calls are in real time."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def looked(fake: Fake, times: int = 1) -> None:
    """Until the watch has read the fake's state so often, each from the question to what it makes of the answer."""
    before = (await fake.tell())["calls"].get("/v1/loads", 0)
    await fake.until(lambda told: told["calls"].get("/v1/loads", 0) > before + times)


@pytest.mark.parametrize("lost", [1, 4])
def test_requests_that_sglang_has_no_more_are_missed(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """It answers, and gives every token that it is asked for; the others of the group are under way."""
    monkeypatch.setattr(watch, "STALL_S", 20.0)

    async def case() -> None:
        port, clock = free_port(0), Clock()
        fake = Fake(port)
        with running_fake(tiny_model_dir, port) as process:
            engine = url_engine(tiny_model_dir, port, clock, engine_probe_s=60.0)
            await engine.__aenter__()
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            await looked(fake)  # it has been seen to have all four
            before = (await fake.tell(lose=lost))["calls"]["/generate"]
            await fake.until(lambda told: told["lengths"] == [5] * (4 - lost))
            await looked(fake, times=2)
            clock.now_s += 59.0
            await fake.until(lambda told: told["calls"]["/generate"] >= before + 2)  # a probe was answered
            await looked(fake)
            assert not group.done()
            clock.now_s += 1.0
            with pytest.raises(EngineFailure, match=rf"has lost at least {lost} of 4 requests: for 60 s it has"):
                await group
            assert process.poll() is None
            await fake.tell(stop_at=0)
            await serves(engine, weights(V0))
            assert engine.status().restarts == 1
            await engine.__aexit__(None, None, None)

    run(case())


def test_a_loss_among_requests_that_were_never_all_seen_is_told_as_the_least_it_can_be(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four were on their way in at the last look before all four were lost."""
    monkeypatch.setattr(watch, "STALL_S", 100.0)

    async def case() -> None:
        port, clock = free_port(0), Clock()
        fake = Fake(port)
        with running_fake(tiny_model_dir, port):
            engine = url_engine(tiny_model_dir, port, clock, engine_probe_s=60.0)
            await engine.__aenter__()
            await engine.load_weights(weights(V0))
            groups = [await stopped_group(engine, fake, generations=2)]
            await fake.tell(hold=["/generate"])
            groups.append(asyncio.create_task(engine.generate(request("coming", generations=2, length=LONG))))
            await fake.until(lambda told: told["held"]["/generate"] == 2)
            await looked(fake)
            await fake.tell(hold=["/generate", "/v1/loads"])
            await fake.tell(hold=["/v1/loads"])
            await fake.until(lambda told: told["lengths"] == [5] * 4)
            await fake.tell(lose=4)
            await fake.until(lambda told: told["lengths"] == [])
            await fake.tell(hold=[])
            await looked(fake)
            clock.now_s += 60.0
            for group in groups:
                with pytest.raises(EngineFailure, match="has lost at least 2 of 4 requests"):
                    await group
            await engine.__aexit__(None, None, None)

    run(case())


def test_a_called_off_request_that_is_lost_does_not_hold_its_seat_for_ever(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, engine_probe_s=1.0) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, fake)
            await fake.tell(lose=4)
            lost = asyncio.create_task(engine.lost.wait())
            group.cancel()
            await lost
            assert engine.status().samples_running == 0
            await serves(engine, weights(V0))

    run(case())


def test_a_check_that_hangs_ends(tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no sample under way nobody probes: the check has deadlines of its own."""
    monkeypatch.setattr("rollout_server.engines.sglang.swap.UPDATE_S", 0.3)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await fake.tell(hang=True)
            with pytest.raises(EngineFailure, match=r"/generate did not answer within 0\.3 s"):
                await engine.load_weights(weights(V0))

    run(case())


def test_a_state_that_cannot_be_read_does_no_harm(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            for faults in ({"garbage": ["/v1/loads"]}, {"refuse": {"/v1/loads": 500}}, {"no_loads": True}):
                group = await stopped_group(engine, fake)
                before = (await fake.tell(**faults))["calls"].get("/v1/loads", 0)
                await fake.until(lambda told, before=before: told["calls"]["/v1/loads"] >= before + 3)
                await fake.tell(garbage=[], refuse={}, no_loads=False, stop_at=0)
                assert len(await group) == 4
            assert engine.status().restarts == 0

    run(case())


def test_starts_that_fail_are_tried_again_until_one_works(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In every way a start can fail; and none leaves something that the next one stumbles over."""

    def failed() -> int:
        return sum("engine_start_failed" in record.getMessage() for record in caplog.records)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            before = open_files()
            for faults in (
                '{"die": 3}', '{"version": "0.5.1"}', '{"refuse": {"/v1/loads": 500}}', '{"garbage": ["/server_info"]}',
                '{"garbage": ["/generate"]}', '{"refuse": {"/server_info": 401}}',
            ):  # fmt: skip
                monkeypatch.setenv("FAKE_SGLANG", faults)
                seen = failed()
                await fake.tell(die=1)
                await until(lambda seen=seen: failed() >= seen + 2)
                loading = asyncio.create_task(engine.load_weights(weights(V0)))
                monkeypatch.delenv("FAKE_SGLANG")
                await loading
                assert len(await engine.generate(request())) == 4
            assert engine.status().restarts == 6
            assert open_files() == before

    run(case())


def test_lives_in_vain_are_begun_with_growing_pauses_and_told(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every load is followed by the end: the file, or its canaries, are wrong at their source."""
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 0.01, 60.0))
    monkeypatch.setenv("FAKE_SGLANG", '{"wrong": "other"}')

    def told(name: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if f"event={name} " in record.getMessage()]

    async def case() -> None:
        loop = asyncio.get_running_loop()
        async with child_engine(tiny_model_dir) as (engine, _):
            for _ in range(3):
                with pytest.raises(SamplesWithheld, match=r"weights 1.0 failed their check in SGLang"):
                    await engine.load_weights(weights(V0))
            loading = asyncio.create_task(engine.load_weights(weights(V0)))
            await until(lambda: len(told("engine_hopeless")) == 1)
            pauses = [line.partition("restart_in_s=")[2].split()[0] for line in told("engine_lost")]
            assert pauses == ["0", "0.01", "60"]
            assert "weights 1.0 failed their check" in told("engine_hopeless")[0]
            assert not loading.done(), "it waits"
            begun_s = loop.time()
        assert loop.time() - begun_s < 10
        with pytest.raises(EngineFailure, match="the engine is closed"):
            await loading

    run(case())


def test_a_life_that_served_is_followed_by_another_at_once(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 60.0))

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            for _ in range(4):
                await serves(engine, weights(V0))
                lost = asyncio.create_task(engine.lost.wait())
                await fake.tell(die=1)
                await lost
            await serves(engine, weights(V0))

    run(case())


def test_a_port_that_somebody_else_took_is_waited_for(
    tiny_model_dir: Path, weights: MakeWeights, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "PAUSES_S", (0.05,))

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            lost = asyncio.create_task(engine.lost.wait())
            await fake.tell(die=1)
            await lost
            with socket.create_server(("127.0.0.1", fake.port)):
                await until(lambda: "Address already in use" in caplog.text)
            await serves(engine, weights(V0))

    run(case())


def url_engine(model: Path, port: int, clock: Callable[[], float] = time.monotonic, **changes: Any) -> SGLangEngine:
    config = make_config(
        model, engine_url=f"http://127.0.0.1:{port}", engine_api_key=API_KEY, engine_admin_key=ADMIN_KEY, **changes
    )
    return SGLangEngine(config, Waits(), clock)


def test_an_engine_that_somebody_restarts_between_groups_is_found_out(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port):
            engine = url_engine(tiny_model_dir, port)
            await engine.__aenter__()
            await engine.load_weights(weights(V0))
        with running_fake(tiny_model_dir, port):
            await wait_fake_up(port)
            lost = asyncio.create_task(engine.lost.wait())
            with pytest.raises(ForeignWeights, match="weights called 'default', which this server never loaded"):
                await engine.generate(request())
            await lost
            assert engine.live is None
            await serves(engine, weights(V0))
            await engine.__aexit__(None, None, None)

    run(case())


async def wait_fake_up(port: int) -> None:
    while True:
        with contextlib.suppress(ConnectionError):
            await Fake(port).tell()
            return
        await asyncio.sleep(0.005)


def test_an_engine_that_goes_away_comes_back(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port) as process:
            engine = url_engine(tiny_model_dir, port)
            await engine.__aenter__()
            await engine.load_weights(weights(V0))
            group = await stopped_group(engine, Fake(port))
            process.kill()
            with pytest.raises(EngineFailure, match="/generate: "):
                await group
            process.wait()
        loading = asyncio.create_task(engine.load_weights(weights(V1)))
        with running_fake(tiny_model_dir, port):
            await loading
            assert (await engine.generate(request()))[0].spans == ((V1, 12),)
            await engine.__aexit__(None, None, None)

    run(case())


@pytest.mark.parametrize("drop", ["prefill", "sample"])
def test_one_connection_that_breaks_costs_nothing(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, drop: str
) -> None:
    monkeypatch.setattr(generation, "WORTH_TOKENS", 1)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(drop=drop)
            group = await engine.generate(request())
            assert [len(completion.completion_tokens) for completion in group] == [12] * 4
            assert (await fake.tell())["faults"]["drop"] == "", "it broke"
            assert (engine.status().restarts, engine.status().samples_running) == (0, 0)

    run(case())


def test_a_load_that_ends_as_its_life_does_leaves_nothing_live(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The life ends with everything done but the last step; who calls the load off is not quick enough."""
    real = loading.unlink_weights

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            life, loop = engine._life, asyncio.get_running_loop()
            assert life is not None

            def dies_meanwhile(file: Path) -> None:
                real(file)
                loop.call_soon_threadsafe(life.condemn, EngineFailure("it died in this very moment"))

            monkeypatch.setattr(loading, "unlink_weights", dies_meanwhile)
            with pytest.raises(EngineFailure, match="it died in this very moment"):
                await engine.load_weights(weights(V0))
            assert engine.live is None
            monkeypatch.setattr(loading, "unlink_weights", real)
            await serves(engine, weights(V0))

    run(case())


# What is under way when the engine is closed.


@pytest.mark.parametrize(
    "held", ["/generate", "/pause_generation", "/update_weights_from_disk", "/weights_checker", "/abort_request"]
)
def test_closing_ends_whatever_is_under_way(
    tiny_model_dir: Path, weights: MakeWeights, held: str, tmp_path: Path
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            calls = [await stopped_group(engine, fake, generations=12)]
            await fake.tell(hold=[held])
            if held == "/generate":
                calls.append(asyncio.create_task(engine.generate(request("more"))))
                engine.abort("under way")
            elif held == "/abort_request":
                engine.abort("under way")
                await fake.until_held(held)
            else:
                calls.append(asyncio.create_task(engine.load_weights(weights(V1))))
                calls.append(asyncio.create_task(engine.load_weights(weights(V2))))
                await fake.until_held(held)
            pid = (await fake.tell())["pid"]
        for call in calls:
            if held != "/generate" or call is not calls[0]:
                with pytest.raises(EngineFailure, match=r"the engine (was|is) closed"):
                    await call
        await asyncio.wait(calls)
        engine.abort("under way")
        for late in (engine.generate(request("late")), engine.load_weights(weights(V1))):
            with pytest.raises(EngineFailure, match="the engine is closed"):
                await late
        assert is_gone(pid)
        assert {entry.suffix for entry in tmp_path.iterdir()} == {".safetensors"}

    run(case())


@pytest.mark.parametrize("faults", ['{"slow_start_s": 60}', '{"die": 1}', '{"hang": true}', '{"hold": ["/v1/loads"]}'])
def test_closing_while_sglang_restarts(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, faults: str
) -> None:
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 60.0))

    before = psutil.Process().children()

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            monkeypatch.setenv("FAKE_SGLANG", faults)
            lost = asyncio.create_task(engine.lost.wait())
            await fake.tell(die=1)
            await lost
            loading = asyncio.create_task(engine.load_weights(weights(V0)))
            if "hang" in faults or "hold" in faults:
                await wait_fake_up(fake.port)
                await fake.until(lambda told: told["held"].get("/v1/loads", 0) == 1 or told["calls"].get("/generate"))
            else:
                await until(lambda: psutil.Process().children() != before or "die" in faults)
        with pytest.raises(EngineFailure, match="the engine is closed"):
            await loading
        assert psutil.Process().children() == before

    run(case())


SERVER = """
import asyncio, os, sys
from pathlib import Path
from rollout_server.engines.sglang.child import Child
from rollout_server.engines.sglang.command import build_command, build_options

async def serve():
    options = build_options(
        model=Path(sys.argv[1]), port=int(sys.argv[2]), keys_file=Path(sys.argv[3]), device="cpu", dtype="float32",
        room=8, context_length=256, has_amx=False,
        max_lora_rank=0, lora_target_modules=(), chosen={})
    child = await Child.start(build_command(options, parent=os.getpid()), os.environ, Path(sys.argv[3] + ".log"))
    print(child.pid, flush=True)
    await child.died

asyncio.run(serve())
"""


def test_a_server_that_is_killed_leaves_no_sglang(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def case() -> None:
        (tmp_path / "keys").write_text('api-key: "a"\nadmin-api-key: "b"\n')
        port = free_port(0)
        words = [sys.executable, "-c", SERVER, str(tiny_model_dir), str(port), str(tmp_path / "keys")]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as server:
            await wait_fake_up(port)
            told = await Fake(port).tell()
            assert server.stdout is not None
            assert int(server.stdout.readline()) == told["pid"]
            assert not is_gone(told["pid"])
            server.kill()
            await until(lambda: is_gone(told["pid"]) and is_gone(told["worker"]))
        Path(f"/dev/shm/sglang_fake_{told['pid']}").unlink()

    run(case())


def test_what_a_check_withholds_is_no_fault_of_the_group() -> None:
    assert issubclass(SamplesWithheld, EngineFailure)
    assert not issubclass(ForeignWeights, SamplesWithheld)
