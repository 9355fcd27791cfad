from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from protocol.loop_lag import WINDOW, LoopLag, loop_lag_gauge


class VirtualTime:
    """A clock whose sleeps take the given times instead of what was asked for, and then cancel the sleeper."""

    def __init__(self, sleeps_s: Sequence[float]) -> None:
        self.now_s = 100.0
        self.asked: list[float] = []
        self._sleeps_s = iter(sleeps_s)

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, asked_s: float) -> None:
        self.asked.append(asked_s)
        took_s = next(self._sleeps_s, None)
        if took_s is None:
            raise asyncio.CancelledError
        self.now_s += took_s


async def measure(sleeps_s: Sequence[float], interval_s: float = 0.1) -> tuple[LoopLag, VirtualTime]:
    gauge, virtual = LoopLag(), VirtualTime(sleeps_s)
    with contextlib.suppress(asyncio.CancelledError):
        await loop_lag_gauge(gauge, interval_s, clock=virtual.clock, sleep=virtual.sleep)
    return gauge, virtual


def test_no_measurement_is_zero():
    assert LoopLag().p99_ms() == 0.0


def test_p99_is_the_nearest_rank():
    gauge = LoopLag()
    for late_ms in range(100, 0, -1):
        gauge.record(late_ms / 1000)
    assert gauge.p99_ms() == pytest.approx(99.0)


def test_one_measurement_is_its_own_p99():
    gauge = LoopLag()
    gauge.record(0.02)
    assert gauge.p99_ms() == pytest.approx(20.0)


def test_one_outlier_in_a_hundred_is_not_the_p99_but_two_are():
    gauge = LoopLag()
    for late_s in [0.001] * 99 + [0.9]:
        gauge.record(late_s)
    assert gauge.p99_ms() == pytest.approx(1.0)
    gauge.record(0.9)
    assert gauge.p99_ms() == pytest.approx(900.0)


def test_the_window_forgets():
    gauge = LoopLag()
    gauge.record(5.0)
    for _ in range(WINDOW):
        gauge.record(0.0)
    assert gauge.p99_ms() == 0.0


def test_early_timers_are_on_time():
    gauge = LoopLag()
    gauge.record(-0.5)
    assert gauge.p99_ms() == 0.0


async def _lateness(sleeps_s: Sequence[float]) -> float:
    gauge, _ = await measure(sleeps_s)
    return gauge.p99_ms()


def test_the_gauge_records_what_sleeping_took_beyond_the_interval():
    assert asyncio.run(_lateness([0.1, 0.1])) == pytest.approx(0.0, abs=1e-6)
    assert asyncio.run(_lateness([0.1, 0.16, 0.1])) == pytest.approx(60.0)


def test_the_gauge_asks_for_its_interval():
    _, virtual = asyncio.run(measure([0.5, 0.5], interval_s=0.5))
    assert virtual.asked == [0.5, 0.5, 0.5]


def test_the_gauge_sees_a_callback_that_blocks_a_real_loop():
    """The loop's own clock is moved inside a callback: as if it had computed for 80 ms."""

    async def run() -> float:
        gauge = LoopLag()
        loop = asyncio.get_running_loop()
        offset_s = 0.0
        measured = asyncio.Event()

        def clock() -> float:
            return loop.time() + offset_s

        async def sleep(seconds: float) -> None:
            nonlocal offset_s
            if gauge.p99_ms() > 0:
                measured.set()
            await asyncio.sleep(seconds)
            offset_s += 0.08

        task = asyncio.create_task(loop_lag_gauge(gauge, 0.001, clock=clock, sleep=sleep))
        await asyncio.wait_for(measured.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return gauge.p99_ms()

    assert asyncio.run(run()) >= 80.0
