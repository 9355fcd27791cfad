"""The loop between the rows of the steps and the knob of the depth."""

from __future__ import annotations

import asyncio
import logging
import math
from types import SimpleNamespace

from learner.knobs.core import Knobs, knob_ranges
from learner.ledger import Ledger
from learner.staleness import derive_bounds
from learner.tuning.steering import steer_loop
from protocol.waits import Waits


class Played:
    """A recorder, a coordinator and a desk, as far as the loop reaches."""

    def __init__(self, max_staleness: int = 3) -> None:
        ledger = Ledger(derive_bounds(max_staleness=max_staleness, prompts_per_step=2))
        knobs = Knobs(knob_ranges(ledger.bounds, num_generations=2, learning_rate=1e-6))
        self.coordinator = SimpleNamespace(ledger=ledger, knobs=knobs)
        self.recorder = SimpleNamespace(steered=None)
        self.step = 0

    async def turn(self, name, value, *, who, reason=""):
        self.coordinator.knobs.turned(
            self.coordinator.knobs.change(name, value, who=who, reason=reason, step=self.step, incarnation=1)
        )

    @property
    def moves(self):
        return [(record.step, record.old, record.value) for record in self.coordinator.knobs.history]

    def row(self, *, slack=0.0, skipped=0, **fields):
        self.step += not skipped
        shares = {"learner/idle_ratio": slack, "rollout/occupancy": 1.0 - slack}
        return {"policy_version": self.step, "skipped": skipped, **shares, **fields}


def steer(played: Played, rows) -> None:
    async def main():
        waits = Waits()
        loop = asyncio.create_task(steer_loop(played.recorder, played.coordinator, played, waits))
        await asyncio.sleep(0)
        for row in rows:
            played.recorder.steered.put_nowait(row() if callable(row) else row)
            while not (played.recorder.steered.empty() and waits.current()):
                await asyncio.sleep(0)
        assert [wait.name for wait in waits.current()] == ["step"]
        loop.cancel()

    asyncio.run(main())


def test_what_the_controller_decides_is_turned_with_its_reason(caplog):
    played = Played()
    caplog.set_level(logging.INFO)
    steer(played, [lambda: played.row() for _ in range(30)])
    assert [(old, new) for _, old, new in played.moves][:2] == [(3, 2), (2, 1)]
    record = played.coordinator.knobs.history[0]
    assert (record.name, record.who) == ("depth", "controller")
    assert record.reason == "slack 0%: less may do as well"
    assert "depth_effect" in caplog.text
    assert "depth 3 -> 2: slack 0% -> 0%" in caplog.text


def test_a_collapse_is_answered_in_its_second_step():
    played = Played()
    bad = {"effective_sample_size": 0.2}
    steer(played, [lambda: played.row(slack=0.03), lambda: played.row(slack=0.03, **bad), lambda: played.row(**bad)])
    assert played.moves == [(3, 3, 1)]


def test_a_skipped_step_says_nothing():
    played = Played()
    bad = {"skipped": 1, "effective_sample_size": 0.2}
    steer(played, [lambda: played.row(**bad) for _ in range(5)])
    assert played.moves == []


def test_what_was_not_measured_moves_nothing():
    played = Played()
    steer(played, [lambda: played.row(slack=math.nan) for _ in range(40)])
    assert played.moves == []


def test_a_depth_that_a_person_has_set_is_where_it_goes_on():
    played = Played()

    def turned():
        knobs = played.coordinator.knobs
        knobs.turned(knobs.change("depth", 1, who="user", reason="", step=played.step, incarnation=1))
        return played.row(slack=0.5)

    steer(played, [lambda: played.row(slack=0.03), turned, *[lambda: played.row(slack=0.5)] * 10])
    assert [(old, new) for _, old, new in played.moves] == [(3, 1), (1, 2)]
