"""Counters over time, and whether work still gets done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.progress import Progress, RollCall

ROOM = 4


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 6), st.booleans())))
def test_time_is_busy_or_paused_or_neither(changes: list[tuple[float, int, bool]]) -> None:
    clock = Clock()
    meter = Meter(ROOM, clock)
    busy_s = paused_s = occupancy_s = 0.0
    running, paused = 0, False
    for elapsed_s, running_next, paused_next in changes:
        clock.now_s += elapsed_s
        paused_s += elapsed_s * paused
        busy_s += elapsed_s * (not paused and running > 0)
        occupancy_s += elapsed_s * min(1, running / ROOM)
        meter.runs(running_next)
        meter.pauses(paused_next)
        running, paused = running_next, paused_next
        for found, expected in ((meter.busy_s, busy_s), (meter.paused_s, paused_s), (meter.occupancy_s, occupancy_s)):
            assert abs(found - expected) < 1e-6
        assert meter.occupancy_s <= meter.busy_s + meter.paused_s + 1e-9


def test_what_samples_took_adds_up() -> None:
    meter = Meter(ROOM, Clock())
    meter.finished(tokens=10, prompt=5, cached=0)
    meter.finished(tokens=7, prompt=5, cached=4)
    assert (meter.tokens_finished, meter.prompt_tokens, meter.cached_prompt_tokens) == (17, 10, 4)


def test_standing_still_with_work_to_do_is_a_stall() -> None:
    progress = Progress(10.0, 0.0)
    progress.note(1, 1.0, busy=True)
    progress.note(1, 11.0, busy=True)
    assert not progress.stalled(11.0)
    assert progress.stalled(11.1)
    progress.note(2, 11.2, busy=True)
    assert not progress.stalled(21.0)


def test_an_engine_without_work_owes_nothing() -> None:
    progress = Progress(10.0, 0.0)
    progress.note(1, 1.0, busy=True)
    progress.note(1, 50.0, busy=False)
    assert not progress.stalled(59.0)
    progress.note(1, 61.0, busy=True)
    assert progress.stalled(61.0)


PATIENCE_S = 10.0


TRANSIT = st.integers(0, 4)
"""Seconds to the engine, and back: less than half of PATIENCE_S each."""


@given(st.lists(st.tuples(st.integers(0, 60), TRANSIT, st.integers(0, 40), TRANSIT), max_size=20))
def test_requests_on_their_way_in_or_out_are_not_lost(requests: list[tuple[int, int, int, int]]) -> None:
    """With a look every second: whatever is unanswered for PATIENCE_S, the engine has had all of it at one of them."""
    roll = RollCall(PATIENCE_S)
    for now in range(110):
        unanswered, held = set(), 0
        for number, (asked, in_s, work_s, out_s) in enumerate(requests):
            if asked <= now < asked + in_s + work_s + out_s:
                unanswered.add(f"r{number}")
            held += asked + in_s <= now < asked + in_s + work_s
        assert roll.note(unanswered, held=held, now_s=float(now)) == 0


@given(others=st.integers(0, 3), lost=st.integers(1, 4), steps=st.lists(st.floats(0.1, 3.0), min_size=60, max_size=60))
def test_what_is_lost_is_missed_in_time(others: int, lost: int, steps: list[float]) -> None:
    roll = RollCall(PATIENCE_S)
    names = {f"r{i}" for i in range(others + lost)}
    assert roll.note(names, held=others + lost, now_s=0.0) == 0
    now_s, begun_s = 0.0, None
    for step_s in steps:
        now_s += step_s
        begun_s = now_s if begun_s is None else begun_s
        missing = roll.note(names, held=others, now_s=now_s)
        assert (missing == lost) == (now_s - begun_s >= PATIENCE_S)
        assert missing in (0, lost)


@given(asked=st.integers(1, 6), seen=st.integers(0, 6), lost=st.integers(0, 6))
def test_of_requests_never_all_seen_no_more_are_missed_than_are_lost(asked: int, seen: int, lost: int) -> None:
    """The last look before the loss found only `seen` of them: the others were on their way in."""
    seen, lost = min(seen, asked), min(lost, asked)
    roll, names = RollCall(PATIENCE_S), [f"r{i}" for i in range(asked)]
    roll.note(names, held=seen, now_s=0.0)
    assert roll.note(names, held=asked - lost, now_s=1.0) == 0
    found = [roll.note(names, held=asked - lost, now_s=now_s) for now_s in (9.0, 10.0, 11.0)]
    assert max(found) <= lost
    assert (found[-1] > 0) == (lost > 0), "at all it is found"


def test_newcomers_hide_a_loss_until_they_have_been_answered() -> None:
    roll = RollCall(PATIENCE_S)
    roll.note({"lost", "a"}, held=1, now_s=0.0)
    assert roll.note({"lost", "b", "c"}, held=2, now_s=20.0) == 0
    assert roll.note({"lost"}, held=0, now_s=40.0) == 0
    assert roll.note({"lost"}, held=0, now_s=50.0) == 1
