"""I8's watch: a stall is said once, at max(60 s, five medians), and time without a healthy server does not count."""

from __future__ import annotations

import pytest

from learner.progress import LEAST_S, STEPS_KEPT, Progress


def advance(progress: Progress, *, steps: int, each_s: float, first: int = 1, start_s: float = 0.0) -> float:
    now_s = start_s
    for step in range(first, first + steps):
        now_s += each_s
        assert not progress.stalled(step, now_s, healthy=True)
    return now_s


def test_before_the_first_step_there_is_twice_the_time():
    progress = Progress(100.0)
    assert progress.limit_s == 120.0
    assert not progress.stalled(0, 220.0, healthy=True)
    assert progress.stalled(0, 220.1, healthy=True)


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.5, LEAST_S), (12.0, 60.0), (20.0, 100.0)])
def test_the_limit_follows_the_median_step(step_s, limit_s):
    progress = Progress(0.0)
    now_s = advance(progress, steps=5, each_s=step_s)
    assert progress.limit_s == limit_s
    assert not progress.stalled(5, now_s + limit_s, healthy=True)
    assert progress.stalled(5, now_s + limit_s + 0.1, healthy=True)


def test_one_slow_step_does_not_move_the_limit():
    progress = Progress(0.0)
    now_s = advance(progress, steps=5, each_s=1.0)
    progress.stalled(6, now_s + 500.0, healthy=True)
    assert progress.limit_s == LEAST_S


def test_a_stall_is_said_once_and_again_after_the_next_step():
    progress = Progress(0.0)
    now_s = advance(progress, steps=3, each_s=1.0)
    assert [progress.stalled(3, now_s + 61 + k, healthy=True) for k in range(5)] == [True, False, False, False, False]
    assert not progress.stalled(4, now_s + 70, healthy=True)
    assert progress.stalled(4, now_s + 131, healthy=True)


def test_time_without_a_healthy_server_does_not_count():
    progress = Progress(0.0)
    now_s = advance(progress, steps=3, each_s=1.0)
    assert not progress.stalled(3, now_s + 1000.0, healthy=False)
    assert not progress.stalled(3, now_s + 1060.0, healthy=True)
    assert progress.stalled(3, now_s + 1060.1, healthy=True)


def test_the_median_is_of_the_last_steps():
    progress = Progress(0.0)
    now_s = advance(progress, steps=STEPS_KEPT, each_s=20.0)
    assert progress.limit_s == 100.0
    advance(progress, steps=STEPS_KEPT, each_s=1.0, first=STEPS_KEPT + 1, start_s=now_s)
    assert progress.limit_s == LEAST_S


def test_serverless_time_begins_when_the_last_server_goes():
    progress = Progress(10.0)
    assert progress.serverless_s(25.0, connected=False) == 15.0, "none has come yet"
    assert progress.serverless_s(30.0, connected=True) == 0.0
    assert progress.serverless_s(42.0, connected=False) == 12.0
    assert progress.serverless_s(43.0, connected=True) == 0.0
