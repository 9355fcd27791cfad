"""The suite every engine passes: what rollout_server/engines/base.py promises.

Each case runs on a fresh engine that a `Kind` makes; scripted engines are paced so that groups last long enough to be
interrupted. Waiting is always for a condition, under a deadline.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.completions import Completion
from protocol.messages import FinishReason, Sampling
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ScriptedOptions, ServerConfig
from rollout_server.engines.base import Engine, EngineFailure, GenerationRequest, StagedWeights
from tests.changes import change_some
from tests.models import EOS_ID, build_tiny_model, encode
from tests.sglang_cpu.launch import RunningSGLang

V0, V1, V2, V3 = (Version(1, number) for number in range(4))
LONG = 400
"""Tokens of a completion that is still under way when the test acts."""
STOPS = (EOS_ID, *encode("aeiou"))


@dataclass
class Kind:
    name: str
    make: Callable[[int], Engine]
    """room -> engine, to be entered"""
    weights: Callable[[Version], StagedWeights]
    """Other weights for every version."""
    broken: StagedWeights
    """A version that cannot be loaded, as the second load."""
    change: Callable[[StagedWeights, Version], StagedWeights] | None = None
    """(a version, the name of another) -> another, which differs in few elements. None: it has no weights."""
    reproducible: bool = True
    """See EngineInfo. Engines that are not can't be held to what a second run samples."""


def scripted_kind(tmp_path: Path) -> Kind:
    from rollout_server.engines.scripted import ScriptedEngine

    options = ScriptedOptions(mean_length=20.0, token_s=0.0002, swap_s=0.001)

    def weights(version: Version) -> StagedWeights:
        return StagedWeights(version=version, path=tmp_path)

    return Kind("scripted", lambda room: ScriptedEngine(options, room), weights, weights(V2))


def transformers_kind(tiny_model_dir: Path, tmp_path: Path) -> Kind:
    from rollout_server.engines.transformers import TransformersEngine

    def make(room: int) -> Engine:
        return TransformersEngine(tiny_model_dir, room=room, max_model_length=512, dtype="float32", device="cpu")

    return Kind("transformers", make, made_weights(tmp_path), broken_weights(tmp_path), change_few)


def sglang_kind(sglang: RunningSGLang, tmp_path: Path) -> Kind:
    from rollout_server.engines.sglang import SGLangEngine

    def make(room: int) -> Engine:
        config = ServerConfig(
            engine="sglang", model=str(sglang.model), room=room, max_model_length=512, engine_url=sglang.url,
            engine_api_key=sglang.api_key, engine_admin_key=sglang.admin_key,
        )  # fmt: skip
        return SGLangEngine(config, Waits())

    return Kind("sglang", make, made_weights(tmp_path), broken_weights(tmp_path), change_few, reproducible=False)


def made_weights(tmp_path: Path) -> Callable[[Version], StagedWeights]:
    def weights(version: Version) -> StagedWeights:
        path = tmp_path / f"{version}.safetensors"
        if not path.exists():
            built = build_tiny_model(tmp_path / f"model {version}", seed=version.policy_version)
            shutil.copy(built / "model.safetensors", path)
        return StagedWeights(version=version, path=path, digest=hashlib.sha256(path.read_bytes()).hexdigest())

    return weights


def change_few(base: StagedWeights, version: Version) -> StagedWeights:
    from safetensors.torch import load_file, save_file

    path = base.path.with_name(f"{version} of few.safetensors")
    tensors, changes = change_some(load_file(base.path), share=0.01)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return StagedWeights(version=version, path=path, digest=digest, base=base.version, changes=changes)


def broken_weights(tmp_path: Path) -> StagedWeights:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    return StagedWeights(version=V2, path=broken)


@pytest.fixture(params=["scripted", "transformers", pytest.param("sglang", marks=pytest.mark.sglang)])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "scripted":
        return scripted_kind(tmp_path)
    if request.param == "sglang":
        return sglang_kind(request.getfixturevalue("sglang"), tmp_path)
    return transformers_kind(request.getfixturevalue("tiny_model_dir"), tmp_path)


def run(case: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.0005)


def request(
    group: str,
    *,
    seed: int = 7,
    generations: int = 4,
    length: int = 24,
    stops: tuple[int, ...] = STOPS,
    prompt: str = "2+3=",
) -> GenerationRequest:
    return GenerationRequest(
        group_id=group,
        prompt_tokens=np.array(encode(prompt), np.int32),
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=stops),
        seed=seed,
    )


def tokens(group: list[Completion]) -> list[list[int]]:
    return [completion.completion_tokens.tolist() for completion in group]


def check_well_formed(group: list[Completion], vocab_size: int) -> None:
    for completion in group:
        length = len(completion.completion_tokens)
        assert len(completion.behavior_logprobs) == length == sum(count for _, count in completion.spans)
        assert completion.completion_tokens.dtype == np.int32
        assert completion.behavior_logprobs.dtype == np.float32
        assert np.isfinite(completion.behavior_logprobs).all()
        assert (completion.behavior_logprobs <= 0).all()
        assert ((completion.completion_tokens >= 0) & (completion.completion_tokens < vocab_size)).all()
        versions = [version for version, _ in completion.spans]
        assert versions == sorted(set(versions))
        assert all(count > 0 for _, count in completion.spans)


def test_a_group_has_its_generations_in_order_and_each_draws_its_own(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(16) as engine:
            await engine.load_weights(kind.weights(V0))
            group = await engine.generate(request("g", generations=6))
            assert len(group) == 6
            check_well_formed(group, engine.info.vocab_size)
            assert {version for completion in group for version, _ in completion.spans} == {V0}
            assert len({tuple(t) for t in tokens(group)}) > 1

    run(case())


def test_tokens_depend_on_the_seed_and_not_on_batch_mates(kind: Kind) -> None:
    if not kind.reproducible:
        pytest.skip("it does not sample by seed, and says so")

    async def case() -> None:
        async with kind.make(8) as engine:
            await engine.load_weights(kind.weights(V0))
            alone = await engine.generate(request("alone"))
            others = [request(f"mate{i}", seed=i, prompt="12" * (i + 1), length=9 + i) for i in range(5)]
            crowd = await asyncio.gather(*(engine.generate(r) for r in (*others[:3], request("again"), *others[3:])))
            other_seed = await engine.generate(request("other", seed=8))
            assert tokens(crowd[3]) == tokens(alone)
            assert tokens(other_seed) != tokens(alone)
            for mine, first in zip(crowd[3], alone, strict=True):
                np.testing.assert_allclose(mine.behavior_logprobs, first.behavior_logprobs, atol=1e-5)

    run(case())


def test_a_stop_token_ends_a_completion_and_is_its_last_token(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(16) as engine:
            await engine.load_weights(kind.weights(V0))
            group = await engine.generate(request("g", generations=12, length=64))
            assert sum(c.finish_reason is FinishReason.STOP for c in group) > 6
            for completion in group:
                *before, last = completion.completion_tokens.tolist()
                assert not set(before) & set(STOPS)
                assert (last in STOPS) == (completion.finish_reason is FinishReason.STOP)

    run(case())


def test_max_completion_length_ends_a_completion(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(16) as engine:
            await engine.load_weights(kind.weights(V0))
            group = await engine.generate(request("g", length=5, stops=()))
            assert [len(t) for t in tokens(group)] == [5] * 4
            assert {c.finish_reason for c in group} == {FinishReason.LENGTH}
            single = await engine.generate(request("h", length=1, stops=()))
            assert [len(t) for t in tokens(single)] == [1] * 4

    run(case())


def test_abort_returns_what_there_is(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(4) as engine:
            await engine.load_weights(kind.weights(V0))
            # Room for four: two of the six have no place yet. The bystander waits behind them.
            task = asyncio.create_task(engine.generate(request("cut", generations=6, length=LONG, stops=())))
            bystander = asyncio.create_task(engine.generate(request("stays")))
            await until(lambda: engine.status().tokens_generated >= 40)
            engine.abort("no such group")
            engine.abort("cut")
            group = await task
            assert {c.finish_reason for c in group} == {FinishReason.ABORT}
            check_well_formed(group, engine.info.vocab_size)
            assert [len(t) for t in tokens(group)][4:] == [0, 0]
            assert all(10 <= len(t) < LONG for t in tokens(group)[:4])
            assert FinishReason.ABORT not in {c.finish_reason for c in await bystander}
            assert (engine.status().samples_running, engine.status().samples_waiting) == (0, 0)
            if not kind.reproducible:
                return
            whole = await engine.generate(request("whole", generations=6, length=LONG, stops=()))
            for cut, full in zip(tokens(group), tokens(whole), strict=True):
                assert full[: len(cut)] == cut

    run(case())


def test_cancelling_the_call_ends_the_group(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(4) as engine:
            await engine.load_weights(kind.weights(V0))
            task = asyncio.create_task(engine.generate(request("g", length=LONG, stops=())))
            await until(lambda: engine.status().samples_running == 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: engine.status().samples_running == 0)
            assert engine.status().tokens_generated < 4 * LONG

    run(case())


def test_two_versions_inside_one_completion(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(4) as engine:
            await engine.load_weights(kind.weights(V0))
            reference = await engine.generate(request("old", length=LONG, stops=()))
            before = engine.status().tokens_generated
            task = asyncio.create_task(engine.generate(request("g", generations=5, length=LONG, stops=())))
            await until(lambda: engine.status().tokens_generated >= before + 40)
            assert (await engine.load_weights(kind.weights(V1))).pause_s >= 0
            assert engine.live == V1
            group = await task
            check_well_formed(group, engine.info.vocab_size)
            for old, new, completion in zip(tokens(reference), tokens(group), group, strict=False):
                (first, drawn_old), (second, drawn_new) = completion.spans
                assert (first, second) == (V0, V1)
                assert drawn_old >= 10
                assert drawn_old + drawn_new == LONG
                assert new[drawn_old:] != old[drawn_old:]
                assert not kind.reproducible or new[:drawn_old] == old[:drawn_old]
            assert group[4].spans == ((V1, LONG),)

    run(case())


def test_live_says_what_samples_the_next_token(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(4) as engine:
            assert engine.live is None
            with pytest.raises(EngineFailure, match="group g: no weights are live yet"):
                await engine.generate(request("g"))
            for version in (V0, V2):
                report = await engine.load_weights(kind.weights(version))
                assert engine.live == version
                assert 0 <= report.pause_s < 5
                group = await engine.generate(request("g"))
                assert all(completion.spans[0][0] == version for completion in group)
            assert engine.status().paused_s > 0

    run(case())


def test_a_failed_load_keeps_the_old_version_whole(kind: Kind) -> None:
    async def case() -> None:
        engine = kind.make(4)
        if kind.name == "scripted":
            from rollout_server.engines.scripted import ScriptedEngine

            # By seed 7 the first load works and the second fails.
            engine = ScriptedEngine(ScriptedOptions(seed=7, fail_load_probability=0.5), 4)
        async with engine:
            await engine.load_weights(kind.weights(V0))
            before = await engine.generate(request("g"))
            with pytest.raises(EngineFailure, match="weights"):
                await engine.load_weights(kind.broken)
            assert engine.live == V0
            after = await engine.generate(request("g"))
            assert not kind.reproducible or tokens(after) == tokens(before)
            assert {version for c in after for version, _ in c.spans} == {V0}

    run(case())


def test_few_changes_are_what_the_whole_file_would_be(kind: Kind) -> None:
    change = kind.change
    if change is None:
        pytest.skip("it has no weights")

    async def case() -> None:
        async with kind.make(4) as engine:
            first = kind.weights(V0)
            few = change(first, V1)
            whole = dataclasses.replace(few, version=V2, base=None, changes=None)
            lie = dataclasses.replace(few, version=V3, base=V0)  # what is live by then is another version
            reports, groups = [], []
            for before, weights in ((first, few), (kind.weights(V1), whole), (kind.weights(V2), lie)):
                await engine.load_weights(before)
                reports.append(await engine.load_weights(weights))
                assert engine.live == weights.version
                groups.append(await engine.generate(request("g")))
            assert len({report.checksum for report in reports}) == 1
            if kind.reproducible:
                assert tokens(groups[0]) == tokens(groups[1]) == tokens(groups[2])
                for one, other in zip(groups[0], groups[1], strict=True):
                    assert (one.behavior_logprobs == other.behavior_logprobs).all()

    run(case())


def test_positions_outside_a_tensor_are_refused_and_nothing_changes(kind: Kind) -> None:
    change = kind.change
    if change is None:
        pytest.skip("it has no weights")

    async def case() -> None:
        async with kind.make(4) as engine:
            first = kind.weights(V0)
            await engine.load_weights(first)
            before = await engine.generate(request("g"))
            few = change(first, V1)
            name = "model.norm.weight"
            wrong = dataclasses.replace(few, changes={**few.changes, name: np.array([0, 32])})
            with pytest.raises(EngineFailure, match=f"{name} has positions 0 to 32, allowed are 0 to 31"):
                await engine.load_weights(wrong)
            assert engine.live == V0
            after = await engine.generate(request("g"))
            assert not kind.reproducible or tokens(after) == tokens(before)

    run(case())


def test_room_is_never_exceeded_and_counters_only_grow(kind: Kind) -> None:
    async def case() -> None:
        async with kind.make(6) as engine:
            await engine.load_weights(kind.weights(V0))
            assert engine.info.room == 6
            assert engine.info.reproducible == kind.reproducible
            seen = [engine.status()]

            async def watch() -> None:
                while True:
                    seen.append(engine.status())
                    await asyncio.sleep(0.0005)

            watcher = asyncio.create_task(watch())
            requests = [request(f"g{i}", seed=i, generations=5, length=40) for i in range(6)]
            groups = await asyncio.gather(*map(engine.generate, requests))
            watcher.cancel()
            seen.append(engine.status())
            assert max(status.samples_running for status in seen) == 6
            assert max(status.samples_waiting for status in seen) >= 5
            for earlier, later in itertools.pairwise(seen):
                assert later.tokens_generated >= earlier.tokens_generated
                assert later.busy_s >= earlier.busy_s
                assert later.occupancy_s >= earlier.occupancy_s
            last = seen[-1]
            assert last.tokens_generated == sum(len(t) for group in groups for t in tokens(group))
            assert (last.samples_running, last.samples_waiting) == (0, 0)
            assert 0 < last.occupancy_s <= last.busy_s + last.paused_s + 1e-9

    run(case())


def test_samples_that_end_free_their_seats_for_the_next_groups(kind: Kind) -> None:
    """Room is given per sample: a straggler holds one seat, and the next group need not wait for it."""

    async def case() -> None:
        async with kind.make(4) as engine:
            await engine.load_weights(kind.weights(V0))
            ended: list[str] = []

            async def generate(wanted: GenerationRequest) -> list[Completion]:
                completions = await engine.generate(wanted)
                ended.append(wanted.group_id)
                return completions

            # Of the first four samples that end at random one lasts longest; the next group's are of one token each.
            first = asyncio.ensure_future(generate(request("long", seed=3, length=LONG)))
            second = asyncio.ensure_future(generate(request("short", seed=5, length=1)))
            longest, _ = await asyncio.gather(first, second)
            lengths = sorted(map(len, tokens(longest)))
            assert lengths[0] + 2 < lengths[-1], "else the case shows nothing: another seed"
            assert ended == ["short", "long"]
            assert engine.status().tokens_held == 0

    run(case())


def test_closing_fails_what_is_outstanding(kind: Kind) -> None:
    async def case() -> None:
        engine = kind.make(4)
        async with engine:
            await engine.load_weights(kind.weights(V0))
            tasks = [asyncio.create_task(engine.generate(request(f"g{i}", length=LONG, stops=()))) for i in range(3)]
            await until(lambda: engine.status().samples_running == 4)
        for task in tasks:
            with pytest.raises(EngineFailure, match="closed"):
                await task
        with pytest.raises(EngineFailure, match="closed"):
            await engine.generate(request("late"))
        with pytest.raises(EngineFailure, match="closed"):
            await engine.load_weights(kind.weights(V1))

    run(case())
