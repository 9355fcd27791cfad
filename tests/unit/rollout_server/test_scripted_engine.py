"""The scripted engine on a virtual clock: its times are exact, its script repeats, its cost is per event."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.tuning.virtual_time import run_virtual
from protocol.completions import Completion
from protocol.identity import group_seed
from protocol.length_trace import LengthTrace, write_length_trace
from protocol.messages import FinishReason, Sampling
from protocol.versions import Version
from rollout_server.config import ScriptedOptions
from rollout_server.engines.base import EngineFailure, GenerationRequest, LoadReport, StagedWeights
from rollout_server.engines.scripted import ScriptedEngine
from rollout_server.engines.scripted_batch import Outcome, ScriptedBatch, ScriptedJob

V0, V1, V2 = Version(1, 0), Version(1, 1), Version(2, 0)


def weights(version: Version) -> StagedWeights:
    return StagedWeights(version=version, path=Path("unused"))


def request(group: str = "g", *, seed: int = 1, generations: int = 4, length: int = 10, stops: bool = False) -> Any:
    return GenerationRequest(
        group_id=group,
        prompt_tokens=np.array([5], np.int32),
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=(3, 1) if stops else ()),
        seed=seed,
    )


async def started(room: int = 4, **options: Any) -> ScriptedEngine:
    engine = await ScriptedEngine(ScriptedOptions(**options), room).__aenter__()
    await engine.load_weights(weights(V0))
    return engine


def now() -> float:
    return asyncio.get_running_loop().time()


async def at(time_s: float) -> None:
    await asyncio.sleep(time_s - now())


def test_a_step_costs_more_the_fuller_the_batch() -> None:
    async def case() -> None:
        engine = await started(room=4, token_s=0.1, occupancy_cost=1.0)
        await engine.generate(request(generations=4))
        assert now() == pytest.approx(10 * 0.1 * 2)
        await engine.generate(request(generations=1))
        assert now() == pytest.approx(2 + 10 * 0.1 * 1.25)

    run_virtual(case())


def test_a_sample_that_joins_slows_the_others_from_then_on() -> None:
    async def case() -> None:
        engine = await started(room=2, token_s=0.1, occupancy_cost=1.0)
        first = asyncio.create_task(engine.generate(request("a", generations=1)))
        await at(0.75)  # five steps of 0.15 s alone, then steps of 0.2 s
        second = asyncio.create_task(engine.generate(request("b", generations=1)))
        await first
        assert now() == pytest.approx(0.75 + 5 * 0.2)
        await second
        assert now() == pytest.approx(1.75 + 5 * 0.15)

    run_virtual(case())


def test_samples_beyond_the_room_take_the_places_that_get_free() -> None:
    async def case() -> None:
        engine = await started(room=2, token_s=0.1)
        group = asyncio.create_task(engine.generate(request(generations=5)))
        await at(0.5)
        assert (engine.status().samples_running, engine.status().samples_waiting) == (2, 3)
        await at(2.5)
        assert (engine.status().samples_running, engine.status().samples_waiting) == (1, 0)
        assert engine.status().tokens_generated == 45
        await group
        assert now() == pytest.approx(3.0)
        status = engine.status()
        assert (status.tokens_generated, status.busy_s, status.occupancy_s) == (
            50,
            pytest.approx(3),
            pytest.approx(2.5),
        )

    run_virtual(case())


def test_many_groups_in_a_row_do_not_drift() -> None:
    async def case() -> None:
        engine = await started(room=1, token_s=0.001)
        await asyncio.gather(*(engine.generate(request(f"g{i}", generations=1, length=7)) for i in range(2000)))
        assert now() == pytest.approx(14.0, abs=1e-6)

    run_virtual(case())


def test_time_is_cut_per_sample_and_not_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: Counter[str] = Counter()

    async def case() -> None:
        loop = asyncio.get_running_loop()
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda *args: (timers.update(["set"]), call_at(*args))[1])
        engine = await started(room=8, token_s=0.01)
        await engine.generate(request(generations=16, length=100_000))
        assert now() == pytest.approx(2000)

    run_virtual(case())
    assert timers["set"] < 10


def test_without_a_token_time_everything_ends_at_once_and_others_still_run() -> None:
    async def case() -> None:
        engine = await started(room=2, occupancy_cost=3.0)
        ran = []
        asyncio.get_running_loop().call_soon(lambda: ran.append("other"))
        group = await engine.generate(request(generations=9))
        assert (len(group), now(), ran) == (9, 0.0, ["other"])

    run_virtual(case())


def test_lengths_are_lognormal_around_the_median() -> None:
    async def case() -> None:
        engine = await started(room=64, mean_length=200.0, length_sigma=0.5)
        group = await engine.generate(request(generations=2000, length=10_000, stops=True))
        lengths = [len(c.completion_tokens) for c in group]
        assert statistics.median(lengths) == pytest.approx(200, rel=0.05)
        assert statistics.stdev(np.log(lengths)) == pytest.approx(0.5, rel=0.05)
        assert {c.finish_reason for c in group} == {FinishReason.STOP}
        cut = await engine.generate(request(generations=200, length=200, stops=True))
        assert max(len(c.completion_tokens) for c in cut) == 200
        assert 60 < sum(c.finish_reason is FinishReason.LENGTH for c in cut) < 140
        equal = await started(mean_length=7.0, length_sigma=0.0)
        assert {len(c.completion_tokens) for c in await equal.generate(request(stops=True))} == {7}

    run_virtual(case())


def same(one: list[Completion], other: list[Completion]) -> bool:
    return all(
        a.completion_tokens.tolist() == b.completion_tokens.tolist()
        and a.behavior_logprobs.tolist() == b.behavior_logprobs.tolist()
        and (a.spans, a.finish_reason) == (b.spans, b.finish_reason)
        for a, b in zip(one, other, strict=True)
    )


def test_the_script_repeats_and_follows_seed_and_version() -> None:
    async def case() -> None:
        one, again, other = await started(seed=3), await started(seed=3), await started(seed=4)
        first = await one.generate(request(stops=True, length=50))
        await again.generate(request("before", seed=9))
        assert same(first, await again.generate(request("other name", stops=True, length=50)))
        assert not same(first, await other.generate(request(stops=True, length=50)))
        assert not same(first, await one.generate(request(seed=2, stops=True, length=50)))
        await one.load_weights(weights(V1))
        tokens = [c.completion_tokens.tolist() for c in await one.generate(request(stops=True, length=50))]
        assert tokens != [c.completion_tokens.tolist() for c in first]

    run_virtual(case())


def test_tokens_use_the_vocabulary_and_only_end_in_stop_tokens() -> None:
    async def case() -> None:
        engine = await started(vocab_size=6, mean_length=300.0)
        group = await engine.generate(request(stops=True, length=5000))
        for completion in group:
            *before, last = completion.completion_tokens.tolist()
            assert set(before) == {0, 2, 4, 5}
            assert last == 3
            assert -4 <= completion.behavior_logprobs.min() < completion.behavior_logprobs.max() <= 0

    run_virtual(case())


def test_spans_are_exact_across_loads_and_pauses() -> None:
    async def case() -> None:
        engine = await started(room=4, token_s=0.1, swap_s=1.0)
        begin = now()  # the first load took its second too
        task = asyncio.create_task(engine.generate(request(generations=1, length=10)))
        await at(begin + 0.25)
        old_tokens = engine.status().tokens_generated
        assert await engine.load_weights(weights(V1)) == LoadReport(pause_s=1.0)
        assert (engine.live, now(), old_tokens) == (V1, pytest.approx(begin + 1.25), 2)
        await at(begin + 1.64)  # 2.5 steps before the pause and 3.9 after it
        await engine.load_weights(weights(V2))
        (completion,) = await task
        assert completion.spans == ((V0, 2), (V1, 4), (V2, 4))
        assert now() == pytest.approx(begin + 10 * 0.1 + 2 * 1.0)
        assert engine.status().paused_s == pytest.approx(3.0)
        assert engine.status().busy_s == pytest.approx(1.0)

    run_virtual(case())


def test_a_sample_that_waits_through_a_pause_is_all_new() -> None:
    async def case() -> None:
        engine = await started(room=1, token_s=0.1, swap_s=1.0)
        load = asyncio.create_task(engine.load_weights(weights(V1)))
        await asyncio.sleep(0.5)
        assert engine.live == V0
        (completion,) = await engine.generate(request(generations=1))
        assert completion.spans == ((V1, 10),)
        await load

    run_virtual(case())


def test_loads_queue_even_when_a_caller_is_cancelled() -> None:
    async def case() -> None:
        engine = await started(swap_s=1.0)
        begin = now()
        given_up = asyncio.create_task(engine.load_weights(weights(V1)))
        await asyncio.sleep(0.25)
        given_up.cancel()
        await engine.load_weights(weights(V2))
        assert (engine.live, now()) == (V2, pytest.approx(begin + 2.0))

    run_virtual(case())


def test_abort_keeps_whole_tokens_and_frees_the_places() -> None:
    async def case() -> None:
        engine = await started(room=2, token_s=0.1)
        cut = asyncio.create_task(engine.generate(request("cut", generations=3)))
        kept = asyncio.create_task(engine.generate(request("kept", generations=2)))
        await at(0.69)
        engine.abort("cut")
        group = await cut
        assert [len(c.completion_tokens) for c in group] == [6, 6, 0]
        assert [c.spans for c in group] == [((V0, 6),), ((V0, 6),), ()]
        assert {c.finish_reason for c in group} == {FinishReason.ABORT}
        await kept
        assert now() == pytest.approx(1.69)
        assert engine.status().tokens_generated == 32

    run_virtual(case())


def test_groups_fail_at_their_first_samples_end_as_often_as_told() -> None:
    async def case() -> None:
        engine = await started(room=8, token_s=0.1, fail_probability=1.0)
        with pytest.raises(EngineFailure, match="group g: as scripted"):
            await engine.generate(request())
        assert now() == pytest.approx(1.0)
        assert engine.status().samples_running == 0
        often = await started(fail_probability=0.3)
        results = await asyncio.gather(
            *(often.generate(request(f"g{i}", seed=i)) for i in range(400)), return_exceptions=True
        )
        assert 90 < sum(isinstance(result, EngineFailure) for result in results) < 150
        # A retry of the same group is another roll of the dice: it must not fail for ever.
        retries = await asyncio.gather(*(often.generate(request("same")) for _ in range(50)), return_exceptions=True)
        assert 0 < sum(isinstance(result, EngineFailure) for result in retries) < 50

    run_virtual(case())


def test_loads_fail_as_often_as_told() -> None:
    async def case() -> None:
        engine = await ScriptedEngine(ScriptedOptions(fail_load_probability=0.5), 2).__aenter__()
        failures = []
        for step in range(200):
            before = engine.live
            try:
                await engine.load_weights(weights(Version(1, step)))
            except EngineFailure as error:
                failures.append((step, str(error), engine.live == before))
        assert 70 < len(failures) < 130
        for step, text, kept in failures:
            assert text == f"weights 1.{step}: load {step + 1} fails, as scripted"
            assert kept

    run_virtual(case())


def test_closing_ends_loads_and_groups() -> None:
    async def case() -> None:
        engine = await started(token_s=0.1, swap_s=1.0)
        group = asyncio.create_task(engine.generate(request()))
        load = asyncio.create_task(engine.load_weights(weights(V1)))
        await asyncio.sleep(0)
        await engine.__aexit__(None, None, None)
        for task in (group, load):
            with pytest.raises(EngineFailure, match="closed"):
                await task

    run_virtual(case())


# The clockwork alone

EVENTS = st.lists(
    st.tuples(
        st.integers(1, 400),
        st.one_of(
            st.tuples(st.just("submit"), st.lists(st.integers(1, 30), min_size=1, max_size=5)),
            st.tuples(st.just("abort"), st.integers(0, 5)),
            st.tuples(st.just("load"), st.integers(0, 200)),
        ),
    ),
    max_size=12,
)


def play(events: list[tuple[int, Any]], tick_s: float | None) -> tuple[dict[str, Outcome | None], Any]:
    """Run a script, waking every `tick_s` seconds, or only when something is submitted, aborted or loaded."""
    batch = ScriptedBatch(room=3, token_s=0.011, occupancy_cost=0.7, now=0.0)
    batch.load(V0, 0.0, lambda _live: None, 0.0)
    outcomes: dict[str, Outcome | None] = {}
    now_s, group = 0.0, 0

    def wait(until_s: float) -> None:
        nonlocal now_s
        while tick_s is not None and now_s + tick_s < until_s:
            now_s += tick_s
            batch.advance(now_s)
            assert batch.status().samples_running <= 3
        now_s = until_s

    for step, (pause_ms, (what, argument)) in enumerate(events):
        wait(now_s + pause_ms / 1000)
        if what == "submit":
            name, group = f"g{group}", group + 1
            job = ScriptedJob(
                request=request(name, generations=len(argument)),
                lengths=argument,
                reasons=[FinishReason.LENGTH] * len(argument),
                fails=False,
                reply=lambda outcome, name=name: outcomes.update({name: outcome}),
            )
            batch.submit(job, now_s)
        elif what == "abort":
            batch.abort(f"g{argument}", now_s)
        else:
            batch.load(Version(1, step + 1), argument / 1000, lambda _live: None, now_s)
    wait(now_s + 100)
    batch.advance(now_s)
    return outcomes, batch.status()


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_waking_late_changes_nothing(events: list[tuple[int, Any]]) -> None:
    late, late_status = play(events, None)
    often, often_status = play(events, 0.0371)
    assert late == often
    assert len(late) == sum(event[0] == "submit" for _, event in events)
    assert late_status.tokens_generated == often_status.tokens_generated
    assert late_status.tokens_generated == sum(
        count for outcome in late.values() if outcome for spans, _ in outcome.values() for _, count in spans
    )
    for name in ("busy_s", "paused_s", "occupancy_s"):
        assert getattr(late_status, name) == pytest.approx(getattr(often_status, name), abs=1e-6)


def write_trace(path: Path) -> Path:
    lengths = np.array([[3, 1, 4, 12], [1, 5, 9, 2]], np.int32)
    write_length_trace(path / "a.lengths", LengthTrace(7, lengths, {}))
    return path / "a.lengths"


def test_a_trace_says_how_long_each_sample_of_a_group_is(tmp_path: Path) -> None:
    async def case() -> list[Completion]:
        engine = await started(lengths=write_trace(tmp_path), token_s=0.1)
        answer = await engine.generate(request(seed=group_seed(7, 0), length=10, stops=True))
        assert now() == pytest.approx(1.0)
        return answer

    completions = run_virtual(case())
    assert [completion.completion_tokens.size for completion in completions] == [3, 1, 4, 10]
    assert [completion.finish_reason for completion in completions] == [FinishReason.STOP] * 3 + [FinishReason.LENGTH]


@pytest.mark.parametrize("wrong", [{"seed": group_seed(8, 0)}, {"seed": group_seed(7, 2)}, {"generations": 3}])
def test_a_group_that_the_trace_lacks_fails(tmp_path: Path, wrong: dict[str, int]) -> None:
    async def case() -> None:
        engine = await started(lengths=write_trace(tmp_path))
        with pytest.raises(EngineFailure, match=r"is not in .*a\.lengths: the learner needs its seed"):
            await engine.generate(request(**{"seed": group_seed(7, 0), "stops": True, **wrong}))

    run_virtual(case())


def test_lengths_are_drawn_or_played_not_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"length_sigma 0\.8 with lengths .*leave one of them out"):
        ScriptedOptions(lengths=tmp_path / "a.lengths", length_sigma=0.8)


def test_a_timer_that_comes_early_is_not_set_again_for_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case() -> int:
        loop, set_at = asyncio.get_running_loop(), []

        def call_early(when: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
            set_at.append(when)
            return asyncio.SelectorEventLoop.call_at(loop, when - 0.0004, callback, *args)  # as uvloop does

        engine = await started(room=8, token_s=0.01, length_sigma=0.5)
        monkeypatch.setattr(loop, "call_at", call_early)
        await engine.generate(request(generations=8, length=40, stops=True))
        monkeypatch.undo()
        return len(set_at)

    assert run_virtual(case()) <= 9  # one for each end, and the first
