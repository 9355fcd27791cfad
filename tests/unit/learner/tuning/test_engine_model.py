"""One modeled engine: seats, decode times, swaps and prefills, each against what can be said by hand."""

from __future__ import annotations

import pytest

from learner.tuning.engine_model import EngineModel, Job
from learner.tuning.workload import Costs
from tests.factories import make_lease

COSTS = Costs(decode_token_s=1.0, occupancy_cost=1.0, train_token_s=1.0)


def make_engine(room: int = 4, version: int = 7, **costs: float) -> EngineModel:
    engine = EngineModel(
        room, Costs(**{"decode_token_s": 1.0, "occupancy_cost": 1.0, "train_token_s": 1.0, **costs}), 0.0
    )
    engine.swap(version)
    engine.advance(engine.next_event_s())
    return engine


def play(engine: EngineModel) -> list[tuple[float, Job]]:
    """Run it dry; return when each job ended."""
    ended = []
    while (event_s := engine.next_event_s()) is not None:
        jobs, _ = engine.advance(event_s)
        ended += [(event_s, job) for job in jobs]
    return ended


def test_a_step_is_longer_the_more_seats_are_taken():
    for samples, step_s in ((1, 1.25), (4, 2.0)):
        engine = make_engine()
        engine.submit(Job(make_lease(), [10] * samples))
        assert [time_s for time_s, _ in play(engine)] == [pytest.approx(10 * step_s)]


def test_a_straggler_holds_one_seat_and_the_next_group_takes_the_others():
    engine = make_engine(room=2, occupancy_cost=0.0)
    first, second = Job(make_lease(ordinal=0), [2, 10]), Job(make_lease(ordinal=1), [3, 3])
    engine.submit(first)
    engine.submit(second)
    assert play(engine) == [(pytest.approx(8.0), second), (pytest.approx(10.0), first)]
    assert engine.seat_s == pytest.approx(18.0), "a seat-second for every token"


def test_a_swap_holds_everybody_up_and_what_was_drawn_keeps_its_version():
    engine = make_engine(room=2, occupancy_cost=0.0, pause_s=5.0)
    paused_s = engine.paused_s
    begun_s = paused_s
    job = Job(make_lease(), [4, 10])
    engine.submit(job)
    engine.advance(begun_s + 3.5)
    engine.swap(8)
    ((ended_s, _),) = play(engine)
    assert ended_s == pytest.approx(begun_s + 15.0)
    assert job.spans == [[(7, 3), (8, 1)], [(7, 3), (8, 7)]], "half a token is none yet"
    assert engine.paused_s == pytest.approx(paused_s + 5.0)


def test_a_sample_admitted_after_a_swap_has_nothing_of_the_version_before():
    engine = make_engine(room=1, occupancy_cost=0.0)
    first, second = Job(make_lease(ordinal=0), [4]), Job(make_lease(ordinal=1), [4])
    engine.submit(first)
    engine.submit(second)
    engine.advance(3.0)
    engine.swap(8)
    play(engine)
    assert (first.spans, second.spans) == ([[(7, 3), (8, 1)]], [[(8, 4)]])


def test_a_prompt_holds_up_its_server_once():
    engine = make_engine(room=4, occupancy_cost=0.0, prefill_s=2.0)
    engine.submit(Job(make_lease(), [3, 3, 3]))
    assert [time_s for time_s, _ in play(engine)] == [pytest.approx(5.0)]


def test_a_group_as_one_event_takes_the_seat_seconds_of_its_samples():
    lengths = [2, 4, 10]
    engine = make_engine(room=3, occupancy_cost=0.0)
    engine.submit(Job(make_lease(), [max(lengths)], seats=sum(lengths) / max(lengths)))
    assert [time_s for time_s, _ in play(engine)] == [pytest.approx(10.0)]
    assert engine.seat_s == pytest.approx(sum(lengths))
