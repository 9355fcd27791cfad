"""The depth controller against played runs: inside its range whatever it sees, down at once when the data is bad, at
the smallest depth that keeps both sides busy, and quiet when nothing changes."""

from __future__ import annotations

import itertools
import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from learner.tuning.controller import BAD_STEPS, PATIENCE_STEPS, DepthController, Observation, observe

FIELDS = ("learner_idle", "room_unused", "effective_sample_size", "clip_ratio", "policy_kl")


def see(step: int, slack: float, **fields: float) -> Observation:
    return Observation(step=step, **{"learner_idle": slack, "room_unused": slack, **fields})


def controller(depth: int = 4, lowest: int = 0, highest: int = 4) -> DepthController:
    return DepthController(depth=depth, lowest=lowest, highest=highest)


def play(steered: DepthController, slack_at, steps: int, *, first: int = 1, noise: float = 0.0, seed: int = 0):
    """Steps whose slack follows the depth, one step late per step that the pipeline is deep. Returns all moves."""
    dice, moves, depths = random.Random(seed), [], [steered.depth] * 16
    for step in range(first, first + steps):
        depths.append(steered.depth)
        felt = depths[-1 - steered.depth]
        slack = max(0.0, slack_at(felt, step) + dice.uniform(-noise, noise))
        move = steered.decide(see(step, slack, effective_sample_size=0.95))
        moves += [move] if move else []
    return moves


@settings(max_examples=200, deadline=None)
@given(numbers=st.tuples(*[st.integers(0, 8)] * 3).map(sorted), seed=st.integers(0, 1 << 32))
def test_the_depth_stays_in_its_range_whatever_is_seen(numbers, seed):
    lowest, depth, highest = numbers
    steered, dice = controller(depth, lowest, highest), random.Random(seed)
    level = {}
    for step in range(1, 200):
        if step % dice.choice((5, 20, 50)) == 0 or not level:  # of the same for a while, as runs are
            level = {name: dice.choice((0.0, 0.01, 0.1, 0.6, 1.0, math.nan)) for name in FIELDS}
        seen = {name: value if dice.random() < 0.9 else dice.random() for name, value in level.items()}
        before = steered.depth
        move = steered.decide(Observation(step=step, **seen))
        assert lowest <= steered.depth <= highest
        assert (steered.depth != before) is (move is not None)
        if move is not None:
            assert (move.step, move.old, move.new) == (step, before, steered.depth)
            assert move.new - move.old == 1 or move.new < move.old
            assert move.reason


@settings(max_examples=60, deadline=None)
@given(slack=st.floats(0.0, 1.0), depth=st.integers(0, 8), size=st.floats(0.0, 1.0))
def test_constant_input_brings_fewer_and_fewer_moves(slack, depth, size):
    steered = controller(depth, 0, 8)
    steps = 2000
    moves = [steered.decide(see(step, slack, effective_sample_size=size)) for step in range(1, steps + 1)]
    made = [move for move in moves if move is not None]
    tries = math.log2(steps / PATIENCE_STEPS) + 1  # of a raise, and as often back
    assert len(made) <= 8 + 2 * tries
    raised = [move.step for move in made if move.new > move.old]
    gaps = [later - earlier for earlier, later in itertools.pairwise(raised)]
    assert gaps == sorted(gaps), "patience grows"


@pytest.mark.parametrize(
    "collapse", [{"effective_sample_size": 0.3}, {"clip_ratio": 0.4}, {"policy_kl": 0.5}], ids=lambda c: next(iter(c))
)
@pytest.mark.parametrize("highest", [1, 3, 4, 8])
def test_a_planted_collapse_lowers_the_depth_within_two_steps_and_to_the_lowest_in_time(collapse, highest):
    steered = controller(highest, 0, highest)
    good = {"effective_sample_size": 0.95, "clip_ratio": 0.01, "policy_kl": 0.001}
    for step in range(1, 50):
        steered.decide(see(step, 0.03, **good))
    assert steered.depth == highest
    depths = []
    for step in range(50, 50 + BAD_STEPS * (1 + int(math.log2(highest)))):
        steered.decide(see(step, 0.3, **good | collapse))
        depths.append(steered.depth)
    assert depths[BAD_STEPS - 1] < highest
    assert depths[-1] == 0
    for step in range(100, 100 + PATIENCE_STEPS):
        steered.decide(see(step, 0.3, **good | collapse))
    assert steered.depth == 0, "not raised while the data is bad, however long both sides wait"


def test_one_bad_step_is_no_collapse():
    steered = controller()
    for step in range(1, 40):
        size = 0.3 if step % 3 == 0 else 0.95
        assert steered.decide(see(step, 0.03, effective_sample_size=size)) is None


def test_after_a_collapse_it_waits_and_then_tries_again():
    steered = controller(4)
    for step in (1, 2):
        steered.decide(see(step, 0.3, effective_sample_size=0.3))
    assert steered.depth == 2
    moves = [steered.decide(see(step, 0.3, effective_sample_size=0.95)) for step in range(3, 60)]
    raised = [move for move in moves if move is not None]
    assert raised[0].step >= 2 + PATIENCE_STEPS
    assert raised[0].new == 3


REGIMES = {
    "balanced, mild tails": ([0.45, 0.10, 0.01, 0.01, 0.01], 2),
    "balanced, heavy tails": ([0.50, 0.37, 0.16, 0.08, 0.01], 4),
    "one side is the bottleneck": ([0.30, 0.01, 0.0, 0.0, 0.0], 1),
    "waiting helps nobody": ([0.30, 0.30, 0.30, 0.30, 0.30], 0),
    "busy at once": ([0.01, 0.01, 0.01, 0.01, 0.01], 0),
    "straggler-bound": ([0.72, 0.61, 0.53, 0.44, 0.30], 4),
}
"""Slack by depth, and the smallest depth that is as good as any."""


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("regime", REGIMES)
def test_it_finds_the_smallest_depth_that_keeps_both_sides_busy(regime, begin):
    slack, best = REGIMES[regime]
    steered = controller(begin)
    play(steered, lambda depth, step: slack[depth], 150, noise=0.005)
    depths = []
    for part in range(40):
        play(steered, lambda depth, step: slack[depth], 10, first=151 + 10 * part, noise=0.005, seed=part)
        depths.append(steered.depth)
    assert max(set(depths), key=depths.count) == best
    assert depths.count(best) >= 34, "what it tries in between is short"


def test_a_run_that_changes_is_followed():
    """Each regime for 200 steps: from its 100th on the depth is the best one, or one that is being tried beside it."""
    steered, first = controller(4), 1
    for name in ("busy at once", "balanced, heavy tails", "one side is the bottleneck", "straggler-bound",
                 "balanced, mild tails"):  # fmt: skip
        slack, best = REGIMES[name]
        play(steered, lambda depth, step, slack=slack: slack[depth], 100, first=first, noise=0.005)
        seen = []
        for step in range(first + 100, first + 200):
            play(steered, lambda depth, step, slack=slack: slack[depth], 1, first=step)
            seen.append(steered.depth)
        assert seen.count(best) >= 75, (name, seen)
        first += 200


def test_what_came_of_a_move_is_said():
    steered = controller(1)
    moves = play(steered, lambda depth, step: [0.5, 0.3, 0.1, 0.01, 0.01][depth], 20)
    assert moves[0].reason == "both sides wait: the learner 30% of the time, 30% of the room is unused"
    assert [(move.old, move.new) for move in moves] == [(1, 2), (2, 3)]
    play(steered, lambda depth, step: 0.01, 5, first=21)
    assert steered.effect == "depth 2 -> 3: slack 10% -> 1%"


def test_somebody_else_may_turn_the_knob():
    steered = controller(4)
    steered.turned(1, step=10)
    moves = [steered.decide(see(step, 0.3)) for step in range(11, 30)]
    first = next(move for move in moves if move is not None)
    assert (first.old, first.new) == (1, 2)
    assert first.step >= 10 + 1 + 2 + 3, "what is seen of the new depth, for as long as a decision takes"


def test_a_row_of_metrics_is_read():
    row = {"policy_version": 7, "learner/idle_ratio": 0.2, "rollout/occupancy": 0.9, "policy_kl": 0.01}
    seen = observe(row)
    assert (seen.step, seen.learner_idle, seen.policy_kl) == (7, 0.2, 0.01)
    assert seen.room_unused == pytest.approx(0.1)
    assert seen.slack == pytest.approx(0.1)
    assert math.isnan(seen.clip_ratio)
    assert observe(row | {"cispo_clip_ratio": 0.3}).clip_ratio == 0.3
