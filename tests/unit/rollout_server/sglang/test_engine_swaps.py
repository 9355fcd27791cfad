"""New weights in SGLang (the fake one): the three modes, the check, and what is held back until it has passed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from protocol.completions import Completion
from protocol.versions import Version
from protocol.weights.staging import links_directory
from rollout_server.engines.base import EngineFailure, SamplesWithheld, StagedWeights
from rollout_server.engines.sglang import SGLangEngine
from tests.fake_sglang.driving import V0, V1, V2, Fake, child_engine, content_of, is_pure, request, run, until

pytestmark = pytest.mark.usefixtures("fake_path")
MakeWeights = Callable[..., StagedWeights]
LONG, BEGUN = 200, 10
Mode = Literal["retract", "in_place", "drain"]


async def swap_under_way(engine: SGLangEngine, fake: Fake, weights: StagedWeights) -> list[Completion]:
    """Load `weights` when the four running samples of a group of six have BEGUN tokens; return the group."""
    await fake.tell(stop_at=BEGUN)
    group = asyncio.create_task(engine.generate(request(generations=6, length=LONG)))
    await fake.until(lambda told: told["lengths"] == [BEGUN] * 4)
    loading = asyncio.create_task(engine.load_weights(weights))
    draining = lambda: any(wait.name == "drain" for wait in engine._waits.current())  # noqa: E731
    await fake.until(lambda told: told["label"] == str(weights.version) or draining())
    await fake.tell(stop_at=0)
    report = await loading
    assert report.pause_s > 0
    assert engine.live == weights.version
    return await group


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_running_samples_go_on_under_the_new_weights(tiny_model_dir: Path, weights: MakeWeights, mode: Mode) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4, weight_update_mode=mode) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await swap_under_way(engine, fake, weights(V1))
            old = BEGUN + (mode == "in_place")
            for completion in group[:4]:
                assert completion.spans == ((V0, old), (V1, LONG - old))
            for completion in group[4:]:
                assert completion.spans == ((V1, LONG),)
                assert is_pure(completion, weights(V1))
            assert engine.status().paused_s > 0

    run(case())


@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_are_named_by_the_weights_that_sampled_them_also_in_place(
    tiny_model_dir: Path, weights: MakeWeights, overlap: bool
) -> None:
    """With the overlap scheduler the token under way at the pause is the old weights', and counted to the new ones."""

    async def case() -> None:
        options = {"disable-overlap-schedule": not overlap}
        async with child_engine(tiny_model_dir, room=4, weight_update_mode="in_place", sglang=options) as (
            engine,
            fake,
        ):
            old, new = weights(V0), weights(V1)
            await engine.load_weights(old)
            for completion in (await swap_under_way(engine, fake, new))[:4]:
                count = BEGUN + overlap
                assert completion.spans == ((V0, count), (V1, LONG - count))
                assert is_pure(completion, old, end=count)
                assert is_pure(completion, new, first=count, prompt=content_of(old.path))

    run(case())


@pytest.mark.parametrize(("overlap", "length"), [(True, 12), (True, 1), (False, 12)])
def test_a_first_token_in_flight_is_the_old_weights(
    tiny_model_dir: Path, weights: MakeWeights, overlap: bool, length: int
) -> None:
    """SGLang notes where a version ends by the tokens a sample has: it says nothing of one that has none yet."""

    async def case() -> None:
        options = {"disable-overlap-schedule": not overlap}
        async with child_engine(tiny_model_dir, weight_update_mode="in_place", sglang=options) as (engine, fake):
            old, new = weights(V0), weights(V1, canaries=False)
            await engine.load_weights(old)
            await fake.tell(hang=True)
            group = asyncio.create_task(engine.generate(request(generations=1, length=length)))
            await fake.until(lambda told: told["waiting"] == 1)  # its step is the one that is under way
            await engine.load_weights(new)
            await fake.tell(hang=False)
            (completion,) = await group
            count = int(overlap)
            assert completion.spans == tuple(span for span in ((V0, count), (V1, length - count)) if span[1])
            assert is_pure(completion, old, end=count)
            assert is_pure(completion, new, first=count, prompt=content_of(old.path) if overlap else "")

    run(case())


def test_a_group_whose_tokens_may_be_of_unchecked_weights_is_held_back(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    """Its only tokens are named after the old version, to be safe; it waits for the verdict on the new one."""

    async def case() -> None:
        async with child_engine(tiny_model_dir, weight_update_mode="in_place") as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(hang=True)
            group = asyncio.create_task(engine.generate(request(generations=1, length=1)))
            await fake.until(lambda told: told["waiting"] == 1)
            await fake.tell(hold=["/weights_checker"])
            loading = asyncio.create_task(engine.load_weights(weights(V1)))
            await fake.until_held("/weights_checker")
            await fake.tell(hang=False)
            await until(lambda: engine.status().samples_running == 0)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not group.done()
            await fake.tell(hold=[])
            assert (await group)[0].spans == ((V0, 1),)
            assert engine.live == V1
            await loading

    run(case())


def test_drain_lets_samples_end_under_the_weights_they_began_with(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4, weight_update_mode="drain") as (engine, fake):
            await engine.load_weights(weights(V0))
            group = await swap_under_way(engine, fake, weights(V1))
            assert [completion.spans for completion in group] == [((V0, LONG),)] * 4 + [((V1, LONG),)] * 2
            assert all(is_pure(c, weights(V0 if i < 4 else V1)) for i, c in enumerate(group))
            assert "/pause_generation" not in (await fake.tell())["calls"]

    run(case())


def test_a_prompt_computed_under_old_weights_is_not_sampled_from(tiny_model_dir: Path, weights: MakeWeights) -> None:
    """In place keeps cached prompts: a sample asked for before the swap and begun after it would stand on them."""

    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4, weight_update_mode="in_place") as (engine, fake):
            await engine.load_weights(weights(V0))
            await engine.generate(request("warm", generations=1))  # its prompt is in the cache
            await fake.tell(hold=["/generate"])
            group = asyncio.create_task(engine.generate(request("late", generations=3)))
            await fake.until(lambda told: told["held"]["/generate"] == 3)
            loading = asyncio.create_task(engine.load_weights(weights(V1, canaries=False)))
            await until(lambda: engine.live == V1)
            before = len((await fake.tell())["bodies"])
            await fake.tell(hold=[])
            for completion in await group:
                assert completion.spans == ((V1, 12),)
                assert is_pure(completion, weights(V1))
            await loading
            bodies = (await fake.tell())["bodies"][before:]
            keys = [body["extra_key"].partition("-")[2] for body in bodies]
            assert keys == ["1.0"] * 3 + ["1.1"] * 3, "the fault happened, and was mended by asking again"

    run(case())


@pytest.mark.parametrize("mode", ["retract", "drain"])
def test_other_modes_forget_cached_prompts(tiny_model_dir: Path, weights: MakeWeights, mode: Mode) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, weight_update_mode=mode) as (engine, _):
            for version in (V0, V1, V2):
                await engine.load_weights(weights(version))
                assert all(is_pure(c, weights(version)) for c in await engine.generate(request()))

    run(case())


def test_a_version_that_does_not_fit_leaves_the_old_one_serving(
    tiny_model_dir: Path, weights: MakeWeights, tmp_path: Path
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
            with pytest.raises(EngineFailure, match=r"weights broken.safetensors cannot be read"):
                await engine.load_weights(StagedWeights(version=V1, path=tmp_path / "broken.safetensors"))
            (tmp_path / str(V1)).mkdir()
            links_directory(tmp_path / "1.safetensors").write_text("in the way")
            blocked = weights(V1)
            blocked.path.rename(tmp_path / "1.safetensors")
            with pytest.raises(EngineFailure, match=r"weights 1.safetensors cannot be given a directory for SGLang"):
                await engine.load_weights(StagedWeights(version=V1, path=tmp_path / "1.safetensors"))
            assert engine.live == V0
            assert all(is_pure(completion, weights(V0)) for completion in await engine.generate(request()))
            assert engine.status().restarts == 0
            assert (await fake.tell())["calls"]["/update_weights_from_disk"] == 1

    run(case())


def test_directories_for_sglang_do_not_pile_up(tiny_model_dir: Path, weights: MakeWeights, tmp_path: Path) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            for number in range(5):
                await engine.load_weights(weights(Version(1, number)))
                assert {entry.suffix for entry in tmp_path.iterdir()} == {".safetensors"}

    run(case())


def test_equal_weights_under_another_version_pass(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            first = await engine.load_weights(weights(V0, content=5))
            second = await engine.load_weights(weights(V1, content=5))
            third = await engine.load_weights(weights(V2, content=6))
            assert first.checksum == second.checksum != third.checksum
            assert (await engine.generate(request()))[0].spans == ((V2, 12),)

    run(case())


async def group_held_back(engine: SGLangEngine, fake: Fake, weights: StagedWeights) -> tuple[Any, Any]:
    """A group that has ended under weights whose check still goes on: (its call, the load's)."""
    await fake.tell(hold=["/weights_checker"])
    loading = asyncio.create_task(engine.load_weights(weights))
    await fake.until_held("/weights_checker")
    tokens = engine.status().tokens_generated
    group = asyncio.create_task(engine.generate(request("held", generations=2)))
    await until(lambda: engine.status().tokens_generated >= tokens + 24 and engine.status().samples_running == 0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not group.done()
    assert engine.live == V0
    return group, loading


def test_a_group_is_held_back_until_its_weights_have_passed(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            group, loading = await group_held_back(engine, fake, weights(V1))
            assert engine._life is not None
            assert not engine._life.served, "a life whose groups are all withheld is in vain"
            await fake.tell(hold=[])
            assert [completion.spans for completion in await group] == [((V1, 12),)] * 2
            assert engine._life.served
            assert engine.live == V1
            await loading

    run(case())


def test_a_group_that_the_old_weights_sampled_is_not_held_back(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = asyncio.create_task(engine.generate(request(generations=2)))
            await until(lambda: engine.status().samples_running == 2)
            await fake.tell(hold=["/pause_generation"])
            loading = asyncio.create_task(engine.load_weights(weights(V1)))
            await fake.until_held("/pause_generation")
            assert [completion.spans for completion in await group] == [((V0, 12),)] * 2
            assert not loading.done()
            await fake.tell(hold=[])
            await loading

    run(case())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("stale", "its checksum is still .*, though the weights differ from the last"),
        ("other", "its logprobs differ from the learner's by .* nats a token on the canaries"),
    ],
)
def test_weights_that_fail_their_check_serve_nobody(
    tiny_model_dir: Path, weights: MakeWeights, wrong: str, reason: str
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            await fake.tell(wrong=wrong)
            group, loading = await group_held_back(engine, fake, weights(V1))
            lost = asyncio.create_task(engine.lost.wait())
            await fake.tell(hold=[])
            for call in (loading, group):
                with pytest.raises(SamplesWithheld, match=rf"weights 1.1 failed their check in SGLang: {reason}"):
                    await call
            await lost
            assert engine.live is None
            with pytest.raises(EngineFailure, match="no weights are live yet"):
                await engine.generate(request())
            await engine.load_weights(weights(V1))  # into the next life
            assert engine.live == V1
            assert all(is_pure(completion, weights(V1)) for completion in await engine.generate(request()))
            assert engine.status().restarts == 1

    run(case())


@pytest.mark.parametrize(
    ("faults", "failure"),
    [
        ({"fail_update": "no such tensor"}, "/update_weights_from_disk says 400: .*no such tensor"),
        ({"refuse": {"/pause_generation": 500}}, "/pause_generation says 500"),
        ({"refuse": {"/continue_generation": 500}}, "/continue_generation says 500"),
        ({"refuse": {"/weights_checker": 500}}, "/weights_checker says 500"),
        ({"garbage": ["/weights_checker"]}, "/weights_checker: an answer that is none"),
    ],
)
def test_a_swap_that_fails_is_followed_by_a_new_life(
    tiny_model_dir: Path, weights: MakeWeights, faults: dict[str, Any], failure: str
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = asyncio.create_task(engine.generate(request(length=LONG)))
            await until(lambda: engine.status().samples_running == 4)
            await fake.tell(**faults)
            with pytest.raises(EngineFailure, match=failure):
                await engine.load_weights(weights(V1))
            with pytest.raises(SamplesWithheld, match=rf"the swap to weights 1.1 failed: .*{failure}"):
                await group
            await engine.load_weights(weights(V1))
            assert (await engine.generate(request()))[0].spans == ((V1, 12),)
            assert engine.status().restarts == 1

    run(case())


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/update_weights_from_disk", "/continue_generation", "/weights_checker"]
)
def test_a_load_that_is_called_off_half_way_ends_the_life(
    tiny_model_dir: Path, weights: MakeWeights, path: str
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, fake):
            await engine.load_weights(weights(V0))
            group = asyncio.create_task(engine.generate(request(length=LONG)))
            await until(lambda: engine.status().samples_running == 4)
            await fake.tell(hold=[path])
            loading = asyncio.create_task(engine.load_weights(weights(V1)))
            await fake.until_held(path)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            with pytest.raises(SamplesWithheld, match=r"the swap to weights 1.1 failed: it was called off"):
                await group
            await engine.load_weights(weights(V2))
            assert (await engine.generate(request()))[0].spans == ((V2, 12),)

    run(case())


def test_another_engines_checksum_must_be_the_same(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (one, _), child_engine(tiny_model_dir) as (two, _):
            report = await one.load_weights(weights(V0))
            version = weights(V0)
            agreeing = StagedWeights(
                version=V0, path=version.path, digest=version.digest, checksums=(report.checksum, "other:x")
            )
            assert (await two.load_weights(agreeing)).checksum == report.checksum
            differing = StagedWeights(
                version=V1, path=version.path, digest=version.digest, checksums=(report.checksum + "0",)
            )
            with pytest.raises(SamplesWithheld, match="another engine of its kind has "):
                await two.load_weights(differing)

    run(case())


def test_canaries_longer_than_the_model_are_cut(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_model_length=5) as (engine, fake):
            report = await engine.load_weights(weights(V0))
            assert report.mismatch is not None
            assert report.mismatch < 1e-6
            scored = [body for body in (await fake.tell())["bodies"] if "logprob_start_len" in body]
            assert [len(body["input_ids"]) for body in scored] == [4, 4]

    run(case())


def test_without_canaries_the_bytes_are_checked_alone(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            report = await engine.load_weights(weights(V0, canaries=False))
            assert (report.mismatch, report.mismatch_kl) == (None, None)
            assert report.checksum

    run(case())


def test_many_swaps_under_way_keep_every_span_right(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            await engine.load_weights(weights(V0))
            groups = [asyncio.create_task(engine.generate(request(f"g{i}", length=60 + 30 * i))) for i in range(4)]
            number = 0
            while not all(group.done() for group in groups):
                number += 1
                await engine.load_weights(weights(Version(1, number)))
            assert number > 2
            for group in groups:
                for completion in await group:
                    assert sum(count for _, count in completion.spans) == len(completion.completion_tokens)
                    versions = [version for version, _ in completion.spans]
                    assert versions == sorted(set(versions))
                    first = 0
                    for version, count in completion.spans:
                        assert is_pure(completion, weights(version), first=first, end=first + count)
                        first += count

    run(case())
