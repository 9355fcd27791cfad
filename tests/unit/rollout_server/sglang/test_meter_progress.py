"""Counters over time, and whether work still gets done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.progress import Progress

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
