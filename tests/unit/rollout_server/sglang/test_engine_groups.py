"""Groups on their way through SGLang (the fake one): every way that generation can go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protocol.messages import FinishReason
from rollout_server.engines.base import EngineFailure, EngineStatus, StagedWeights
from rollout_server.engines.sglang import generation, watch
from tests.fake_sglang.driving import ROOM, V0, V1, V2, child_engine, is_pure, request, run, until

pytestmark = pytest.mark.usefixtures("fake_path")
MakeWeights = Callable[..., StagedWeights]
LONG = 200


def test_a_group_is_sampled_by_the_weights_that_were_loaded(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            with pytest.raises(EngineFailure, match="group g: no weights are live yet: load_weights first"):
                await engine.generate(request())
            report = await engine.load_weights(weights(V0))
            assert report.checksum.startswith("sglang-0.5.23-cpu-float32-plain-tp1-pp1-dp1:")
            assert report.mismatch is not None
            assert report.mismatch < 1e-6
            group = await engine.generate(request(generations=5))
            assert [completion.spans for completion in group] == [((V0, 12),)] * 5
            assert all(is_pure(completion, weights(V0)) for completion in group)
            assert {completion.finish_reason for completion in group} == {FinishReason.LENGTH}
            assert len({tuple(completion.completion_tokens) for completion in group}) == 5

    run(case())


def test_stop_tokens_end_completions(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            await engine.load_weights(weights(V0))
            stops = tuple(range(10))
            group = await engine.generate(request(generations=8, length=100, stops=stops))
            assert {completion.finish_reason for completion in group} == {FinishReason.STOP}
            for completion in group:
                *before, last = completion.completion_tokens.tolist()
                assert last in stops
                assert not set(before) & set(stops)

    run(case())


def test_a_prompt_that_does_not_fit_is_refused_before_sglang_sees_it(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            with pytest.raises(EngineFailure, match=r"group g: a prompt of 256 tokens leaves no room .* takes 256"):
                await engine.generate(request(prompt=256))
            foreign = request()
            foreign.prompt_tokens[2] = 999
            with pytest.raises(EngineFailure, match="group g: prompt tokens 2 to 999: allowed is 0 to 44"):
                await engine.generate(foreign)
            short = await engine.generate(request(prompt=250, length=50, generations=1))
            assert len(short[0].completion_tokens) == 6
            bodies = (await fake.tell())["bodies"]
            assert max(len(body["input_ids"]) for body in bodies) == 250
            assert max(max(body["input_ids"]) for body in bodies) < 45

    run(case())


@pytest.mark.parametrize("prompt", [40, 200])
def test_a_prompt_is_computed_once_for_all_its_samples(
    tiny_model_dir: Path, weights: MakeWeights, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "WORTH_TOKENS", 400)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            before = len((await fake.tell())["bodies"])
            await engine.generate(request(generations=4, prompt=prompt))
            bodies = (await fake.tell())["bodies"][before:]
            prefills = [body for body in bodies if body["sampling_params"]["max_new_tokens"] == 0]
            assert len(prefills) == (1 if 3 * prompt >= 400 else 0)
            assert len({body["rid"] for body in bodies}) == len(bodies)
            assert len({len(body["rid"]) for body in bodies}) == 1, "none may begin with another"
            (key,) = {body["extra_key"] for body in bodies}
            assert key.endswith("-1.0")
            status = engine.status()
            assert status.prompt_tokens == 4 * prompt
            assert status.cached_prompt_tokens == (4 if prefills else 3) * (prompt - 1)

    run(case())


def test_an_abort_ends_running_and_waiting_samples(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4) as (engine, fake):
            await engine.load_weights(weights(V0))
            cut = asyncio.create_task(engine.generate(request("cut", generations=6, length=LONG)))
            stays = asyncio.create_task(engine.generate(request("stays", generations=2)))
            await until(lambda: engine.status().tokens_generated >= 20)
            assert (engine.status().samples_running, engine.status().samples_waiting) == (4, 4)
            engine.abort("no such group")
            engine.abort("cut")
            group = await cut
            assert {completion.finish_reason for completion in group} == {FinishReason.ABORT}
            lengths = [len(completion.completion_tokens) for completion in group]
            assert lengths[4:] == [0, 0]
            assert all(0 < length < LONG for length in lengths[:4])
            assert all(is_pure(completion, weights(V0)) for completion in group)
            assert [len(completion.completion_tokens) for completion in await stays] == [12, 12]
            assert (engine.status().samples_running, engine.status().samples_waiting) == (0, 0)
            assert (await fake.tell())["calls"]["/abort_request"] >= 4

    run(case())


@pytest.mark.parametrize("ticks", range(6))
def test_an_abort_that_comes_at_once_does_not_wait_for_a_seat(
    tiny_model_dir: Path, weights: MakeWeights, ticks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples of a group that has just begun are not in the queue yet when the abort looks there."""
    monkeypatch.setattr(generation, "ABORT_AGAIN_S", 60.0)

    async def case() -> None:
        async with child_engine(tiny_model_dir, room=1) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(hang=True)
            other = asyncio.create_task(engine.generate(request("other", generations=1)))
            await until(lambda: engine.status().samples_running == 1)
            cut = asyncio.create_task(engine.generate(request("cut")))
            for _ in range(ticks):
                await asyncio.sleep(0)
            await until(lambda: "cut" in engine._generations)
            engine.abort("cut")
            assert {completion.finish_reason for completion in await cut} == {FinishReason.ABORT}
            await fake.tell(hang=False)
            await other

    run(case())


def test_an_abort_is_said_again_until_the_samples_have_ended(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "ABORT_AGAIN_S", 0.02)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(hold=["/generate"], refuse={"/abort_request": 500})
            group = asyncio.create_task(engine.generate(request("g", generations=2, length=LONG)))
            await fake.until_held("/generate")
            engine.abort("g")
            await fake.until(lambda told: told["calls"].get("/abort_request", 0) >= 4)
            await fake.tell(hold=[], refuse={})
            assert {completion.finish_reason for completion in await group} == {FinishReason.ABORT}

    run(case())


def test_a_cancelled_group_keeps_its_seats_until_sglang_has_ended_its_samples(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    """SGLang looks every few seconds whether a caller has hung up: its samples must be ended, and ended first."""

    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4) as (engine, fake):
            await engine.load_weights(weights(V0))
            before = (await fake.tell(hold=["/abort_request"], stop_at=5))["most"]
            gone = asyncio.create_task(engine.generate(request("gone", generations=6, length=LONG)))
            await fake.until(lambda told: told["lengths"] == [5] * 4)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            following = asyncio.create_task(engine.generate(request("next", generations=6)))
            await fake.until_held("/abort_request")
            assert (engine.status().samples_running, engine.status().samples_waiting) == (4, 6)
            await fake.tell(hold=[], stop_at=0)
            assert [len(completion.completion_tokens) for completion in await following] == [12] * 6
            assert max(before, 4) == (await fake.tell())["most"], "SGLang never had more than it may"
            engine.abort("gone")
            await until(lambda: engine.status().samples_running == 0)

    run(case())


def test_the_siblings_of_a_sample_that_fails_are_ended_before_their_seats_are_given_on(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "ABORT_AGAIN_S", 0.02)

    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4) as (engine, fake):
            await engine.load_weights(weights(V0))
            before = (await fake.tell(stop_at=5))["most"]
            failing = asyncio.create_task(engine.generate(request("failing", generations=6, length=LONG)))
            await fake.until(lambda told: told["lengths"] == [5] * 4)
            assert engine._life is not None
            # one of them is ended by somebody else
            await engine._life.client.abort(next(iter(engine._generations["failing"]._asked)))
            with pytest.raises(EngineFailure, match="SGLang gave a sample up: Aborted by AbortReq"):
                await failing
            following = asyncio.create_task(engine.generate(request("next", generations=8)))
            await until(lambda: engine.status().samples_waiting == 4)  # all siblings have been ended, then
            await fake.tell(stop_at=0)
            assert len(await following) == 8
            assert (await fake.tell())["most"] == max(before, 4)
            await until(lambda: engine.status().samples_running == 0)

    run(case())


def test_a_called_off_group_does_not_call_off_its_next_attempt(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is leased again under the same name, and waits for the seats of the first attempt."""
    monkeypatch.setattr(generation, "ABORT_AGAIN_S", 0.02)

    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(hold=["/abort_request"], stop_at=5)
            first = asyncio.create_task(engine.generate(request("g", length=LONG)))
            await fake.until(lambda told: told["lengths"] == [5] * 4)
            first.cancel()
            await asyncio.wait([first])
            again = asyncio.create_task(engine.generate(request("g")))
            await until(lambda: engine.status().samples_waiting == 4)
            await fake.tell(hold=[], stop_at=0)
            assert {completion.finish_reason for completion in await again} == {FinishReason.LENGTH}

    run(case())


def test_two_calls_of_one_group_do_not_disturb_each_other(tiny_model_dir: Path, weights: MakeWeights) -> None:
    """A lease that is given again may meet its first attempt on the way out."""

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            await engine.load_weights(weights(V0))
            groups = await asyncio.gather(engine.generate(request("g", length=5)), engine.generate(request("g")))
            assert [len(group[0].completion_tokens) for group in groups] == [5, 12]

    run(case())


def test_room_is_never_exceeded_and_counters_only_grow(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            await engine.load_weights(weights(V0))
            assert engine.info.room == ROOM
            seen: list[EngineStatus] = []

            async def watch() -> None:
                while True:
                    seen.append(engine.status())
                    await asyncio.sleep(0.0005)

            watcher = asyncio.create_task(watch())
            groups = await asyncio.gather(
                *(engine.generate(request(f"g{i}", generations=5, length=20 + i)) for i in range(8))
            )
            watcher.cancel()
            await asyncio.wait([watcher])
            assert max(status.samples_running for status in seen) == ROOM
            assert max(status.samples_waiting for status in seen) >= 30
            for earlier, later in itertools.pairwise(seen):
                assert later.tokens_generated >= earlier.tokens_generated
                assert later.busy_s >= earlier.busy_s
                assert later.occupancy_s >= earlier.occupancy_s
            last = engine.status()
            assert last.tokens_generated == sum(len(c.completion_tokens) for group in groups for c in group)
            assert (last.samples_running, last.samples_waiting) == (0, 0)
            assert 0 < last.occupancy_s <= last.busy_s + last.paused_s + 1e-9
            assert last.restarts == 0

    run(case())


@pytest.mark.parametrize("poll_s", [0.01, 60.0])
def test_the_number_of_samples_shrinks_when_sglang_has_no_room_for_them(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, poll_s: float
) -> None:
    """By what SGLang reports of itself; and without that, by the samples that say they were thrown out."""
    monkeypatch.setattr(watch, "POLL_S", poll_s)

    async def case() -> None:
        # Eight samples fit at their longest of 64, says the engine; the fake has room for their beginnings only.
        options = {"max-total-tokens": 8 * 64}
        async with child_engine(tiny_model_dir, max_model_length=64, sglang=options) as (engine, fake):
            await engine.load_weights(weights(V0))
            assert engine._life is not None
            limit = engine._life.admission.limit
            assert limit.value == ROOM
            await fake.tell(max_tokens=150)
            await asyncio.gather(*(engine.generate(request(f"g{i}", length=40)) for i in range(8)))
            assert (await fake.tell())["retracted"] > 0
            assert limit.value < ROOM

    run(case())


def test_samples_that_were_put_back_by_a_swap_do_not_shrink_it(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 60.0)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            assert engine._life is not None
            await fake.tell(stop_at=5)
            group = asyncio.create_task(engine.generate(request(generations=7, length=20)))
            for version in (V1, V2):
                await fake.until(lambda told: told["lengths"] == [5] * 7)
                await engine.load_weights(weights(version))
            await fake.tell(stop_at=0)
            assert {completion.spans for completion in await group} == {((V0, 5), (V2, 15))}
            assert engine._life.admission.limit.value == ROOM

    run(case())


def test_samples_thrown_out_after_a_swap_that_kept_them_shrink_it(
    tiny_model_dir: Path, weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap in place throws nobody out: what SGLang counts then is its own."""
    monkeypatch.setattr(watch, "POLL_S", 60.0)

    async def case() -> None:
        async with child_engine(tiny_model_dir, weight_update_mode="in_place") as (engine, fake):
            await engine.load_weights(weights(V0))
            assert engine._life is not None
            await fake.tell(stop_at=5)
            group = asyncio.create_task(engine.generate(request(generations=7, length=30)))
            await fake.until(lambda told: told["lengths"] == [5] * 7)
            await engine.load_weights(weights(V1))
            await fake.tell(stop_at=0, max_tokens=150)
            await group
            assert (await fake.tell())["retracted"] > 0
            assert engine._life.admission.limit.value < ROOM

    run(case())


def test_a_sample_that_sglang_gives_up_fails_its_group_alone(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(refuse={"/generate": 400})
            with pytest.raises(EngineFailure, match=r"/generate says 400: .*refused"):
                await engine.generate(request())
            await fake.tell(refuse={}, garbage=["/generate"])
            with pytest.raises(EngineFailure, match="/generate: an answer that is none"):
                await engine.generate(request())
            await fake.tell(garbage=[])
            assert len(await engine.generate(request())) == 4
            assert engine.status().restarts == 0
            assert (engine.status().samples_running, engine.status().samples_waiting) == (0, 0)

    run(case())


def test_prompts_of_every_length_come_back_whole(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            await engine.load_weights(weights(V0))
            wanted = [request(f"g{i}", generations=1 + i % 3, length=1 + i, prompt=1 + 11 * i) for i in range(20)]
            groups = await asyncio.gather(*map(engine.generate, wanted))
            for asked, group in zip(wanted, groups, strict=True):
                assert len(group) == asked.num_generations
                for completion in group:
                    assert len(completion.completion_tokens) == asked.sampling.max_completion_length
                    assert np.isfinite(completion.behavior_logprobs).all()

    run(case())
